"""What the pipeline lost, image by image: an image that ends its process costs its own row and no other."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from jobs import stall
from jobs.actor import Model, Pool, Predict
from jobs.cluster import ClusterError, plain_errors, reason
from jobs.encode import RAW, Receipt, prediction
from jobs.envelope import unseal
from jobs.read import Source
from jobs.source import READ_CPUS, Work, read_sealed
from jobs.store import Store
from jobs.write import put_chunk, replace_rows
from segmodel.schema import PREDICTIONS, Category

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
    """The process that worked on an image is gone."""

    def __init__(self, why: str, *, kind: str = "crashed", blame: bool = True) -> None:
        super().__init__(why)
        self.kind, self.blame = kind, blame


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


def run(work: Sequence[Work], isolation: Isolation) -> Iterator[Receipt]:
    """Do the work, several chunks at a time, and yield a receipt for each chunk that was written.

    Raises:
        ClusterError: Chunks could not be done; the others were.
    """
    stop = threading.Event()
    threads = ThreadPoolExecutor(min(isolation.pool.max_actors, len(work)))
    failures: list[str] = []
    try:
        under_way = [threads.submit(_chunk, item, isolation, stop) for item in work]
        for done in as_completed(under_way):
            try:
                yield done.result()
            except ClusterError as error:
                failures.append(str(error))
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)
    if failures:
        raise ClusterError(
            f"{len(failures)} chunks could not be done. {'; '.join(failures[:5])}. "
            "Run the same command again to try them again"
        )


def _chunk(item: Work, isolation: Isolation, stop: threading.Event) -> Receipt:
    """Read a chunk, segment its images one by one, write it."""
    started = time.perf_counter()
    chunk_id, output = item.chunk.chunk_id, isolation.output
    rows: list[Row] = []
    stall.seen.alone[chunk_id] = 0
    try:
        with plain_errors():
            head, block = _read(item, isolation.source, stop)
            for row in _Supervisor(isolation, chunk_id, head["names"], block, stop).rows():
                rows.append(row)
                stall.seen.alone[chunk_id] = len(rows)
    finally:
        stall.seen.alone.pop(chunk_id, None)
    table = pa.Table.from_pylist(rows, schema=PREDICTIONS)
    if item.positions is not None:
        table = replace_rows(output, chunk_id, table, item.positions)
    return Receipt(
        chunk_id=chunk_id,
        rows=len(rows),
        counts=put_chunk(output, chunk_id, table, isolation.footer),
        seconds={**head["seconds"], "alone": time.perf_counter() - started},
        # The driver's own are counted where they happen.
        retries=head["retries"],
    )


def _read(
    item: Work, source: Source, stop: threading.Event
) -> tuple[dict[str, Any], "ray.ObjectRef[pa.Table]"]:
    """Read a chunk in a process of its own; return names, times and retries, and the sealed chunk.

    Raises:
        ClusterError: The process dies each time.
    """
    task = ray.remote(num_cpus=READ_CPUS, num_returns=2, max_retries=READ_TRIES - 1)(_read_parts)
    head, block = task.remote(item, source)
    _wait(head, None, stop)
    try:
        return ray.get(head), block
    except RayTaskError:
        raise
    except RayError as error:
        with contextlib.suppress(RayError):
            # The same error, of which Ray would complain that nobody looked at it.
            ray.get(block)
        chunk = item.chunk
        last = chunk.start + chunk.num_images - 1
        raise ClusterError(
            f"chunk {chunk.chunk_id} ({chunk.shard or chunk.list_path}, images {chunk.start} to {last}) "
            f"cannot be read: {reason(error)}, {READ_TRIES} times"
        ) from error


def _read_parts(item: Work, source: Source) -> tuple[dict[str, Any], pa.Table]:
    block = read_sealed(item, source)
    sealed = unseal(block)
    head = {
        "names": sealed.table.select(["image_id", "shard", "key"]).to_pylist(),
        "seconds": sealed.seconds,
        "retries": sealed.retries,
    }
    return head, block


def _wait(awaited: "ray.ObjectRef[Any]", limit_s: float | None, stop: threading.Event) -> bool:
    """Wait for an object; return False where it did not come in time.

    Raises:
        CancelledError: The job was stopped.
    """
    deadline = None if limit_s is None else time.monotonic() + limit_s
    while not stop.is_set():
        ready, _ = ray.wait([awaited], timeout=POLL_S, fetch_local=False)
        if ready:
            return True
        if deadline is not None and time.monotonic() > deadline:
            return False
    raise CancelledError


class _Supervisor:
    """Has the images of one chunk done, each at last, whatever processes that takes."""

    def __init__(
        self,
        isolation: Isolation,
        chunk_id: str,
        names: Sequence[Row],
        block: "ray.ObjectRef[pa.Table]",
        stop: threading.Event,
    ) -> None:
        self._isolation, self._chunk_id = isolation, chunk_id
        self._names, self._block, self._stop = names, block, stop

    def rows(self) -> Iterator[Row]:
        """Yield a row for each image, in their order.

        Raises:
            ClusterError: No actor can be started, or nodes are lost again and again.
        """
        done = deaths = nodes = 0
        while done < len(self._names):
            actor = self._start()
            try:
                while done < len(self._names):
                    yield self._row(actor, done)
                    done, deaths = done + 1, 0
            except LostError as error:
                deaths += error.blame
                nodes += not error.blame
                if deaths == TRIES:
                    yield self._row_of_loss(done, error)
                    done, deaths = done + 1, 0
                if nodes == NODES:
                    raise ClusterError(
                        f"chunk {self._chunk_id} lost {nodes} nodes that worked on it"
                    ) from error
            finally:
                ray.kill(actor)

    def _start(self) -> Any:
        """Return an actor that holds the model and has run it once."""
        isolation = self._isolation
        model, pool = isolation.model, isolation.pool
        share = pool.gpus_per_actor
        remote = ray.remote(num_gpus=share) if share else ray.remote(num_cpus=isolation.cpus)
        why = ""
        for _ in range(STARTS):
            actor = remote(Alone).remote(model, pool, model.categories)
            tried = actor.try_out.remote()
            _wait(tried, None, self._stop)
            try:
                ray.get(tried)
            except RayTaskError:
                raise
            except RayError as error:
                why = reason(error)
            else:
                return actor
        raise ClusterError(
            f"chunk {self._chunk_id}: the model cannot be run, before it has seen any image of it ({why}, "
            f"{STARTS} times)"
        )

    def _row(self, actor: Any, number: int) -> Row:
        """Return the row of an image.

        Raises:
            LostError: The actor died or hung, or raised what no image is known for.
        """
        limit_s = self._isolation.pool.image_timeout_s
        row = actor.row.remote(self._block, number)
        if not _wait(row, limit_s, self._stop):
            raise LostError(f"no result after {limit_s:g} s", kind="hung")
        try:
            found: Row = ray.get(row)
        except RayTaskError as error:
            # The model was tried out before: this is the image's.
            why = f"{type(error.cause).__name__}: {error.cause}"
            raise LostError(" ".join(why.split()), kind="failed") from error
        except RayError as error:
            why = reason(error)
            raise LostError(why, blame="node was lost" not in why) from error
        return found

    def _row_of_loss(self, number: int, error: LostError) -> Row:
        raw = {"error": f"{error.kind}: {error}, {TRIES} times"}
        names = self._names[number]
        return prediction(dict.fromkeys(RAW.names) | raw | names, self._isolation.model.categories)
