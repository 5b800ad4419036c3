"""Threads that take turns."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from segmodel.turns import Turns


def test_one_is_in_the_network_and_one_more_is_ready() -> None:
    turns = Turns()
    lock = threading.Lock()
    ready = inside = most_ready = most_inside = 0

    def prepare() -> None:
        nonlocal ready, most_ready
        with lock:
            ready += 1
            most_ready = max(most_ready, ready)

    def run(_: None) -> None:
        nonlocal ready, inside, most_inside
        with lock:
            ready, inside = ready - 1, inside + 1
            most_inside = max(most_inside, inside)
        # Time for the others to come in, if they can.
        threading.Event().wait(0.02)
        with lock:
            inside -= 1

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(turns.ahead, prepare, run) for _ in range(12)]:
            done.result()
    assert (ready, inside, most_ready, most_inside) == (0, 0, 1, 1)


def test_who_is_alone_has_nobody_ready_beside() -> None:
    turns = Turns()
    prepared, entered = threading.Event(), threading.Event()

    def run(_: None) -> bool:
        entered.set()
        return prepared.wait(0.2)

    with ThreadPoolExecutor(2) as threads:
        alone = threads.submit(turns.alone, lambda: None, run)
        assert entered.wait(60)
        beside = threads.submit(turns.ahead, prepared.set, lambda _: True)
        assert not alone.result()
        assert beside.result()


def test_an_error_passes_the_turn_on() -> None:
    turns = Turns()

    def fail(_: object = None) -> None:
        raise OSError("gone")

    for take in (turns.ahead, turns.alone):
        with pytest.raises(OSError, match="gone"):
            take(fail, lambda _: None)
        with pytest.raises(OSError, match="gone"):
            take(lambda: None, fail)
    assert turns.ahead(lambda: 3, lambda ready: ready + 1) == 4


def test_seconds_are_of_the_network_and_of_each_thread() -> None:
    turns = Turns()

    def wait(_: object = None) -> None:
        threading.Event().wait(0.05)

    turns.ahead(wait, lambda _: None)
    assert turns.busy.seconds < 0.05
    turns.ahead(lambda: None, wait)
    assert turns.busy.seconds >= 0.05
    before = turns.busy.seconds
    # What is prepared alone is prepared in the network's time.
    turns.alone(wait, lambda _: None)
    assert turns.busy.seconds >= before + 0.05
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: turns.busy.seconds).result() == 0
