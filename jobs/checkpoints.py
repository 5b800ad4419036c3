"""Checkpoints of a training: one object each, in the output; no pickle in them.

An object holds the tensors as safetensors, and in their header, as JSON, what else a resumed run
needs. It is put atomically, so what a listing shows is whole.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from jobs.store import StorageError, Store

FOLDER = "checkpoints"
# The last, and the one before it, should a run that was given up still be writing the last.
KEPT = 2
_HEADER = "segjobs"

Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that a training needs to go on.

    Attributes:
        steps: Of the optimizer, done.
        position: The next micro-batch of the feed's order.
        tensors: `Trainer.state`.
        plain: `Trainer.state`.
        history: Losses and evaluations so far.
        best: The evaluation with the highest AP so far, with the step of its checkpoint.
    """

    steps: int
    position: int
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]
    history: Sequence[Point]
    best: Point | None


def last(store: Store) -> str | None:
    """Return the path of the newest checkpoint in a training's output, or None."""
    return max((found.path for found in store.list_objects(FOLDER)), default=None)


def path_of(steps: int) -> str:
    """Return where the checkpoint of a step lies."""
    return f"{FOLDER}/step-{steps:09d}.safetensors"


def save(store: Store, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then remove the older ones but for the best.

    A run that was given up and still writes removes nothing: what is best is for the one that went on to say.
    """
    header = {
        name: getattr(checkpoint, name)
        for name in ("steps", "position", "plain", "history", "best")
    }
    data = safetensors.torch.save(
        dict(checkpoint.tensors), metadata={_HEADER: json.dumps(header, sort_keys=True)}
    )
    store.put(path_of(checkpoint.steps), data)
    paths = sorted(found.path for found in store.list_objects(FOLDER))
    if any(path > path_of(checkpoint.steps) for path in paths):
        return
    best = path_of(checkpoint.best["step"]) if checkpoint.best else None
    for path in paths[:-KEPT]:
        if path != best:
            store.delete(path)


def is_there(store: Store, steps: int) -> bool:
    """Say whether the checkpoint of so many steps is kept."""
    return store.info(path_of(steps)) is not None


def load(store: Store, path: str) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        StorageError: It is damaged.
    """
    data = store.read(path)
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])["__metadata__"][_HEADER]
        return Checkpoint(tensors=tensors, **json.loads(header))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{store.url(path)} is damaged ({error}): delete it, and the one before it is used"
        ) from error
