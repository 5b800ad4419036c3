"""One chunk, image by image: each in a call of its own to an actor that may die of it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from jobs.actor import Model, Pool, Predict
from jobs.cluster import MEMORY_WAITS_S, ClusterError, lacked_memory, lost_node, reason
from jobs.encode import RAW, prediction
from jobs.envelope import unseal
from jobs.read import Source
from jobs.source import READ_CPUS, Work, read_sealed
from jobs.store import Store
from segmodel.schema import Category

# Processes that an image may end before its row says so, and reads of a chunk.
TRIES = 2
READ_TRIES = 3
# Processes that may be lost while they start, and nodes while they work on a chunk.
STARTS = 3
NODES = 10
# How soon a thread sees that the job was stopped.
POLL_S = 1.0

Row = dict[str, Any]


class LostError(Exception):
    """The process that worked on an image is gone; `kind` is that of the error, or `node`."""

    def __init__(self, why: str, kind: str) -> None:
        super().__init__(why)
        self.kind = kind


class Alone:
    """An actor that segments images, each in a call of its own.

    Not as a stream: what a process has yielded just before it dies may be lost, and the image before the
    one that ended it would be blamed.
    """

    def __init__(self, model: Model, pool: Pool, categories: Mapping[int, Category]) -> None:
        self._predict, self._categories = Predict(model, pool), categories

    def try_out(self) -> None:
        """Load the model and run it: what fails here is not an image's fault."""
        self._predict.try_out()

    def row(self, block: pa.Table, number: int) -> Row:
        """Return the table's row of one image of a sealed chunk of `read.IMAGES`."""
        (image,) = unseal(block).table.slice(number, 1).to_pylist()
        error, data = image.pop("error"), image.pop("data")
        raw = {"error": error} if error is not None else self._predict.one(data)
        return prediction(dict.fromkeys(RAW.names) | raw | image, self._categories)


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """How chunks are done image by image.

    Attributes:
        source: Where they are read.
        output: Where they are written.
        model: What runs.
        pool: What each actor reserves, and how long an image may take.
        cpus: What an actor without a GPU reserves.
        footer: For the chunks' objects.
    """

    source: Source
    output: Store
    model: Model
    pool: Pool
    cpus: float
    footer: Mapping[str, str]


def _read(
    item: Work, source: Source, turns: "Turns"
) -> tuple[dict[str, Any], "ray.ObjectRef[pa.Table]"]:
    """Read a chunk in a process of its own; return what is known of it, and the sealed chunk.

    Raises:
        ClusterError: The process dies each time.
    """
    # Tried again here: on some clusters Ray would do so for ever where memory is short.
    task = ray.remote(num_cpus=READ_CPUS, num_returns=2, max_retries=0)(_read_parts)
    why = ""
    for number in range(READ_TRIES):
        head, block = task.remote(item, source)
        turns.wait(head, None)
        try:
            return ray.get(head), block
        except RayTaskError:
            raise
        except RayError as error:
            with suppress(RayError):
                # The same error, of which Ray would complain that nobody looked at it.
                ray.get(block)
            why = reason(error)
            if lacked_memory(error):
                turns.pause(MEMORY_WAITS_S[number])
    chunk = item.chunk
    last = chunk.start + chunk.num_images - 1
    raise ClusterError(
        f"chunk {chunk.chunk_id} ({chunk.shard or chunk.list_path}, images {chunk.start} to {last}) "
        f"cannot be read: {why}, {READ_TRIES} times"
    )


def _read_parts(item: Work, source: Source) -> tuple[dict[str, Any], pa.Table]:
    block = read_sealed(item, source)
    sealed = unseal(block)
    head = {
        "names": sealed.table.select(["image_id", "shard", "key"]).to_pylist(),
        "readable": [n for n, error in enumerate(sealed.table["error"]) if not error.is_valid],
        "seconds": sealed.seconds,
        "retries": sealed.retries,
        "traffic": sealed.traffic,
    }
    return head, block


class Turns:
    """Lets threads work beside one another, or one of them alone; ends them all when `stop` is set."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._changed = threading.Condition()
        self._beside, self._alone = 0, False

    def wait(self, awaited: "ray.ObjectRef[Any]", limit_s: float | None) -> bool:
        """Wait for an object; return False where it did not come in time.

        Raises:
            CancelledError: The job was stopped.
        """
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while not self.stop.is_set():
            ready, _ = ray.wait([awaited], timeout=POLL_S, fetch_local=False)
            if ready:
                return True
            if deadline is not None and time.monotonic() > deadline:
                return False
        raise CancelledError

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            CancelledError: The job was stopped.
        """
        if self.stop.wait(seconds):
            raise CancelledError

    @contextmanager
    def beside(self, give_way: Callable[[], None]) -> Iterator[None]:
        """Work beside the others; `give_way` is called before another is waited for."""
        with self._changed:
            if self._alone:
                # What works alone may need our place in the cluster to start.
                give_way()
            self._until(lambda: not self._alone)
            self._beside += 1
        try:
            yield
        finally:
            with self._changed:
                self._beside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work when no other does, and keep them from it."""
        with self._changed:
            self._until(lambda: not self._alone)
            self._alone = True
        try:
            with self._changed:
                self._until(lambda: not self._beside)
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    def _until(self, may_go_on: Callable[[], bool]) -> None:
        while not self._changed.wait_for(may_go_on, POLL_S):
            if self.stop.is_set():
                raise CancelledError


class Supervisor:
    """Has the images of one chunk done, each at last, whatever processes that takes."""

    def __init__(self, item: Work, isolation: Isolation, turns: Turns) -> None:
        """Read the chunk.

        Raises:
            ClusterError: It cannot be read.
        """
        self._item, self._isolation, self._turns = item, isolation, turns
        self._chunk_id = item.chunk.chunk_id
        self._actor: Any = None
        self._lost_nodes = 0
        self.head, self._block = _read(item, isolation.source, turns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_actor()

    def rows(self) -> Iterator[Row]:
        """Yield a row for each image, in their order.

        Raises:
            ClusterError: No actor can be started, or nodes are lost again and again.
        """
        for number, names in enumerate(self.head["names"]):
            try:
                yield self.row(number)
            except LostError as error:
                raw = {"error": f"{error.kind}: {error}"}
                categories = self._isolation.model.categories
                yield prediction(dict.fromkeys(RAW.names) | raw | names, categories)

    def row(self, number: int) -> Row:
        """Return the row of an image.

        Raises:
            LostError: It ends or stops each process that works on it.
            ClusterError: No actor can be started, or nodes are lost again and again.
        """
        lost: Counter[str] = Counter()
        while True:
            beside = self._turns.beside(self._end_actor)
            try:
                with self._turns.alone() if lost["memory"] else beside:
                    return self._ask(number)
            except LostError as error:
                self._end_actor()
                if error.kind == "node":
                    self._after_lost_node(error)
                    continue
                lost[error.kind] += 1
                if error.kind == "memory" and lost["memory"] <= len(MEMORY_WAITS_S):
                    self._turns.pause(MEMORY_WAITS_S[lost["memory"] - 1])
                elif error.kind == "memory":
                    times = f"{lost['memory']} times, with nothing else of this job at work"
                    raise LostError(f"{error}, {times}", error.kind) from error
                elif lost.total() - lost["memory"] == TRIES:
                    raise LostError(f"{error}, {TRIES} times", error.kind) from error

    def _after_lost_node(self, error: LostError) -> None:
        self._lost_nodes += 1
        if self._lost_nodes == NODES:
            raise ClusterError(
                f"chunk {self._chunk_id} lost {NODES} nodes that worked on it"
            ) from error
        # What was read may have been there.
        _, self._block = _read(self._item, self._isolation.source, self._turns)

    def _ask(self, number: int) -> Row:
        """Have an image done by the actor, a new one where there is none.

        Raises:
            LostError: The actor died or hung, or raised what no image is known for.
        """
        self._actor = self._actor or self._start()
        limit_s = self._isolation.pool.image_timeout_s
        row = self._actor.row.remote(self._block, number)
        if not self._turns.wait(row, limit_s):
            raise LostError(f"no result after {limit_s:g} s", "hung")
        try:
            found: Row = ray.get(row)
        except RayTaskError as error:
            # The model was tried out before: this is the image's.
            why = f"{type(error.cause).__name__}: {error.cause}"
            raise LostError(" ".join(why.split()), "failed") from error
        except RayError as error:
            kind = "node" if lost_node(error) else "crashed"
            raise LostError(reason(error), "memory" if lacked_memory(error) else kind) from error
        return found

    def _start(self) -> Any:
        """Return an actor that holds the model and has run it once.

        Raises:
            ClusterError: None can be started.
        """
        isolation = self._isolation
        model, pool = isolation.model, isolation.pool
        share = pool.gpus_per_actor
        remote = ray.remote(num_gpus=share) if share else ray.remote(num_cpus=isolation.cpus)
        why = ""
        for number in range(STARTS):
            actor = remote(Alone).remote(model, pool, model.categories)
            tried = actor.try_out.remote()
            try:
                self._turns.wait(tried, None)
                ray.get(tried)
            except BaseException as error:
                ray.kill(actor)
                if not isinstance(error, RayError) or isinstance(error, RayTaskError):
                    raise
                why = reason(error)
                if lacked_memory(error):
                    self._turns.pause(MEMORY_WAITS_S[number])
            else:
                return actor
        raise ClusterError(
            f"chunk {self._chunk_id}: the model cannot be run, before it has seen any image of it ({why}, "
            f"{STARTS} times)"
        )

    def _end_actor(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
