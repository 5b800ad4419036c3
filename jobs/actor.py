"""The actor that holds the model: decodes in threads beside the network, hands over small arrays."""

import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from jobs.cluster import Node, own_node
from jobs.encode import RAW, raw_row
from jobs.envelope import Envelope, PredictError, chunk_id_of, failed, seal, unseal
from jobs.metrics import Metrics
from jobs.watchdog import Watchdog
from segmodel.allocator import keep_freed_memory
from segmodel.bundle import Bundle
from segmodel.images import ImageError, Picture, decode_reduced
from segmodel.inference import Predictor
from segmodel.schema import Category, Detections
from segmodel.settings import Decode, InferencePrecision, network_size

# Decoded images that wait for the network, for each decoding thread.
DECODED_AHEAD = 2
# What no image takes that is worth having; on two CPUs, an image of 89 megapixels takes 20 s.
IMAGE_TIMEOUT_S = 300.0
# Its sides, scaled, are no multiples of 32, as those of most photos: kernels differ in that.
HARMLESS = np.zeros((32, 45, 3), np.uint8)
# Threads of an actor that sees its node when it starts, at most: each holds decoded images. By arithmetic 16 decode 480
# photos of 12 megapixels in a second (33 ms each, the README's figure), as many as a GPU is hoped to predict.
MOST_THREADS = 16
# What `ru_maxrss` counts in.
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How the actors are laid out.

    Attributes:
        min_actors: The pool never has fewer.
        max_actors: Nor more.
        initial_actors: With how many it starts.
        gpus_per_actor: A share of one GPU, or several; 0 on CPUs.
        threads: Of an actor, for decoding, and on a CPU for the network. Where None, its share of the node on
            which it starts: that may come long after the pool was laid out.
        batch_size: Images in a batch; the device's default where None.
        image_timeout_s: How long an image may take before its process is ended.
    """

    min_actors: int
    max_actors: int
    initial_actors: int
    gpus_per_actor: float
    threads: int | None
    batch_size: int | None
    image_timeout_s: float = IMAGE_TIMEOUT_S

    def threads_on(self, node: Node) -> int:
        """Return the threads of an actor on a node."""
        if self.threads is not None:
            return self.threads
        fit = node.gpus / self.gpus_per_actor if self.gpus_per_actor else self.max_actors
        actors = max(1.0, min(fit, self.max_actors))
        return max(1, min(MOST_THREADS, int(node.cpus / actors)))


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the actors run.

    Attributes:
        bundle: In Ray's object store, so that every node gets it without a shared disk.
        categories: By label.
        precision: Of the arithmetic.
        score_threshold: Detections below are dropped.
        max_detections: For each image.
        masks: False for boxes only.
        max_pixels: Larger images are refused.
        output: Of the job: the label of what it tells Prometheus.
        decode: Whether large JPEGs are decoded at a lower resolution.
        compiled: Whether the network is compiled.
    """

    bundle: "ray.ObjectRef[Bundle]"
    categories: Mapping[int, Category]
    precision: InferencePrecision
    score_threshold: float
    max_detections: int
    masks: bool
    max_pixels: int
    output: str = ""
    decode: Decode = "full"
    compiled: bool = False


class Predict:
    """Segments sealed chunks; several may be in it at once.

    The model is loaded with the first chunk. What goes wrong then goes wrong with a chunk: it has a
    message, and a bounded number of tries, where Ray starts an actor anew for ever.
    """

    def __init__(self, model: Model, pool: Pool) -> None:
        keep_freed_memory()
        threads = pool.threads_on(own_node())
        if not pool.gpus_per_actor:
            torch.set_num_threads(threads)
        self.model, self.pool = model, pool
        self.window = threads * DECODED_AHEAD
        self.decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.watchdog = Watchdog(pool.image_timeout_s)
        self._loading = threading.Lock()
        self._metrics = Metrics(model.output)

    @cached_property
    def _predictor(self) -> Predictor:
        model, pool = self.model, self.pool
        predictor = Predictor(
            ray.get(model.bundle),
            "cuda" if pool.gpus_per_actor else "cpu",
            model.precision,
            score_threshold=model.score_threshold,
            max_detections=model.max_detections,
            batch_size=pool.batch_size,
            masks=model.masks,
            compiled=model.compiled,
        )
        if not pool.gpus_per_actor:
            # What numba makes of the CPU's kernels, or finds on disk, is part of loading, not of an image.
            predictor.predict([HARMLESS])
        predictor.on_batch = partial(self._metrics.observe, "segjobs_batch_images")
        return predictor

    @property
    def predictor(self) -> Predictor:
        """The model; the first who asks waits until it is loaded."""
        with self._loading:
            return self._predictor

    def __call__(self, block: pa.Table) -> pa.Table:
        """Take a sealed chunk of `read.IMAGES`, return the same chunk as a table of `encode.RAW`.

        What is raised is returned in the chunk's place.
        """
        try:
            return self._predict(block)
        except Exception as error:  # noqa: BLE001 - the driver raises it (`envelope`)
            return failed(chunk_id_of(block), error)

    def one(self, data: bytes) -> dict[str, Any]:
        """Return the columns of `encode.RAW` that say what is in one image."""
        try:
            picture = self._decode(data)
        except ImageError as error:
            return raw_row(None, str(error))
        errors: dict[int, str] = {}
        found = dict(self.predictor.stream([(0, picture)], errors.__setitem__))
        return raw_row(found.get(0), errors.get(0))

    def _decode(self, data: bytes) -> Picture:
        """Decode an image file, at the resolution that the network needs where that was asked for."""
        settings = self.predictor.settings if self.model.decode == "reduced" else None
        needed = None if settings is None else partial(network_size, settings)
        return decode_reduced(data, self.model.max_pixels, needed)

    def _timed_decode(self, data: bytes) -> tuple[Picture, float]:
        """Return a picture and the seconds that it took."""
        started = time.perf_counter()
        return self._decode(data), time.perf_counter() - started

    def try_out(self) -> None:
        """Load the model and run it once, on a picture that harms nobody."""
        self.predictor.predict([HARMLESS])

    def _predict(self, block: pa.Table) -> pa.Table:
        started = time.perf_counter()
        sealed = unseal(block)
        predictor = self.predictor
        errors: dict[int, str] = {}
        found: dict[int, Detections] = {}
        seconds = {**sealed.seconds, "decode": 0.0}
        in_network = predictor.busy.seconds
        try:
            with self.watchdog.watch() as progress:
                decoded = self._decoded(sealed.table, errors, seconds, progress)
                for number, detections in predictor.stream(decoded, errors.__setitem__):
                    found[number] = detections
                    progress()
        except Exception as error:
            raise PredictError(
                f"chunk {sealed.chunk_id}: {type(error).__name__}: {error}"
            ) from error
        seconds["network"] = predictor.busy.seconds - in_network
        seconds["predict"] = time.perf_counter() - started
        self._tell_memory()
        names = sealed.table.select(["image_id", "shard", "key"]).to_pylist()
        rows = [raw_row(found.get(n), errors.get(n)) | name for n, name in enumerate(names)]
        return seal(
            Envelope(
                chunk_id=sealed.chunk_id,
                positions=sealed.positions,
                seconds=seconds,
                retries=sealed.retries,
                traffic=sealed.traffic,
                table=pa.Table.from_pylist(rows, schema=RAW),
            )
        )

    def _tell_memory(self) -> None:
        if not self.pool.gpus_per_actor:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES
            self._metrics.set("segjobs_memory_bytes", peak, device="cpu", kind="peak")
            return
        for kind, read in (
            ("allocated", torch.cuda.memory_allocated),
            ("reserved", torch.cuda.memory_reserved),
            ("peak", torch.cuda.max_memory_allocated),
        ):
            self._metrics.set("segjobs_memory_bytes", read(), device="cuda", kind=kind)

    def _decoded(
        self,
        images: pa.Table,
        errors: dict[int, str],
        seconds: dict[str, float],
        progress: Callable[[], None],
    ) -> Iterator[tuple[int, Picture]]:
        """Yield number and picture of the images that can be decoded; note the errors of the others."""
        under_way: deque[tuple[int, Future[tuple[Picture, float]]]] = deque()

        def next_decoded() -> Iterator[tuple[int, Picture]]:
            number, future = under_way.popleft()
            try:
                picture, took = future.result()
                seconds["decode"] += took
                yield number, picture
            except ImageError as error:
                errors[number] = str(error)
            progress()

        for number, (data, error) in enumerate(zip(images["data"], images["error"], strict=True)):
            if error.is_valid:
                errors[number] = error.as_py()
                continue
            future = self.decoders.submit(self._timed_decode, data.as_buffer().to_pybytes())
            under_way.append((number, future))
            if len(under_way) == self.window:
                yield from next_decoded()
        while under_way:
            yield from next_decoded()
