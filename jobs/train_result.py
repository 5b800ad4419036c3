"""What a training leaves: the bundle of the best checkpoint, its card, curves, and the marks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tensorboardX import SummaryWriter

from jobs import checkpoints, write
from jobs.checkpoints import Checkpoint, Point
from jobs.console import duration, facts
from jobs.store import Store
from jobs.train_config import TrainConfig
from jobs.train_task import Task
from jobs.train_worker import CURVES
from jobs.weights import save_bundle
from segmodel.bundle import Bundle

HISTORY, BUNDLE, TENSORBOARD = "history.json", "bundle", "tensorboard"
# What a card says in other words, or what is nobody's business who gets the model.
_PLACES = frozenset({"train", "val", "model", "output", "address", "endpoint_url"})


def finish(
    config: TrainConfig, output: Store, task: Task, last: Checkpoint, seconds: float
) -> None:
    """Write the bundle of the best checkpoint, history, TensorBoard files, manifest and success mark.

    Args:
        config: As it was asked for.
        output: Of the training.
        task: What was trained.
        last: The checkpoint at the end.
        seconds: That this run took.
    """
    best, scored = _best(output, last)
    trained = _bundle(config, task, best, scored)
    uri = f"{config.output.rstrip('/')}/{BUNDLE}"
    save_bundle(uri, trained, config.endpoint_url)
    output.put(HISTORY, json.dumps(last.history, indent=1).encode())
    _put_tensorboard(output, last.history)
    manifest = {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": last.steps,
        "bundle_of_step": best.steps,
        "model_digest": trained.digest,
        "scores": trained.metrics.get("validation", {}),
        "config": asdict(config),
        "seconds_of_this_run": round(seconds, 1),
        "versions": {p: version(p) for p in ("segjobs", "ray", "torch", "torchvision")},
    }
    write.put_marks(output, manifest)
    _show_summary(output, uri, trained, best, last, seconds)


def _best(output: Store, last: Checkpoint) -> tuple[Checkpoint, Mapping[str, Any]]:
    """Return the best checkpoint that is still there, and its scores."""
    if last.best is None:
        return last, {}
    step = last.best["step"]
    if step == last.steps:
        return last, last.best
    if checkpoints.is_there(output, step):
        return checkpoints.load(output, checkpoints.path_of(step)), last.best
    of_last = (p for p in last.history if p["step"] == last.steps and "loss" not in p)
    return last, next(of_last, {})


def _bundle(config: TrainConfig, task: Task, best: Checkpoint, scored: Mapping[str, Any]) -> Bundle:
    scores = {name: round(value, 4) for name, value in scored.items() if "_A" in name}
    part = "average/" if config.ema_decay else "model/"
    return replace(
        task.bundle,
        weights={
            name.removeprefix(part): tensor
            for name, tensor in best.tensors.items()
            if name.startswith(part)
        },
        provenance={
            "trained by": "segjobs train",
            "started from": config.model or f"random weights, seed {config.seed}",
            "first digest": task.bundle.digest[:12],
            "what was known of them": dict(task.bundle.provenance),
            "training set": f"{', '.join(config.train_sets)}: {task.train.num_rows} images, digest {task.train.digest[:12]}",
            "validation set": task.val
            and f"{config.val}: {task.val.num_rows} images, digest {task.val.digest[:12]}",
            "step": best.steps,
            "settings": _settings(config, task, best.history),
        },
        metrics={"validation": scores} if scores else {},
        digest="",
    )


def _settings(config: TrainConfig, task: Task, history: Sequence[Point]) -> dict[str, Any]:
    """Return what the weights were trained with; instead of `auto` and of nothing, what it came to."""
    network, each = task.bundle.settings, config.accumulate * config.batch_size
    numbers = sorted({point["workers"] for point in history if "workers" in point})
    asked = {name: value for name, value in asdict(config).items() if name not in _PLACES}
    return asked | {
        "arch": network.arch,
        "min_size": network.min_size,
        "max_size": network.max_size,
        "norm": task.recipe.norm,
        "workers": " or ".join(f"{n} ({n * each} images in a step)" for n in numbers),
    }


def _put_tensorboard(output: Store, history: Sequence[Point]) -> None:
    """Write the history as one file of TensorBoard events, in place of an older one."""
    for found in list(output.list_objects(TENSORBOARD)):
        output.delete(found.path)
    with TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for point in history:
                for name, value in point.items():
                    if name not in ("step", "epoch"):
                        group = "validation" if "_A" in name else "training"
                        writer.add_scalar(f"{group}/{name}", value, point["step"])
        for file in Path(folder).iterdir():
            output.put(f"{TENSORBOARD}/{file.name}", file.read_bytes())


def _show_summary(
    output: Store, uri: str, trained: Bundle, best: Checkpoint, last: Checkpoint, seconds: float
) -> None:
    rows = [("steps", f"{last.steps}, this run took {duration(seconds)}")]
    scores: Mapping[str, float] = trained.metrics.get("validation", {})
    if scores:
        named = ", ".join(
            f"{name.replace('_', ' ')} {scores[name]:.3f}"
            for name in ("mask_AP", "mask_AP50", "box_AP", "box_AP50")
            if name in scores
        )
        rows.append(("best", f"step {best.steps}: {named}"))
    rows += [("curves", output.url(CURVES)), ("bundle", f"{uri} ({trained.digest[:12]})")]
    facts("Done", rows)
