"""Which Ray a verb uses, and what its errors look like."""

import pytest
import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

from jobs import layout
from jobs.cluster import ClusterError, Node, connect, plain_errors, reason, resources
from jobs.config import ConfigError, PredictConfig
from jobs.layout import lay_out, places
from jobs.store import StorageError

pytestmark = pytest.mark.ray


def test_the_ray_of_this_process_is_used(ray_local: None) -> None:
    assert connect(None) is False
    assert resources() == (2.0, 0.0)


def test_a_named_cluster_may_grow(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert connect(ray.get_runtime_context().gcs_address) is True
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert connect(None) is True


def test_errors_of_tasks_come_as_themselves(ray_local: None) -> None:
    @ray.remote(num_cpus=0.1)
    def task(error: Exception) -> None:
        raise error

    with pytest.raises(StorageError, match="the bucket is gone") as caught, plain_errors():
        ray.get(task.remote(StorageError("the bucket is gone")))
    assert type(caught.value) is StorageError
    with pytest.raises(ray.exceptions.RayTaskError), plain_errors():
        ray.get(task.remote(AssertionError("ours")))


def test_errors_that_an_actor_passes_on_come_as_themselves(ray_local: None) -> None:
    @ray.remote(num_cpus=0.1)
    def task() -> None:
        raise StorageError("the bucket is gone")

    @ray.remote(num_cpus=0.1)
    def between() -> None:
        ray.get(task.remote())

    with pytest.raises(StorageError, match="the bucket is gone") as caught, plain_errors():
        ray.get(between.remote())
    assert type(caught.value) is StorageError


def config(**more: object) -> PredictConfig:
    return PredictConfig(input="i", output="o", model="m", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "actors", "threads"),
    [
        ({}, (2, 2), 1),
        ({"max_actors": 1}, (1, 1), 2),
        ({"min_actors": 1}, (1, 2), 1),
        ({"max_actors": 9}, (2, 3), 1),
    ],
)
def test_cpu_pools_leave_room_for_readers(
    ray_local: None, more: dict[str, int], actors: tuple[int, int], threads: int
) -> None:
    pool = lay_out(config(**more), may_grow=False)
    assert (pool.min_actors, pool.max_actors) == actors
    assert pool.gpus_per_actor == 0
    assert pool.threads == max(1, threads)


def test_actors_that_do_not_fit_are_refused_unless_the_cluster_may_grow(ray_local: None) -> None:
    asked = config(gpus_per_actor=0.5, min_actors=2, max_actors=8)
    with pytest.raises(ConfigError, match="0 GPUs, room for 0"):
        lay_out(asked, may_grow=False)
    pool = lay_out(asked, may_grow=True)
    assert (pool.min_actors, pool.max_actors, pool.gpus_per_actor) == (2, 8, 0.5)
    assert pool.initial_actors == 2
    assert lay_out(config(max_actors=2, min_actors=1), may_grow=False).initial_actors == 1
    with pytest.raises(ConfigError, match="--initial-actors 3 must lie between"):
        lay_out(config(initial_actors=3, max_actors=2), may_grow=False)
    with pytest.raises(ConfigError, match="room for 3"):
        lay_out(config(min_actors=4), may_grow=False)


def test_a_pool_on_nodes_that_are_still_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped clusters have a head that does no work, and workers only when somebody wants them."""
    monkeypatch.setattr(layout, "resources", lambda: (0.0, 0.0))
    pool = lay_out(config(gpus_per_actor=1, min_actors=1, max_actors=8), may_grow=True)
    assert (pool.min_actors, pool.max_actors, pool.threads) == (1, 8, None)
    there = {"head": Node(cpus=0, gpus=0)}
    monkeypatch.setattr(layout, "nodes", lambda: there)
    assert set(places(pool).values()) == {0, 8}
    there |= {f"worker {n}": Node(cpus=12, gpus=1) for n in range(8)}
    assert places(pool) == {"read": 96, "decode": 96, "network": 8, "encode": 96, "write": 96}
    on_cpus = lay_out(config(max_actors=4), may_grow=True)
    assert (on_cpus.gpus_per_actor, on_cpus.threads) == (0, None)
    assert on_cpus.threads_on(there["worker 0"]) == 3


@pytest.mark.parametrize(
    ("more", "node", "threads"),
    [
        ({"gpus_per_actor": 1}, Node(cpus=12, gpus=1), 12),
        ({"gpus_per_actor": 1}, Node(cpus=16, gpus=4), 4),
        ({"gpus_per_actor": 0.5}, Node(cpus=12, gpus=1), 6),
        ({"gpus_per_actor": 2}, Node(cpus=32, gpus=8), 8),
        ({"gpus_per_actor": 1, "max_actors": 1}, Node(cpus=8, gpus=8), 8),
        ({"gpus_per_actor": 1}, Node(cpus=192, gpus=8), 16),
        ({"gpus_per_actor": 1}, Node(cpus=1, gpus=4), 1),
    ],
)
def test_an_actor_has_its_share_of_its_node(
    more: dict[str, float], node: Node, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "resources", lambda: (0.0, 0.0))
    pool = lay_out(config(**{"max_actors": 64, **more}), may_grow=True)
    assert pool.threads_on(node) == threads


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OutOfMemoryError("Task was killed due to the node running low on memory."),
            "out of memory",
        ),
        (
            RayActorError(error_msg="killed due to the node running low on memory. Details"),
            "out of memory",
        ),
        (NodeDiedError("The node is gone"), "its node was lost"),
        (RayActorError(error_msg="The actor died because its node has died."), "its node was lost"),
        (RayActorError(error_msg="Worker exits with error code 2 (OOM killer, SIGSEGV)"), "died"),
        (WorkerCrashedError(), "the process died"),
        (OutOfDiskError(), "the disk of a node is full"),
    ],
)
def test_what_ray_lost_in_few_words(error: RayError, words: str) -> None:
    assert words in reason(error)
    assert "\n" not in reason(error)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OutOfDiskError(),
            "the disk of a node is full where Ray puts what does not fit its memory",
        ),
        (RayActorError(error_msg="The actor died"), "the process died. Run the same command again"),
    ],
)
def test_what_ray_lost_is_an_error_of_the_cluster(error: RayError, words: str) -> None:
    with pytest.raises(ClusterError, match=words), plain_errors():
        raise error
