"""Checkpoints: whole or not there, the best and the last kept, damage said in words."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs import checkpoints
from jobs.checkpoints import Checkpoint
from jobs.storage import ArrowStore, open_store
from jobs.store import StorageError
from tests.conftest import Bucket

CHECKPOINT = Checkpoint(
    steps=7,
    position=14,
    tensors={"model/a": torch.arange(6.0).view(2, 3), "optimizer/0/step": torch.tensor(7.0)},
    plain={"steps": 7, "scaler": {}},
    history=[{"step": 1, "loss": 0.1 + 0.2}],
    best={"step": 5, "mask_AP": 0.25},
)


def test_what_was_saved_is_loaded(bucket: Bucket) -> None:
    store = bucket.store("out")
    assert checkpoints.last(store) is None
    checkpoints.save(store, CHECKPOINT)
    path = checkpoints.last(store)
    assert path == checkpoints.path_of(7)
    found = checkpoints.load(store, path)
    assert replace(found, tensors={}) == replace(CHECKPOINT, tensors={})
    for name, tensor in CHECKPOINT.tensors.items():
        assert torch.equal(found.tensors[name], tensor)


def test_the_best_and_the_last_two_are_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for steps in (5, 10, 100, 1000):
        checkpoints.save(store, replace(CHECKPOINT, steps=steps))
    kept = [found.path for found in store.list_objects(checkpoints.FOLDER)]
    assert kept == [checkpoints.path_of(steps) for steps in (5, 100, 1000)]
    assert checkpoints.last(store) == checkpoints.path_of(1000)


def test_a_run_that_was_given_up_removes_nothing_of_the_one_that_goes_on(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for steps in (20, 30, 40):
        checkpoints.save(store, replace(CHECKPOINT, steps=steps, best={"step": 20}))
    checkpoints.save(store, replace(CHECKPOINT, steps=25, best={"step": 10}))
    kept = [found.path for found in store.list_objects(checkpoints.FOLDER)]
    assert kept == [checkpoints.path_of(steps) for steps in (20, 25, 30, 40)]
    # The next one of the run that goes on takes it away.
    checkpoints.save(store, replace(CHECKPOINT, steps=50, best={"step": 20}))
    kept = [found.path for found in store.list_objects(checkpoints.FOLDER)]
    assert kept == [checkpoints.path_of(steps) for steps in (20, 40, 50)]


def test_a_best_one_that_is_gone_is_known_to_be(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    checkpoints.save(store, replace(CHECKPOINT, steps=5))
    assert checkpoints.is_there(store, 5)
    assert not checkpoints.is_there(store, 4)


@pytest.mark.parametrize("damage", ["cut", "header", "no checkpoint"])
def test_damage_is_said_with_what_to_do(tmp_path: Path, damage: str) -> None:
    store = open_store(str(tmp_path))
    checkpoints.save(store, CHECKPOINT)
    path = checkpoints.path_of(7)
    data = store.read(path)
    broken = {
        "cut": data[:-5],
        "header": data.replace(b"position", b"positron"),
        "no checkpoint": b"something else",
    }[damage]
    store.put(path, broken)
    with pytest.raises(StorageError, match="delete it, and the one before it is used"):
        checkpoints.load(store, path)


def test_what_a_killed_process_left_of_one_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    with monkeypatch.context() as killed:
        # Neither moved to its place nor taken away.
        killed.setattr(
            ArrowStore, "put", lambda self, path, data: self._put_aside(path, [data[:9]])
        )
        checkpoints.save(store, CHECKPOINT)
    assert [path.stat().st_size for path in (tmp_path / checkpoints.FOLDER).iterdir()] == [9]
    assert checkpoints.last(store) is None
    checkpoints.save(store, CHECKPOINT)
    assert checkpoints.last(store) == checkpoints.path_of(7)
    assert [f.path for f in store.list_objects()] == [checkpoints.path_of(7)]
