"""Threads that work beside one another, or one of them alone."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from jobs import supervisor
from jobs.supervisor import Turns


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def nothing() -> None:
    pass


def test_one_that_works_alone_waits_for_the_others_and_they_for_it(
    threads: ThreadPoolExecutor,
) -> None:
    turns, order = Turns(), list[str]()
    waits = threading.Event()

    def work_alone() -> None:
        with turns.alone():
            order.append("alone")
            # The one below has given way, and still waits.
            assert waits.wait(60)
            order.append("over")

    def work_beside() -> None:
        def give_way() -> None:
            order.append("gives way")
            waits.set()

        with turns.beside(give_way):
            order.append("beside")

    with turns.beside(nothing), turns.beside(nothing):
        alone = threads.submit(work_alone)
        while not turns._alone:
            pass
        beside = threads.submit(work_beside)
        assert waits.wait(60)
        assert order == ["gives way"]
    alone.result(60)
    beside.result(60)
    assert order == ["gives way", "alone", "over", "beside"]


def test_who_waits_for_a_turn_ends_when_the_job_is_stopped(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    turns = Turns()

    def work_alone() -> None:
        with turns.alone():
            raise AssertionError

    with turns.beside(nothing):
        waiting = threads.submit(work_alone)
        turns.stop.set()
        with pytest.raises(CancelledError):
            waiting.result(60)
    with pytest.raises(CancelledError):
        turns.pause(60)
    # Its turn was given back.
    with turns.beside(nothing), turns.beside(nothing):
        pass
