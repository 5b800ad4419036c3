"""What a training leaves: the best checkpoint that is there, with its own scores."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from jobs import checkpoints, train_result, train_task
from jobs.checkpoints import Checkpoint, Point
from jobs.storage import open_store
from jobs.train_config import TrainConfig
from jobs.train_task import Task
from jobs.training_set import TrainingSet
from segmodel import bundle

HISTORY: list[Point] = [
    {"step": 5, "loss": 1.0},
    {"step": 5, "mask_AP": 0.3},
    {"step": 7, "loss": 0.5},
    {"step": 7, "mask_AP": 0.2},
]


def checkpoint(steps: int, best: Point | None) -> Checkpoint:
    tensors = {"model/a": torch.tensor([float(steps)])}
    return Checkpoint(
        steps=steps, position=steps, tensors=tensors, plain={}, history=HISTORY, best=best
    )


@pytest.mark.parametrize(
    ("best", "kept", "expected"),
    [
        (HISTORY[1], True, (5, HISTORY[1])),
        # Somebody deleted it: the last one has scores of its own.
        (HISTORY[1], False, (7, HISTORY[3])),
        (HISTORY[3], True, (7, HISTORY[3])),
        (None, True, (7, {})),
    ],
)
def test_the_best_checkpoint_that_is_there_is_taken(
    tmp_path: Path, best: Point | None, *, kept: bool, expected: tuple[int, Point]
) -> None:
    store = open_store(str(tmp_path))
    if kept:
        checkpoints.save(store, checkpoint(5, HISTORY[1]))
    last = checkpoint(7, best)
    checkpoints.save(store, last)
    found, scores = train_result._best(store, last)
    assert (found.steps, scores) == expected
    assert found.tensors["model/a"].tolist() == [float(expected[0])]


def test_a_last_one_that_was_not_evaluated_has_no_scores(tmp_path: Path) -> None:
    last = replace(checkpoint(7, HISTORY[1]), history=HISTORY[:3])
    assert train_result._best(open_store(str(tmp_path)), last) == (last, {})


def test_the_card_has_every_setting_and_no_place(tiny_bundle: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        train="s3://secret/sets",
        output="s3://secret/out",
        address="secret:6379",
        endpoint_url="http://secret",
        workers="1..4",
        batch_size=2,
        accumulate=3,
        learning_rate=0.007,
        warmup_epochs=0.25,
        clip_norm=3.5,
        precision="fp32",
    )
    start = bundle.load(tiny_bundle)
    train = TrainingSet(
        chunks=(), categories=(), num_rows=5, num_skipped=0, num_bytes=9, digest="0123456789abcdef"
    )
    task = Task(
        train=train,
        val=None,
        bundle=start,
        origin="",
        recipe=train_task._recipe(config, start, gpus=False),
        augmentation=train_task._augmentation(config, start.settings),
    )
    history = [{"step": 1, "loss": 2.0, "workers": 1}, {"step": 2, "loss": 1.0, "workers": 2}]
    tensors = {f"average/{name}": tensor for name, tensor in start.weights.items()}
    best = replace(checkpoint(2, None), tensors=tensors, history=history)
    bundle.save(tmp_path, train_result._bundle(config, task, best, {}))

    settings = bundle.load(tmp_path).provenance["settings"]
    places = {"train", "val", "model", "output", "address", "endpoint_url"}
    assert settings.keys() == {field.name for field in fields(TrainConfig)} - places
    card = (tmp_path / bundle.CARD).read_text()
    for line in (
        "learning_rate: 0.007",
        "warmup_epochs: 0.25",
        "clip_norm: 3.5",
        "workers: 1 (6 images in a step) or 2 (12 images in a step)",
        "norm: train",
        "min_size: 64",
    ):
        assert f"  - {line}\n" in card
    assert "secret" not in card.replace("training set: s3://secret/sets", "")
