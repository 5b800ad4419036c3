"""`make demo-model`: which commands it runs; what ships still finds what it was trained to find."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs import demo_model
from jobs.demo import MODEL
from segmodel import bundle, coco, masks, scenes
from segmodel.evaluation import evaluate
from segmodel.inference import Predictor
from segmodel.schema import detection_rows

# Neither trained on, nor of the demo or the benchmarks.
FRESH = range(6_000_000, 6_000_016)


def test_each_stage_starts_from_the_bundle_of_the_one_before_and_the_last_one_ships(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[tuple[str, ...]] = []

    def segjobs(arguments: Sequence[str]) -> int:
        ran.append(tuple(arguments))
        flags = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        if arguments[0] == "train":
            made = Path(flags["--output"]) / "bundle"
            made.mkdir(parents=True)
            (made / "name").write_text(Path(flags["--config"]).name)
        return 0

    monkeypatch.setattr(demo_model, "main", segjobs)
    monkeypatch.setattr(demo_model, "MODEL", tmp_path / "shipped")
    monkeypatch.setattr(demo_model, "TRAIN_SEEDS", range(2))
    monkeypatch.setattr(demo_model, "VAL_SEEDS", range(2, 4))
    assert demo_model.make(tmp_path) == 0
    assert [arguments[0] for arguments in ran] == ["pack"] * 2 + ["train"] * 3
    started = [
        arguments[arguments.index("--model") + 1] for arguments in ran if "--model" in arguments
    ]
    assert started == [f"{tmp_path}/demo/bundle", f"{tmp_path}/demo-fine/bundle"]
    assert (tmp_path / "shipped" / "name").read_text() == "demo-last.yaml"


def test_what_ships_has_the_mask_ap_that_it_is_said_to_have() -> None:
    made = [scenes.scene(seed) for seed in FRESH]
    truth = list(coco.rows(scenes.coco(made, [f"{seed}.png" for seed in FRESH])))
    model = bundle.load(MODEL)
    predictor = Predictor(model, "cpu")
    found = []
    for one in predictor.predict([scene.image for scene in made]):
        assert one.mask_probs is not None
        rles = masks.encode(one.mask_probs, one.boxes_xyxy, one.size_hw)
        found.append(detection_rows(one, rles, model.by_label()))
    scores = evaluate(truth, [{**t, "detections": d} for t, d in zip(truth, found, strict=True)])
    assert scores.mask is not None
    assert scores.mask.AP >= 0.8
