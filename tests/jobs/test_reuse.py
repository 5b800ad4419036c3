"""While a candidate waits, each image is predicted once, whatever comes beside it."""

from typing import Any

import pytest

from tests.jobs import labelling_place
from tests.jobs.labelling_place import POLICY, Place, words


@pytest.mark.parametrize("loose", [False, True])
def test_what_a_candidate_predicted_is_not_predicted_again(
    loose: bool,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predicted: list[str] = []
    real = labelling_place.predicted

    def row(image: dict[str, Any]) -> dict[str, Any]:
        predicted.append(image["image_id"])
        return real(image)

    def put(name: str, seeds: range) -> None:
        if not loose:
            place.put(f"{name}.tar", {f"{seed}.jpg": seed for seed in seeds})
            return
        (place.root / "in" / name).mkdir()
        for seed in seeds:
            (place.root / "in" / name / f"{seed}.jpg").write_bytes(place.jpeg(seed))

    monkeypatch.setattr(labelling_place, "predicted", row)
    put("a", range(4))
    assert place.label() == 0
    place.policy("score_threshold: 1.0\n")
    for night in range(3):
        # Eight images, in chunks of four.
        put(f"b{night}", range(10 + 10 * night, 18 + 10 * night))
        predicted.clear()
        capsys.readouterr()
        assert place.label("--max-drift", "0.3") == 4
        assert len(predicted) == 8
        assert place.manifest(night + 2)["counts"]["new"]["images"] == 8 * (night + 1)
        said = words(capsys)
        taken = f"{8 * night} of {8 * (night + 1)} images were predicted by an earlier run"
        assert (taken in said) == (night > 0)
    # Of another policy that wants no other scores they are used, too, and are what the model says.
    place.policy(POLICY.replace("score_threshold: 0.0", "score_threshold: 1.0\nreview_from: 1.0"))
    predicted.clear()
    assert place.label() == 0
    assert predicted == []
    assert place.manifest(5)["counts"]["new"]["images"] == 24
