"""The training loop, as it runs in each worker of Ray Train.

Everything it needs to go on lies in checkpoints in the output, so a worker, a node or the driver may
be lost at any time: what starts next goes on from the last one.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray import cloudpickle

from jobs import checkpoints, feed, training_set, validation
from jobs.board import Entry
from jobs.checkpoints import Checkpoint, Point
from jobs.cluster import ClusterError
from jobs.store import ChangedError, DamagedError, Store
from jobs.training_set import TrainingSet
from segmodel import plots
from segmodel.allocator import keep_freed_memory
from segmodel.augment import Augmentation
from segmodel.bundle import Bundle
from segmodel.targets import Sample
from segmodel.training import Recipe, Trainer, TrainingError

CURVES = "curves.png"
# Points of the loss in a training's history, at most twice as many: what a plot can show.
MOST_POINTS = 1000
# Between two looks for a notice that a node will be taken away. Clouds give notice 30 to 120 s ahead, and
# Ray Train asks for it every 5 s.
LOOK_EVERY_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the workers need. Can be pickled.

    Attributes:
        bundle: The weights to start with, in Ray's object store.
        recipe: How to train.
        augmentation: How samples are varied.
        train: What to train on.
        val: What to evaluate with, if anything.
        output: Where checkpoints and curves go.
        batch_size: Images of a worker at a time.
        eval_every: Epochs between evaluations.
        checkpoint_every: Steps between checkpoints.
        board: Actor of `board.Board`.
    """

    bundle: "ray.ObjectRef[Bundle]"
    recipe: Recipe
    augmentation: Augmentation
    train: TrainingSet
    val: TrainingSet | None
    output: Store
    batch_size: int
    eval_every: int
    checkpoint_every: int
    board: Any


def run(config: Mapping[str, Any]) -> None:
    """Train to the end; Ray Train calls it in each worker, again after a failure."""
    job: Job = config["job"]
    if ray.get(job.board.failure.remote()):
        return
    try:
        _Training(job).go()
    except (ValueError, TrainingError, DamagedError, ChangedError, FileNotFoundError) as error:
        # What data or settings did would happen again. But where Ray Train has taken the process group
        # away, since a node is lost or added, torch raises a ValueError, too.
        if dist.is_initialized():
            ray.get(job.board.fail.remote(str(error)))
        raise


class _Training:
    """One worker's part."""

    def __init__(self, job: Job) -> None:
        keep_freed_memory()
        self.job = job
        self.rank, self.num_workers = dist.get_rank(), dist.get_world_size()
        device = ray.train.torch.get_device()
        _refuse_precision(job.recipe.precision, device)
        self.nodes = self._gathered(ray.get_runtime_context().get_node_id())
        # Of a worker on a CPU, and for decoding.
        self.threads = self._threads()
        if device.type == "cpu":
            torch.set_num_threads(self.threads)
        self.bundle = ray.get(job.bundle)
        self.trainer = Trainer(self.bundle, job.recipe, device)
        self.order = feed.make_order(job.train, job.batch_size, job.recipe.seed)
        self.position = 0
        self.history: list[Point] = []
        self.best: Point | None = None
        self.saved_at: int | None = None
        self.feed_reserves = True
        self.look_at = 0.0
        self.notice: ray.train.PreemptionInfo | None = None
        self.save_again_at = math.inf
        self._go_on_from(self._agreed(checkpoints.last(job.output)))
        # Micro-batches in a step of all workers.
        self.stride = self.num_workers * job.recipe.accumulate
        whole_steps = (self.order.start(job.recipe.epochs) - self.position) // self.stride
        self.stop = self.position + whole_steps * self.stride
        steps = self.order.start(job.recipe.epochs) // self.stride
        self.log_every = max(1, steps // MOST_POINTS)

    def go(self) -> None:
        """Train, evaluate and save until nothing is left."""
        self._post({"workers": self.num_workers, "step": self.trainer.steps})
        if self.position and self._evaluation_is_due():
            # Went on from a checkpoint that was saved for an evaluation.
            self._evaluate_and_save()
        self.clock = time.monotonic()
        for samples in self._micro_batches():
            self._step(samples)
            if self._evaluation_is_due():
                self._evaluate_and_save()
                self.clock = time.monotonic()
            elif self.trainer.steps % self.job.checkpoint_every == 0:
                self._save()
        if self.job.val is None:
            self._renew_statistics()
            self._save()
        else:
            # Went on, with more workers, from a checkpoint behind which there is no whole step.
            self._evaluate_and_save()

    def _evaluate_and_save(self) -> None:
        """Evaluate, unless it is done.

        That may take longer than a notice leaves: the checkpoint ahead of it is why a node that is
        lost meanwhile costs the evaluation and no step.
        """
        assert self.job.val is not None
        steps = self.trainer.steps
        if any("loss" not in point and point["step"] == steps for point in self.history):
            return
        self._save_new()
        self._evaluate(self.job.val)
        self._save()

    def _go_on_from(self, path: str | None) -> None:
        if path is None:
            return
        found = checkpoints.load(self.job.output, path)
        self.trainer.load(found.tensors, found.plain)
        self.position, self.history = found.position, [*found.history]
        # Where somebody deleted a damaged checkpoint, the best one before it may be gone too.
        if found.best and checkpoints.is_there(self.job.output, found.best["step"]):
            self.best = found.best
        self.saved_at = found.steps

    def _micro_batches(self) -> Iterator[tuple[list[Sample], ...]]:
        """Yield what this worker trains on in each step."""
        # A thread waits for the feed, so that this one can look for notices meanwhile.
        thread = ThreadPoolExecutor(1)
        try:
            for steps in self._segments():
                while samples := self._next(thread, steps):
                    yield samples
        finally:
            # It may wait for what never comes, while this worker says that it failed.
            thread.shutdown(wait=False)

    def _segments(self) -> Iterator[Iterator[tuple[list[Sample], ...]]]:
        """Yield parts of what is left, each a stream of this worker's micro-batches step by step."""
        recipe = self._feed_recipe()
        for span in feed.segments(self.order, self.position, self.stop, self.stride):
            shares = None
            if self.rank == 0:
                self.feed_reserves = self._feed_has_room()
                shares = feed.split(
                    self.job.train,
                    self.order,
                    recipe,
                    span,
                    self.num_workers,
                    reserve=self.feed_reserves,
                )
            mine = self._agreed(shares)[self.rank]
            samples = (some for _, some in feed.batches(mine))
            yield zip(*[samples] * self.job.recipe.accumulate, strict=True)

    def _next(
        self, thread: ThreadPoolExecutor, steps: Iterator[tuple[list[Sample], ...]]
    ) -> tuple[list[Sample], ...] | None:
        """Return the micro-batches of the next step when all workers have theirs; None behind the last.

        Who waits looks for notices, too: on a node that will be taken away Ray starts no tasks, so the
        feed may end long before the node does.
        """
        coming: Future[tuple[list[Sample], ...] | None] = thread.submit(next, steps, None)
        waits = False
        while True:
            wait([coming], LOOK_EVERY_S)
            waits, looks, saves, starves = self._any(not coming.done(), *self._due(starving=waits))
            if looks:
                self._look_for_notice()
            if saves:
                self.save_again_at = math.inf
                self._save_new()
            if starves:
                self._save_new()
                raise ClusterError("lost nodes left no room for the tasks that feed the workers")
            if not waits:
                return coming.result()

    def _due(self, *, starving: bool) -> tuple[bool, bool, bool]:
        """Say whether to look for a notice, to save since a node goes soon, and to start anew.

        Rank 0 decides, since clocks differ.
        """
        if self.rank:
            return False, False, False
        starves = starving and self.feed_reserves and not self._feed_has_room()
        return time.monotonic() >= self.look_at, time.time() >= self.save_again_at, starves

    def _any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether a worker has it."""
        if self.num_workers == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32, device=self.trainer.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def _threads(self) -> int:
        """Return this worker's share of its node's CPUs."""
        own = ray.get_runtime_context().get_node_id()
        (cpus,) = (n["Resources"].get("CPU", 1) for n in ray.nodes() if n["NodeID"] == own)
        return max(1, int(cpus / self.nodes.count(own)))

    def _feed_has_room(self) -> bool:
        cpus = {
            node["NodeID"]: node["Resources"].get("CPU", 0.0)
            for node in ray.nodes()
            if node["Alive"]
        }
        reserved = Counter(self.nodes)
        free = (number - feed.WORKER_CPUS * reserved[node] for node, number in cpus.items())
        return feed.has_room(free, self.num_workers)

    def _feed_recipe(self) -> feed.Recipe:
        return feed.Recipe(
            labels={category.id: category.label for category in self.bundle.categories},
            augmentation=self.job.augmentation,
            seed=self.job.recipe.seed,
        )

    def _agreed(self, value: Any) -> Any:
        """Return what rank 0 has."""
        box = [cloudpickle.dumps(value) if self.rank == 0 else None]
        dist.broadcast_object_list(box)
        return cloudpickle.loads(box[0])

    def _gathered(self, value: Any) -> list[Any]:
        """Return what each worker has."""
        found: list[Any] = [None] * self.num_workers
        dist.all_gather_object(found, value)
        return found

    def _post(self, entry: Entry) -> None:
        """Let the driver show something."""
        if self.rank == 0:
            self.job.board.post.remote(entry)

    def _step(self, samples: tuple[list[Sample], ...]) -> None:
        found = self.trainer.step(samples, self._epoch())
        self.position += self.stride
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        point = {
            "step": self.trainer.steps,
            "epoch": round(self._epoch(), 4),
            **found,
            "workers": self.num_workers,
            "images_per_second": found["images"] / seconds,
        }
        if self.trainer.steps % self.log_every == 0:
            self.history.append(point)
        self._post({**point, "share": self.position / self.stop})

    def _epoch(self) -> float:
        """Return the epochs done so far, with their fraction."""
        epoch = self.order.epoch(self.position)
        first, behind = self.order.start(epoch), self.order.start(epoch + 1)
        return epoch + (self.position - first) / (behind - first)

    def _evaluation_is_due(self) -> bool:
        """Say whether epochs were finished since the last evaluation, with however many workers."""
        if self.job.val is None:
            return False
        if self.position == self.stop:
            return True
        evaluated = (int(point["epoch"]) for point in reversed(self.history) if "loss" not in point)
        last, now = next(evaluated, 0), self.order.epoch(self.position)
        return now // self.job.eval_every > last // self.job.eval_every

    def _evaluate(self, val: TrainingSet) -> None:
        """Evaluate the weights as they are now, each worker a part of the set."""
        self.trainer.share_statistics()
        self._renew_statistics()
        bundle = replace(self.bundle, weights=self.trainer.weights(), digest="")
        mine = training_set.rows(val.chunks, self.rank, self.num_workers)
        matches, *others = self._gathered(
            validation.matches(mine, bundle, self.trainer.device, self.threads)
        )
        for other in others:
            matches.merge(other)
        found = matches.summary()
        point = {
            "step": self.trainer.steps,
            "epoch": round(self._epoch(), 4),
            **validation.scores(found),
        }
        self.history.append(point)
        score = "mask_AP" if found.mask is not None else "box_AP"
        if self.best is None or point[score] > self.best[score]:
            self.best = point
        self._post(point)

    def _renew_statistics(self) -> None:
        job = self.job
        self.trainer.renew_statistics(
            feed.fixed_samples(
                job.train, self._feed_recipe(), job.batch_size, self.rank, self.num_workers
            )
        )

    def _look_for_notice(self) -> None:
        """Save when a node will be taken away, and once more shortly before that."""
        self.look_at = time.monotonic() + LOOK_EVERY_S
        notice = ray.train.get_preemption_info()
        if self.num_workers > 1:
            # They save together, and one may hear of it before another.
            notice = self._agreed(notice)
        if notice is None or notice == self.notice or not self.trainer.steps:
            return
        self.notice = notice
        started = time.time()
        self._save_new()
        self._post({"step": self.trainer.steps, "notice": True})
        if notice.deadline_ms is not None:
            took = time.time() - started
            self.save_again_at = notice.deadline_ms / 1000 - 2 * took - LOOK_EVERY_S

    def _save_new(self) -> None:
        """Save, unless there is nothing new."""
        if self.trainer.steps and self.saved_at != self.trainer.steps:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint, and the curves so far."""
        self.trainer.share_statistics()
        self.saved_at = self.trainer.steps
        if self.rank:
            return
        tensors, plain = self.trainer.state()
        checkpoint = Checkpoint(
            steps=self.trainer.steps,
            position=self.position,
            tensors=tensors,
            plain=plain,
            history=self.history,
            best=self.best,
        )
        checkpoints.save(self.job.output, checkpoint)
        self.job.output.put(CURVES, plots.curves(self.history))
        self._post({"step": self.trainer.steps, "saved": True})


def _refuse_precision(precision: str, device: torch.device) -> None:
    """Refuse bf16 on a GPU that would only imitate it.

    Raises:
        TrainingError: It would.
    """
    if precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise TrainingError(
            f"{torch.cuda.get_device_name(device)} has no bf16: say --precision fp16 or fp32, with another "
            "--output"
        )
