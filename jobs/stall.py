"""What a job waits for: seen in Ray Data's scheduler, and said when no chunk was finished for long."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray
from ray._private import state
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from typing_extensions import override

from jobs.cluster import ClusterError, log_folder
from jobs.console import console, duration
from jobs.source import READ_CPUS

# Chunks in a row that lost their process before it is asked why: a model or a machine that cannot work would
# lose all of them, as would images of which each chunk has one that ends its process. Many chunks are under
# way at once, and a bad image takes those beside it along.
MOST_LOST = 20
LOST_FOR_EACH_PLACE = 2
LOOK_EVERY_S = 1.0
# Looks in a row that find no actor before none is there: what Ray knows of one may be late.
DEAD_LOOKS = 10
# Starts of actors anew, in a row as well. Ray starts one that dies in its constructor again for ever, and Ray
# Data does not see that. The controller is asked for it when nothing was finished for some time.
MOST_RESTARTS = 10
RESTARTS_EVERY_S = 30.0
# Without a chunk for so long, it is asked whether the actors of lost nodes fill those that are left.
CROWDED_S = 30.0
ALIVE, RESTARTING, DEAD = ActorTableData.ALIVE, ActorTableData.RESTARTING, ActorTableData.DEAD


@dataclass
class Seen:
    """Where the chunks are.

    Attributes:
        under_way: Chunks in each stage of the pipeline: read, predict, write.
        actors: Actors by state: alive, pending, restarting.
        alone: Images that are done one by one: the number of each in its chunk, by chunk id.
    """

    under_way: dict[str, int] = field(default_factory=dict)
    actors: dict[str, int] = field(default_factory=dict)
    alone: dict[str, int] = field(default_factory=dict)


class StreakError(ClusterError):
    """Nothing gets done any more: the images or the machine are to blame."""


class CrowdedError(ClusterError):
    """The actors hold all CPUs: nothing can be read or written. `room` is how many of them have room."""

    def __init__(self, cpus: float, room: int) -> None:
        super().__init__(f"the {cpus:g} CPUs that are left are all held by actors")
        self.room = room


# One pipeline runs in a process at a time. Ray makes the observer itself, so it cannot be handed this.
seen = Seen()


class Observer(ExecutionCallback):
    """Looks at the pipeline while it runs, and stops one that cannot get anywhere."""

    def __init__(self) -> None:
        self._written = self._lost_before = self._dead_looks = 0
        self._looked = 0.0
        self._counted = self._moved = time.monotonic()
        self._restarts_before: int | None = None

    @override
    def on_execution_step(self, executor: Any) -> None:
        """Look, about once a second.

        Raises:
            StreakError: Processes die and nothing gets done.
            CrowdedError: The actors hold all CPUs.
            ClusterError: No actor is left.
        """
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        _, read, predict, write = executor._topology
        (pool,) = predict.get_autoscaling_actor_pools()
        stages = {"read": read, "predict": predict, "write": write}
        seen.under_way = {name: stage.num_active_tasks() for name, stage in stages.items()}
        states = _states(pool)
        pending = pool.num_pending_actors()
        seen.actors = {
            "alive": states.count(ALIVE),
            "pending": pending,
            "restarting": states.count(RESTARTING),
        }
        written = write.metrics.num_tasks_finished - write.metrics.num_tasks_failed
        lost = sum(stage.metrics.num_tasks_failed for stage in stages.values())
        if written > self._written:
            self._written, self._lost_before = written, lost
            self._counted = self._moved = time.monotonic()
            self._restarts_before = None
        places = pool.max_size() * pool.max_tasks_in_flight_per_actor()
        most = max(MOST_LOST, LOST_FOR_EACH_PLACE * places)
        all_dead = not pending and states.count(DEAD) == len(states) > 0
        self._dead_looks = self._dead_looks + 1 if all_dead else 0
        refuse_to_go_on(lost - self._lost_before, most, all_dead=self._dead_looks > DEAD_LOOKS)
        if time.monotonic() - self._counted > RESTARTS_EVERY_S:
            self._counted = time.monotonic()
            self._refuse_restarts(max(MOST_RESTARTS, 2 * pool.max_size()))
        if time.monotonic() - self._moved > CROWDED_S:
            cpus = ray.cluster_resources().get("CPU", 0.0)
            holding = states.count(ALIVE)
            began = predict.metrics.num_tasks_finished > 0
            if began and not states and not pending and _nothing_is_free():
                # What the pipeline has let go of, when its last image was predicted, may live on and hold its CPUs
                # until the pipeline is collected: seen where a machine fell silent.
                holding = pool.max_size()
            refuse_crowd(cpus, holding, pool.per_actor_resource_usage().cpu)

    def _refuse_restarts(self, most: int) -> None:
        restarts = _restarts()
        if self._restarts_before is None:
            self._restarts_before = restarts
        number = restarts - self._restarts_before
        if number > most:
            raise StreakError(_hopeless(f"actors were started anew {number} times"))

    @override
    def after_execution_succeeds(self, executor: Any) -> None:
        """Forget what was seen."""
        seen.under_way, seen.actors = {}, {}

    @override
    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Forget what was seen."""
        seen.under_way, seen.actors = {}, {}


def observe(context: DataContext) -> None:
    """Let the data sets of a context be looked at; they must be the pipeline."""
    context.custom_execution_callback_classes.append(Observer)


def refuse_to_go_on(lost: int, most: int, *, all_dead: bool) -> None:
    """Stop a job that cannot get anywhere.

    Args:
        lost: Chunks in a row whose process died.
        most: How many those may be.
        all_dead: No actor is there, and none is coming.

    Raises:
        StreakError: Its images may be to blame.
        ClusterError: They cannot be.
    """
    if all_dead:
        raise ClusterError(_hopeless("all actors are gone for good"))
    if lost > most:
        raise StreakError(_hopeless(f"{lost} chunks in a row lost theirs"))


def refuse_crowd(cpus: float, actors: int, cpus_per_actor: float) -> None:
    """Stop a pipeline whose actors leave no room for readers and writers.

    Args:
        cpus: That the cluster has.
        actors: That are there.
        cpus_per_actor: That each reserves.

    Raises:
        CrowdedError: They leave none.
    """
    # One reader and one writer at least, both of which ask for as much.
    left_for_actors = cpus - 2 * READ_CPUS
    if actors > 1 and actors * cpus_per_actor > left_for_actors:
        raise CrowdedError(cpus, max(1, int(left_for_actors / cpus_per_actor)))


def _hopeless(what: str) -> str:
    return (
        f"the processes of the job die before anything gets done ({what}): too little memory or a "
        f"broken device are the usual reasons, and {log_folder()} on the nodes says more. "
        "Run the same command again to go on"
    )


def _nothing_is_free() -> bool:
    return bool(ray.available_resources().get("CPU", 0.0) < READ_CPUS)


def _restarts() -> int:
    """Return how often Ray has started actors of this job anew."""
    job = ray.get_runtime_context().get_job_id()
    actors = state.actors().values()
    return sum(int(actor["NumRestarts"]) for actor in actors if actor["JobID"] == job)


def _states(pool: Any) -> list[int | None]:
    """Return the state of each actor of a pool that was started, as Ray knows it; None is unknown.

    Ray Data's own counts go on calling an actor restarting that died for good while it restarted.
    """
    return [actor._get_local_state() for actor in pool._running_actors]


class StallWarning:
    """Says what the job waits for when it has not come further for some time, again and again."""

    def __init__(
        self, every_s: float, left: Callable[[], int], wanted: Mapping[str, float]
    ) -> None:
        """Make one.

        Args:
            every_s: Seconds without progress.
            left: Gives the images that are left.
            wanted: What an actor reserves, by Ray's names of resources.
        """
        self._every_s, self._left, self._wanted = every_s, left, wanted
        self._since = self._said = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall-warning", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def progress(self) -> None:
        """Say that the job has come further."""
        self._since = self._said = time.monotonic()

    def _run(self) -> None:
        while not self._over.wait(max(0.05, self._said + self._every_s - time.monotonic())):
            now = time.monotonic()
            if now - self._said < self._every_s:
                continue
            self._said = now
            totals, free = ray.cluster_resources(), ray.available_resources()
            console.print(
                f"No chunk was finished for {duration(now - self._since)}, {self._left()} images are "
                f"left. {in_words(seen, self._wanted, totals, free)}",
                markup=False,
            )


def in_words(
    seen: Seen, wanted: Mapping[str, float], totals: Mapping[str, float], free: Mapping[str, float]
) -> str:
    """Say what a job waits for.

    Args:
        seen: Where its chunks are.
        wanted: What an actor reserves, by Ray's names of resources.
        totals: What the cluster has.
        free: What of it is not reserved.
    """
    if seen.alone:
        # Other threads add to it and take from it.
        images = ", ".join(f"{number} of chunk {name}" for name, number in list(seen.alone.items()))
        parts = [f"Chunks that lost their process are done image by image, under way: {images}."]
    else:
        parts = []
    if seen.under_way:
        parts.append("Chunks under way: " + _counts(seen.under_way) + ".")
    if seen.actors:
        parts.append("Actors: " + _counts(seen.actors) + ".")
    names = sorted({"CPU", "GPU"} & (totals.keys() | wanted.keys()))
    has = ", ".join(f"{totals.get(n, 0):g} {n}s ({free.get(n, 0):g} free)" for n in names)
    wants = ", ".join(f"{number:g} {name}" for name, number in wanted.items())
    parts.append(f"An actor wants {wants}; the cluster has {has}.")
    if not (seen.actors.get("alive") or any(seen.alone.values())) and any(
        free.get(n, 0) < number for n, number in wanted.items()
    ):
        parts.append("It waits for room: for other jobs to end, or for nodes to be added.")
    return " ".join(parts)


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in numbers.items())
