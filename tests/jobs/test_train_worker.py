"""The training loop without a cluster: who waits for the feed looks for notices, what failure is final."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch.distributed as dist

from jobs import train_worker
from jobs.board import Board
from jobs.cluster import ClusterError
from jobs.store import ChangedError, DamagedError
from jobs.train_worker import _Training
from segmodel.order import Order
from segmodel.training import TrainingError

BATCH: tuple[list[Any], ...] = ([],)


class Waiting(_Training):
    """A lone worker at step 5 whose feed gives nothing before a checkpoint was saved so many times."""

    def __init__(self, saves_needed: int) -> None:
        self.rank, self.num_workers = 0, 1
        self.trainer: Any = SimpleNamespace(steps=5)
        self.saved_at = None
        self.feed_reserves = True
        self.look_at, self.save_again_at = 0.0, float("inf")
        self.notice = None
        self.nodes = ["here"]
        self.saved: list[float] = []
        self.posted: list[Any] = []
        self.saves_needed, self.fed = saves_needed, Event()

    def feed(self) -> Iterator[tuple[list[Any], ...]]:
        assert self.fed.wait(60)
        yield BATCH

    def next(self) -> Any:
        with ThreadPoolExecutor(1) as thread:
            try:
                return self._next(thread, self.feed())
            finally:
                self.fed.set()

    def _save(self) -> None:
        self.saved.append(time.time())
        if len(self.saved) == self.saves_needed:
            self.fed.set()

    def _post(self, entry: Any) -> None:
        self.posted.append(entry)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_worker, "LOOK_EVERY_S", 0.01)


Nodes = Callable[..., None]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """`cluster(cpus, deadline_ms)`: nodes with so many CPUs, and the notice that Ray Train gives."""

    def make(cpus: dict[str, float], notice: Any = None) -> None:
        nodes = [{"NodeID": n, "Alive": True, "Resources": {"CPU": c}} for n, c in cpus.items()]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray.train, "get_preemption_info", lambda: notice)

    return make


def notice(deadline_ms: float | None) -> Any:
    return ray.train.PreemptionInfo(deadline_ms=deadline_ms, preempted_node_to_ranks={"here": [0]})


def test_who_waits_for_the_feed_saves_at_a_notice_and_again_before_the_deadline(
    cluster: Nodes,
) -> None:
    deadline = time.time() + 0.5
    cluster({"here": 2}, notice(deadline * 1000))
    worker = Waiting(saves_needed=2)
    assert worker.next() is BATCH
    first, again = worker.saved
    assert first < again < deadline + 30
    assert worker.posted == [{"step": 5, "notice": True}]


def test_one_notice_without_a_deadline_leads_to_one_checkpoint(cluster: Nodes) -> None:
    cluster({"here": 2}, notice(None))
    worker = Waiting(saves_needed=1)
    assert worker.next() is BATCH
    assert [worker.next() for _ in range(20)] == [BATCH] * 20
    assert len(worker.saved) == 1


def test_a_notice_before_the_first_step_is_kept_for_later(cluster: Nodes) -> None:
    cluster({"here": 2}, notice(None))
    worker = Waiting(saves_needed=1)
    worker.trainer.steps = 0
    worker.fed.set()
    assert worker.next() is BATCH
    assert worker.saved == []
    worker.trainer.steps = 1
    worker.look_at = 0.0
    assert worker.next() is BATCH
    assert len(worker.saved) == 1


def test_a_feed_that_lost_its_nodes_is_started_anew(cluster: Nodes) -> None:
    cluster({"here": 1})
    worker = Waiting(saves_needed=2)
    with pytest.raises(ClusterError, match="no room for the tasks that feed"):
        worker.next()
    assert len(worker.saved) == 1


@pytest.mark.ray
@pytest.mark.parametrize(
    "error", [ValueError, TrainingError, DamagedError, ChangedError, FileNotFoundError]
)
def test_only_a_failure_of_a_group_that_stands_is_final(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception]
) -> None:
    def go() -> None:
        # A ValueError may be torch's, too.
        raise error("an image has no mask")

    monkeypatch.setattr(train_worker, "_Training", lambda _: SimpleNamespace(go=go))
    board = ray.remote(num_cpus=0)(Board).remote()
    job = SimpleNamespace(board=board)
    # Ray Train takes the process group away when it starts all workers anew.
    with pytest.raises(error, match="has no mask"):
        train_worker.run({"job": job})
    assert ray.get(board.failure.remote()) is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        with pytest.raises(error, match="has no mask"):
            train_worker.run({"job": job})
    finally:
        dist.destroy_process_group()
    assert ray.get(board.failure.remote()) == "an image has no mask"
    ray.kill(board)


class Evaluating(Waiting):
    """A worker at step 5 with a validation set; what it does is in `done`."""

    def __init__(
        self, history: list[Any], position: int = 5, epochs: int = 1, eval_every: int = 1
    ) -> None:
        super().__init__(saves_needed=0)
        self.history = history
        self.job: Any = SimpleNamespace(val="some set", eval_every=eval_every, checkpoint_every=100)
        self.order = Order(chunk_rows=(5,), batch_size=1, window_chunks=1, seed=0)
        self.position, self.stride, self.stop = position, 1, 5 * epochs
        self.done: list[str] = []

    def _micro_batches(self) -> Iterator[tuple[list[Any], ...]]:
        yield from [BATCH] * (self.stop - self.position)

    def _step(self, samples: Any) -> None:
        self.position += 1
        self.trainer.steps += 1
        self.history.append({"step": self.trainer.steps, "loss": 1.0})
        self.done.append("step")

    def _evaluate(self, val: Any) -> None:
        assert val == "some set"
        point = {"step": self.trainer.steps, "epoch": round(self._epoch(), 4), "mask_AP": 0.1}
        self.history.append(point)
        self.done.append("evaluate")

    def _save(self) -> None:
        self.saved_at = self.trainer.steps
        self.done.append("save")


@pytest.mark.parametrize(
    ("history", "evaluated"),
    [
        ([{"step": 4, "loss": 1.0}, {"step": 5, "epoch": 1.0, "mask_AP": 0.1}], False),
        ([{"step": 5, "loss": 1.0}], True),
        # Not every step is in the history.
        ([{"step": 3, "epoch": 0.6, "mask_AP": 0.1}], True),
    ],
)
def test_the_last_weights_are_evaluated_once(history: list[Any], *, evaluated: bool) -> None:
    worker = Evaluating(history)
    worker.go()
    assert worker.done == ["save", "evaluate", "save"] * evaluated


def test_an_evaluation_stands_between_two_checkpoints_so_that_its_loss_costs_no_step() -> None:
    worker = Evaluating([], position=3, epochs=2)
    worker.go()
    scored = ["save", "evaluate", "save"]
    assert worker.done == ["step"] * 2 + scored + ["step"] * 5 + scored


def test_an_evaluation_that_was_cut_off_is_made_good_when_the_training_goes_on() -> None:
    worker = Evaluating([{"step": 5, "loss": 1.0}], position=5, epochs=2)
    worker.saved_at = 5
    worker.go()
    assert worker.done[:3] == ["evaluate", "save", "step"]
    done = Evaluating([{"step": 5, "epoch": 1.0, "mask_AP": 0.1}], position=5, epochs=2)
    done.go()
    assert done.done[0] == "step"


def test_an_evaluation_is_made_good_with_another_number_of_workers_too() -> None:
    # Two workers had gone one micro-batch beyond the epoch's end; one goes on.
    worker = Evaluating([{"step": 5, "loss": 1.0}], position=6, epochs=3)
    worker.saved_at = 5
    worker.go()
    scored = ["save", "evaluate", "save"]
    assert worker.done == scored[1:] + ["step"] * 4 + scored + ["step"] * 5 + scored


def test_evaluations_are_as_many_epochs_apart_as_was_asked_for() -> None:
    worker = Evaluating([], position=0, epochs=5, eval_every=2)
    worker.trainer.steps = 0
    worker.go()
    assert [p["epoch"] for p in worker.history if "loss" not in p] == [2.0, 4.0, 5.0]
