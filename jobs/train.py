"""`segjobs train --train URI --val URI --output URI`: packed shards to a model bundle.

Input: sets that `pack --annotations` made, and a bundle to start from or an architecture. Output:
`checkpoints/`, `curves.png`, `tensorboard/`, `history.json`, at the end `bundle/`, `_manifest.json`
and `_SUCCESS`. Run the same command again to go on. Throughput on named hardware stands in the README.
"""

import time
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs import checkpoints, feed, processor, train_result, train_task, train_worker, write
from jobs.board import Board, watched
from jobs.cluster import connect, resources
from jobs.config import ConfigError
from jobs.console import TrainingProgress, console, duration, facts
from jobs.process_group import NodeAddresses
from jobs.storage import arrow_location, open_store
from jobs.train_config import TrainConfig
from jobs.train_task import Task
from jobs.train_worker import Job
from segmodel.training import TrainingError

RAY_FOLDER = "_ray"
# Workers wait for the slowest one's share of an evaluation.
TIMEOUT_S = 3600
# glibc gives freed tensors back to the system and asks for them again: an fp32 step of 1.9 s took 1.6 s
# without that, on a core of an AMD EPYC that others shared; a bf16 step was as long as before.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


def run(config: TrainConfig) -> int:
    """Train or go on, and make the bundle; return the exit code."""
    output = open_store(config.output, config.endpoint_url)
    may_grow = connect(config.address)
    workers, gpus = _lay_out(config, may_grow=may_grow)
    config = train_task.settled(config, output, gpus=gpus)
    task = train_task.make(config, gpus=gpus)
    _refuse_no_step(config, task, workers[1])
    train_task.freeze(output, config, task)
    if output.info(write.SUCCESS) is not None:
        console.print(f"{config.output} is finished: nothing to do.")
        return 0
    _show_plan(config, task, workers, checkpoints.last(output), gpus=gpus)
    started = time.time()
    job = Job(
        bundle=ray.put(task.bundle),
        recipe=task.recipe,
        augmentation=task.augmentation,
        train=task.train,
        val=task.val,
        output=output,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        board=_board(),
    )
    _fit(config, job, workers, gpus=gpus)
    path = checkpoints.last(output)
    assert path is not None
    train_result.finish(config, output, task, checkpoints.load(output, path), time.time() - started)
    return 0


def _refuse_no_step(config: TrainConfig, task: Task, workers: int) -> None:
    """Refuse to train less than one step.

    Raises:
        ConfigError: There are too few images for one.
    """
    order = feed.make_order(task.train, config.batch_size, config.seed)
    if order.start(config.epochs) < workers * config.accumulate:
        raise ConfigError(
            f"{task.train.num_rows} images in {config.epochs} epochs make no step of {workers} workers with "
            f"{config.accumulate} x {config.batch_size} images each: lower --batch-size, --accumulate or "
            "--workers"
        )


def _board() -> Any:
    """Start the board where the driver is: on another node it could be lost without it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()


def _lay_out(config: TrainConfig, *, may_grow: bool) -> tuple[tuple[int, int], bool]:
    """Return the fewest and most workers, and whether each has a GPU.

    Args:
        config: As it was asked for.
        may_grow: Whether nodes may be added.

    Raises:
        ConfigError: They do not fit.
    """
    cpus, gpus = resources()
    if config.device == "cpu":
        gpus = 0
    least, most = config.worker_range or (max(1, int(gpus)),) * 2
    if may_grow:
        # Nodes with GPUs may be there only when somebody wants them.
        return (least, most), gpus > 0 or config.device == "gpu"
    if config.device == "gpu" and not gpus:
        raise ConfigError(
            "--device gpu: this Ray has no GPU. Name a cluster with some by --address, or use --device cpu"
        )
    room = int((cpus - feed.min_cpus(least)) / feed.WORKER_CPUS)
    if gpus:
        room = min(room, int(gpus))
    if least > room:
        raise ConfigError(
            f"{least} workers do not fit: this Ray has {cpus:g} CPUs and {gpus:g} GPUs, room for "
            f"{room}. Lower --workers, or name a larger cluster by --address"
        )
    return (least, min(most, room)), gpus > 0


def _fit(config: TrainConfig, job: Job, workers: tuple[int, int], *, gpus: bool) -> None:
    """Run the workers to the end.

    Raises:
        TrainingError: Data or settings stopped them, or too many were lost.
    """
    filesystem, path = arrow_location(config.output, config.endpoint_url)
    trainer = TorchTrainer(
        train_worker.run,
        train_loop_config={"job": job},
        torch_config=NodeAddresses(timeout_s=TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers[0] if workers[0] == workers[1] else workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": feed.WORKER_CPUS, **({"GPU": 1} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            # Ray's own state, of no use to a later run: ours lies in checkpoints.
            name=f"run-{time.time_ns()}",
            storage_path=f"{path}/{RAY_FOLDER}",
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    failed: Exception | None = None
    with (
        TrainingProgress(config.epochs) as progress,
        watched(job.board, progress.show, partial(_say_what_it_waits_for, workers[0], gpus=gpus)),
    ):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            failed = error
    # What Ray keeps of a run that is over helps nobody.
    filesystem.delete_dir_contents(f"{path}/{RAY_FOLDER}", missing_dir_ok=True)
    message = ray.get(job.board.failure.remote())
    if message is not None:
        raise TrainingError(message)
    if failed is not None:
        raise TrainingError(
            f"training stopped: {failed}. Run the same command again to go on from the last checkpoint."
        ) from failed


def _say_what_it_waits_for(least: int, quiet_s: float, *, gpus: bool) -> None:
    cpus_there, gpus_there = resources()
    room = int(gpus_there if gpus else cpus_there / feed.WORKER_CPUS)
    console.print(
        f"Nothing from the workers for {duration(quiet_s)}: "
        + (
            f"the cluster has room for {room} of the {least} that are wanted at least, and training goes on "
            "when nodes are added."
            if room < least
            else "they are being started, evaluate, or wait for data."
        )
    )


def _show_plan(
    config: TrainConfig, task: Task, workers: tuple[int, int], at: str | None, *, gpus: bool
) -> None:
    least, most = workers
    train, val, settings = task.train, task.val, task.bundle.settings
    skipped = f" ({train.num_skipped} in error are left out)" if train.num_skipped else ""
    facts(
        "Training" if at is None else "Training, going on",
        [
            ("train on", f"{train.num_rows} images{skipped}, {len(train.categories)} categories"),
            *(("note", note) for note in train.notes),
            ("evaluate on", "nothing" if val is None else f"{val.num_rows} images"),
            ("start from", task.origin if at is None else at),
            (
                "network",
                f"{settings.arch}, {settings.min_size} to {settings.max_size} pixels",
            ),
            ("workers", f"{least}" if least == most else f"{least} to {most}"),
            ("arithmetic", processor.in_words(config.precision, "fp32", gpus=gpus)),
            ("epochs", f"{config.epochs}, {config.batch_size} images of each worker at a time"),
        ],
    )
