"""`label --dry-run` says what a run does, which the run then does; and gates that are loosened."""

import os
from pathlib import Path
from typing import Any

import pytest

from jobs import labelling, sorting, versions
from jobs.__main__ import main
from jobs.label_config import LabelConfig
from jobs.storage import open_store
from tests.jobs.labelling_place import POLICY, Place


def tree(place: Place) -> dict[str, int]:
    """All files of the data set, and when each was written."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in Path(place.named()).rglob("*")
        if path.is_file()
    }


def rehearse(place: Place, capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> str:
    """What a dry run says; it writes nothing."""
    before = tree(place)
    capsys.readouterr()
    assert place.label("--dry-run", *more) == code
    assert tree(place) == before
    said = capsys.readouterr()
    return " ".join((said.out + said.err).split())


def test_it_says_what_the_run_then_does(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(6)})
    said = rehearse(place, capsys, "--max-drift", "0.3")
    assert "New since the beginning" in said
    assert "max_per_image 5" in said
    assert "publish version 1" in said
    assert "predict all that is new" in said
    assert "publish without a comparison: there is no parent" in said
    assert "labelled already" not in said
    assert place.label("--max-drift", "0.3") == 0
    assert "publish nothing: nothing is new (exit code 0)" in rehearse(place, capsys)

    # A shard written again: whether its images are others is not known without a look into it.
    os.utime(place.root / "in" / "a.tar", (1, 1))
    assert "not known which images are labelled already" in rehearse(place, capsys)
    assert place.label() == 0
    assert versions.latest(open_store(place.named())) == 1

    place.put("b.tar", {f"{n}.jpg": n for n in range(10, 18)})
    with monkeypatch.context() as patch:
        patch.setattr(sorting, "sort", lambda *_: (_ for _ in ()).throw(OSError("died")))
        assert place.label() == 1
    said = rehearse(place, capsys, "--max-drift", "0.3")
    # `a.tar` was written again, and its six images are the same.
    assert "predict 8 images in 2 chunks, 2 of which are done" in said
    assert "candidate only (exit code 4) where labels moved further than 0.3 from version 1" in said
    place.put("c.tar", {"30.jpg": 30})
    said = rehearse(place, capsys)
    assert "first finish what an earlier run began, as version 2" in said
    assert "2 of which are done" in said
    assert "then label what came since, as version 3" in said
    assert "publish whatever it is: no --max-drift was given" in said
    assert place.label() == 0
    assert versions.latest(open_store(place.named())) == 3


def test_it_refuses_what_the_run_refuses(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place.put("a.tar", {"1.jpg": 1})
    place.policy("score_treshold: 1")
    assert "did you mean score_threshold" in rehearse(place, capsys, code=2)
    place.policy("categories: {cat: {min_area: 3}}")
    assert "the model has not" in rehearse(place, capsys, code=2)
    place.policy(POLICY)
    assert "is not a model bundle" in rehearse(place, capsys, "--model", str(tmp_path), code=1)
    # Also where nothing is new, which a run would not look beyond.
    assert place.label() == 0
    place.policy("min_area: many")
    assert place.label() == 0
    assert "min_area" in rehearse(place, capsys, code=2)

    asked = ["label", "--dry-run", "--input", str(place.root / "in"), "--dataset", place.named()]
    assert main(asked) == 0
    assert "--model and --policy, which were not given nor checked" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*asked, "--policy", str(tmp_path / "policy.yaml")])
    assert "give --model and --policy to --dry-run, or neither" in capsys.readouterr().err


def test_predict_leaves_nothing_out_that_the_policy_could_want(place: Place) -> None:
    place.put("a.tar", {"1.jpg": 1})
    store = open_store(place.named())
    for text, threshold, most in (
        ("", 0.05, 100),
        ("score_threshold: 0.01", 0.01, 100),
        ("max_per_image: 30", 0.05, 100),
        ("max_per_image: 500\ncategories: {car: {score_threshold: 0.02}}", 0.02, 500),
    ):
        place.policy(text)
        config = LabelConfig(
            input=str(place.root / "in"),
            dataset=place.named(),
            model=str(place.model),
            policy=str(place.root / "policy.yaml"),
        )
        asked = labelling.rules_of(config, labelling.look_at(config, store)).predict
        assert (asked.score_threshold, asked.max_detections) == (threshold, most)


def test_categories_that_contradict_the_data_set_are_refused_before_anything_is_predicted(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put("a.tar", {"1.jpg": 1})
    assert place.label() == 0
    place.put("b.tar", {"2.jpg": 2})
    load = versions.load

    def renamed(*of: Any) -> Any:
        found = load(*of)
        found.manifest["categories"] = [{"id": 1, "name": "tree"}]
        return found

    monkeypatch.setattr(versions, "load", renamed)
    assert "category 1 is 'tree' in the data set" in rehearse(place, capsys, code=2)
    assert place.label() == 2
    assert not list(Path(place.named()).glob("work/1-*"))


def test_a_candidate_does_not_wait_for_a_gate_that_lets_it_pass(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(4)})
    assert place.label() == 0
    # Nothing of half of what is new is a label any more.
    place.policy("score_threshold: 0.8\nmin_area: 1\n")
    place.put("b.tar", {f"{n}.jpg": n for n in range(10, 30)})
    assert place.label("--max-drift", "0.2") == 4
    drift = place.manifest(2)["drift"]
    farthest = max(one["distance"] for one in drift.values())
    assert 0.2 < farthest < 1
    for gate in ("0.2", "0.1", f"{farthest - 0.01:.2f}"):
        said = rehearse(place, capsys, "--max-drift", gate)
        assert "publish nothing: the candidate 2 has what is new, and waits (exit code 4)" in said
        assert place.label("--max-drift", gate) == 4
        assert versions.latest(open_store(place.named())) == 2

    loose = f"{farthest + 0.01:.2f}"
    predicted = {name: at for name, at in tree(place).items() if "/predictions/" in name}
    assert "publish version 3" in rehearse(place, capsys, "--max-drift", loose)
    assert place.label("--max-drift", loose) == 0
    third = place.manifest(3)
    assert (third["status"], third["parent"], third["drift"]) == ("published", 1, drift)
    assert place.rows(3) == place.rows(2)
    # Its predictions are those of the candidate.
    assert {name: tree(place)[name] for name in predicted} == predicted
    assert place.label("--max-drift", loose) == 0
    assert versions.latest(open_store(place.named())) == 3


def test_what_was_rolled_back_is_not_made_again_by_the_next_night(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(4)})
    assert place.label() == 0
    place.put("b.tar", {f"{n}.jpg": n + 20 for n in range(4)})
    assert place.label() == 0
    assert main(["label", "--dataset", place.named(), "--promote", "1"]) == 0
    said = rehearse(place, capsys)
    assert "publish nothing: version 2, whose labels it would make again, was rolled back" in said
    for more in ({}, {"c.tar": 40}):
        for name, seed in more.items():
            place.put(name, {"0.jpg": seed})
        assert place.label() == 4
        said = " ".join(capsys.readouterr().out.split())
        assert "Version 2 was rolled back, and this run would label its images" in said
        assert versions.latest(open_store(place.named())) == 2
    # Without its images, or by another policy, it is not what was rolled back.
    (place.root / "in" / "b.tar").rename(place.root / "b.tar")
    assert place.label() == 0
    assert set(place.rows(3)) == {*place.rows(1), "c.tar#0.jpg"}
    (place.root / "b.tar").rename(place.root / "in" / "b.tar")
    assert place.label() == 4
    place.policy(POLICY.replace("max_per_image: 5", "max_per_image: 1"))
    assert place.label() == 0
    assert place.manifest(4)["parent"] == 3
    assert all(len(row["detections"]) == 1 for name, row in place.rows(4).items() if name[0] == "b")


def test_a_version_that_is_promoted_again_is_gone_on_from(place: Place) -> None:
    for number, name in enumerate("ab"):
        place.put(f"{name}.tar", {"0.jpg": number})
        assert place.label() == 0
    for number in ("1", "2"):
        assert main(["label", "--dataset", place.named(), "--promote", number]) == 0
    assert place.label() == 0
    assert versions.latest(open_store(place.named())) == 2
    place.put("c.tar", {"0.jpg": 5})
    assert place.label() == 0
    assert place.manifest(3)["parent"] == 2
