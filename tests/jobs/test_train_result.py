"""What a training leaves: the best checkpoint that is there, with its own scores."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs import checkpoints, train_result
from jobs.checkpoints import Checkpoint, Point
from jobs.storage import open_store

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
