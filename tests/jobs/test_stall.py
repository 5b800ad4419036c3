"""What a job says while it waits, and when it gives up."""

import io
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jobs import stall
from jobs.cluster import ClusterError
from jobs.stall import (
    ALIVE,
    DEAD,
    DEAD_LOOKS,
    MOST_LOST,
    MOST_RESTARTS,
    RESTARTING,
    CrowdedError,
    Observer,
    Seen,
    StallWarning,
    in_words,
    refuse_crowd,
    refuse_to_go_on,
)


@pytest.mark.parametrize(
    ("seen", "wanted", "totals", "free", "words"),
    [
        (
            Seen(
                under_way={"read": 3, "predict": 0, "write": 0},
                actors={"alive": 0, "pending": 2, "restarting": 0},
            ),
            {"GPU": 1.0},
            {"CPU": 16.0, "memory": 1e9},
            {"CPU": 15.25},
            "Chunks under way: 3 read, 0 predict, 0 write. Actors: 0 alive, 2 pending, 0 restarting. An "
            "actor wants 1 GPU; the cluster has 16 CPUs (15.25 free), 0 GPUs (0 free). It waits for room: "
            "for other jobs to end, or for nodes to be added.",
        ),
        (
            Seen(
                under_way={"read": 0, "predict": 4, "write": 0},
                actors={"alive": 1, "pending": 0, "restarting": 1},
            ),
            {"CPU": 0.5},
            {"CPU": 2.0},
            {"CPU": 0.0},
            "Chunks under way: 0 read, 4 predict, 0 write. Actors: 1 alive, 0 pending, 1 restarting. An "
            "actor wants 0.5 CPU; the cluster has 2 CPUs (0 free).",
        ),
        (
            Seen(alone={"00000007": 13, "00000009": 0}),
            {"CPU": 0.5},
            {"CPU": 2.0},
            {"CPU": 1.0},
            "Chunks that lost their process are done image by image, under way: 13 of chunk 00000007, 0 of "
            "chunk 00000009. An actor wants 0.5 CPU; the cluster has 2 CPUs (1 free).",
        ),
    ],
)
def test_what_a_job_waits_for(
    seen: Seen,
    wanted: dict[str, float],
    totals: dict[str, float],
    free: dict[str, float],
    words: str,
) -> None:
    assert in_words(seen, wanted, totals, free) == words


class Log(io.StringIO):
    """Counts the lines that were printed, and lets a test wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = threading.Semaphore(0)

    def write(self, text: str) -> int:
        for _ in range(text.count("\n")):
            self.lines.release()
        return super().write(text)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(stall, "console", Console(file=log, soft_wrap=True))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    return log


def test_it_is_said_again_and_again_until_the_job_is_over(said: Log) -> None:
    with StallWarning(0.05, lambda: 40, {"CPU": 0.5}):
        for _ in range(3):
            assert said.lines.acquire(timeout=60)
    lines = said.getvalue().splitlines()
    assert all("40 images are left. An actor wants 0.5 CPU" in line for line in lines)
    assert "No chunk was finished for 0." in lines[0]
    number = len(lines)
    assert not said.lines.acquire(timeout=0.3)
    assert len(said.getvalue().splitlines()) == number


def test_a_job_that_comes_further_says_nothing(said: Log) -> None:
    with StallWarning(30, lambda: 40, {"CPU": 0.5}) as warning:
        for _ in range(5):
            warning.progress()
    assert said.getvalue() == ""


@pytest.fixture(autouse=True)
def log_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Ray there is none."""
    monkeypatch.setattr(stall, "log_folder", lambda: "/tmp/logs")


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`step(written, failed, ...)`: one look of an observer at a pipeline that is so far."""
    observer = Observer()
    monkeypatch.setattr(stall, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(stall, "RESTARTS_EVERY_S", -1)
    monkeypatch.setattr(stall, "_restarts", lambda: 0)

    def look(
        written: int, failed: int, states: Sequence[int | None] = (ALIVE,), pending: int = 0
    ) -> None:
        actors = [SimpleNamespace(_get_local_state=lambda state=state: state) for state in states]
        pool = SimpleNamespace(
            _running_actors=actors,
            num_pending_actors=lambda: pending,
            max_size=lambda: 2,
            max_tasks_in_flight_per_actor=lambda: 4,
            per_actor_resource_usage=lambda: SimpleNamespace(cpu=0.5),
        )

        def operator(finished: int, failed: int) -> Any:
            return SimpleNamespace(
                num_active_tasks=lambda: 1,
                metrics=SimpleNamespace(num_tasks_finished=finished, num_tasks_failed=failed),
                get_autoscaling_actor_pools=lambda: [pool],
            )

        operators = [operator(0, 0), operator(9, 0), operator(9, failed), operator(written, 0)]
        observer.on_execution_step(SimpleNamespace(_topology=operators))

    return look


def test_processes_that_die_in_a_row_stop_the_job(step: Callable[..., None]) -> None:
    step(0, MOST_LOST)
    step(1, MOST_LOST + 1)
    step(1, 2 * MOST_LOST + 1)
    with pytest.raises(
        ClusterError, match=f"{MOST_LOST + 1} chunks in a row lost theirs.*/tmp/logs"
    ):
        step(1, 2 * MOST_LOST + 2)


def test_actors_that_are_gone_stop_the_job_and_those_that_come_do_not(
    step: Callable[..., None],
) -> None:
    step(0, 0, states=[])
    coming: list[dict[str, Any]] = [
        {"states": [DEAD], "pending": 1},
        {"states": [DEAD, RESTARTING]},
        {"states": [DEAD, None]},
        {"states": [DEAD, ALIVE]},
    ]
    for there in coming:
        step(0, 0, **there)
        for _ in range(DEAD_LOOKS):
            step(0, 0, states=[DEAD, DEAD])
    with pytest.raises(ClusterError, match="all actors are gone for good"):
        step(0, 0, states=[DEAD, DEAD])


def test_actors_that_are_started_again_and_again_stop_the_job(
    step: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    restarts = iter(range(1000))
    monkeypatch.setattr(stall, "_restarts", lambda: next(restarts))
    step(0, 0)
    # The first look after a chunk was finished is what the others are compared with.
    for written in range(2 * MOST_RESTARTS):
        step(written, 0)
    for _ in range(MOST_RESTARTS):
        step(written, 0)
    with pytest.raises(ClusterError, match=f"actors were started anew {MOST_RESTARTS + 1} times"):
        step(written, 0)


def test_a_large_pool_may_lose_what_it_has_in_flight() -> None:
    refuse_to_go_on(500, 2 * 100 * 4, all_dead=False)
    with pytest.raises(ClusterError, match="801 chunks in a row"):
        refuse_to_go_on(801, 2 * 100 * 4, all_dead=False)


def test_actors_that_fill_the_nodes_that_are_left_stop_the_pipeline(
    step: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    step(1, 0, states=[ALIVE, ALIVE])
    monkeypatch.setattr(stall, "CROWDED_S", -1)
    step(1, 0, states=[ALIVE, RESTARTING])
    with pytest.raises(CrowdedError, match="the 1 CPUs that are left are all held") as caught:
        step(1, 0, states=[ALIVE, ALIVE])
    assert caught.value.room == 1


def test_actors_that_were_let_go_and_hold_all_cpus_stop_the_pipeline(
    step: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"CPU": 0.25}
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("ray.available_resources", lambda: free)
    step(1, 0, states=[])
    monkeypatch.setattr(stall, "CROWDED_S", -1)
    # What is written has room, or actors are coming.
    step(1, 0, states=[])
    free.clear()
    step(1, 0, states=[], pending=1)
    with pytest.raises(CrowdedError, match="are all held by actors") as caught:
        step(1, 0, states=[])
    assert caught.value.room == 1


@pytest.mark.parametrize(
    ("cpus", "actors", "cpus_per_actor", "room"),
    [(4, 6, 0.5, None), (4, 7, 0.5, None), (4, 8, 0.5, 7), (0.5, 1, 0.5, None), (1, 40, 0, None)],
)
def test_what_is_a_crowd(cpus: float, actors: int, cpus_per_actor: float, room: int | None) -> None:
    if room is None:
        refuse_crowd(cpus, actors, cpus_per_actor)
        return
    with pytest.raises(CrowdedError) as caught:
        refuse_crowd(cpus, actors, cpus_per_actor)
    assert caught.value.room == room
