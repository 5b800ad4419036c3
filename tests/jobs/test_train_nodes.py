"""`segjobs train` on Ray clusters of several nodes: one is announced to go, one is lost in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from jobs import checkpoints, cluster
from jobs.storage import open_store
from segmodel.training import Recipe, learning_rate

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

# Batches of two are all full: a step's images say how many micro-batches it had. Enough epochs that a training of two
# workers is not done before the loss of a node takes effect.
NUM_ROWS, BATCH_SIZE, EPOCHS = 40, 2, 6
RECIPE = Recipe(epochs=EPOCHS, optimizer="adamw", learning_rate=0.004, warmup_epochs=0.2)
# More than there are steps: only a notice or the end leads to a checkpoint.
NEVER = 1000
DEADLINE_S = 400
# The command line, whose workers reserve a whole CPU each: a node of one has room for one.
MAIN = (
    "import sys; from jobs import feed; from jobs.__main__ import main; "
    "feed.WORKER_CPUS = 1; sys.exit(main())"
)
# Ray Train looks and gives up sooner than it would by itself.
ENVIRONMENT = {
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster with a head on which nothing runs but the drivers; this process does not connect to it."""
    # No other process is to take this cluster for the one it should connect to.
    monkeypatch.setattr("ray._private.utils.write_ray_address", lambda *_: None)
    made = Cluster()
    made.add_node(
        num_cpus=0, include_dashboard=False, _system_config=cluster.LOCAL["_system_config"]
    )
    yield made
    # `shutdown` would also forget the addresses of this process's own Ray.
    for node in [*made.worker_nodes, made.head_node]:
        made.remove_node(node, allow_graceful=False)


@pytest.fixture
def packed(tmp_path: Path, put_packed: Callable[..., list[dict[str, Any]]]) -> Path:
    put_packed(open_store(str(tmp_path / "packed")), NUM_ROWS)
    return tmp_path / "packed"


class Run:
    """The command line in a process of its own."""

    def __init__(
        self, nodes: Cluster, packed: Path, output: Path, workers: str, checkpoint_every: int
    ) -> None:
        self.output, self.log = output, output.with_suffix(".log")
        arguments = [
            *(sys.executable, "-c", MAIN, "train", "--train", packed, "--output", output),
            *("--workers", workers, "--batch-size", BATCH_SIZE, "--epochs", EPOCHS),
            *("--optimizer", RECIPE.optimizer, "--learning-rate", RECIPE.learning_rate),
            *("--warmup-epochs", RECIPE.warmup_epochs, "--checkpoint-every", checkpoint_every),
            *("--min-size", 64, "--max-size", 96, "--proposals-per-image", 64),
            *("--address", nodes.address),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(argument) for argument in arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )

    def wait_for(self, what: Callable[[], Any]) -> Any:
        """Wait until it is true, and return it."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := what()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        return found

    def wait(self) -> None:
        assert self.process.wait(DEADLINE_S) == 0, self.said()

    def said(self) -> str:
        return self.log.read_text()

    def last_step(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        newest = checkpoints.last(open_store(str(self.output)))
        return int(newest.split("-")[-1].split(".")[0]) if newest else 0


@pytest.fixture
def start(nodes: Cluster, packed: Path, tmp_path: Path) -> Iterator[Callable[[str, int], Run]]:
    started: list[Run] = []

    def make(workers: str, checkpoint_every: int) -> Run:
        started.append(Run(nodes, packed, tmp_path / "out", workers, checkpoint_every))
        return started[-1]

    yield make
    for run in started:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def announce_loss(nodes: Cluster, node: Any, seconds: float) -> None:
    """Give notice that a node will be taken away, as a cloud's agent does."""
    accepted, why_not = GcsClient(address=nodes.address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test",
        int((time.time() + seconds) * 1000),
    )
    assert accepted, why_not


def lose(node: Any) -> None:
    """Kill what makes a node; what runs on it goes with it."""
    (raylet,) = node.all_processes["raylet"]
    raylet.process.kill()


def steps_without_a_gap(output: Path) -> list[dict[str, Any]]:
    """The history's steps: every image once in each epoch, at the rate that belongs to it."""
    history = json.loads((output / "history.json").read_text())
    seen = 0
    for number, point in enumerate(history, start=1):
        assert point["step"] == number
        rate = learning_rate(RECIPE, seen / NUM_ROWS, round(point["images"]))
        assert point["learning_rate"] == pytest.approx(rate)
        seen += round(point["images"])
        assert point["epoch"] == pytest.approx(seen / NUM_ROWS, abs=1e-4)
    assert seen == EPOCHS * NUM_ROWS
    return history


def test_a_notice_leads_to_a_checkpoint_that_another_node_goes_on_from(
    nodes: Cluster, start: Callable[[str, int], Run]
) -> None:
    going = nodes.add_node(num_cpus=2)
    run = start("1", NEVER)
    # The first step is said at once.
    run.wait_for(lambda: "images/s" in run.said())
    assert run.last_step() == 0
    announce_loss(nodes, going, seconds=600)
    run.wait_for(lambda: "will be taken away" in run.said())
    step = run.last_step()
    assert 0 < step < EPOCHS * NUM_ROWS / BATCH_SIZE
    assert f"there is a checkpoint of step {step}" in run.said()
    lose(going)
    nodes.add_node(num_cpus=2)
    run.wait()
    assert f"1 worker at work, from step {step}" in run.said()
    assert (run.output / "bundle" / "model.safetensors").exists()
    steps_without_a_gap(run.output)


def test_an_elastic_training_goes_on_with_the_node_that_is_left(
    nodes: Cluster, start: Callable[[str, int], Run]
) -> None:
    # Room for one worker on each, and beside it for none of the tasks that feed it.
    nodes.add_node(num_cpus=1)
    lost = nodes.add_node(num_cpus=1)
    run = start("1..2", 3)
    step = run.wait_for(run.last_step)
    lose(lost)
    run.wait()
    assert "2 workers at work, from step 0" in run.said()
    images = [round(point["images"]) for point in steps_without_a_gap(run.output)]
    two = images.count(2 * BATCH_SIZE)
    assert step <= two < len(images), "the training was done before the node was lost: more epochs"
    assert images == [2 * BATCH_SIZE] * two + [BATCH_SIZE] * (len(images) - two)
    assert f"1 worker at work, from step {two}" in run.said()
    assert (run.output / "bundle" / "model.safetensors").exists()
