"""The board: every entry reaches the driver once, silence is noticed, the first failure stays."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from jobs import board
from jobs.board import Board, watched

pytestmark = pytest.mark.ray


@pytest.fixture
def actor(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(board, "POLL_S", 0.01)
    monkeypatch.setattr(board, "QUIET_S", 0.1)
    made = ray.remote(num_cpus=0)(Board).remote()
    yield made
    ray.kill(made)


def test_every_entry_is_shown_once_and_silence_is_noticed(actor: Any) -> None:
    shown: list[board.Entry] = []
    silences: list[float] = []
    ray.get(actor.post.remote({"step": 1}))
    with watched(actor, shown.append, silences.append):
        while len(silences) < 2:
            time.sleep(0.01)
        ray.get([actor.post.remote({"step": step}) for step in (2, 3)])
    assert shown == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert 0.1 <= silences[0] < silences[1]


def test_the_first_failure_stays(actor: Any) -> None:
    assert ray.get(actor.failure.remote()) is None
    ray.get([actor.fail.remote(message) for message in ("first", "second")])
    assert ray.get(actor.failure.remote()) == "first"
