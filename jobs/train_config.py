"""The flags of `train`."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from jobs.config import ENDPOINT_HELP, ConfigError, check, option
from segmodel.settings import ARCHITECTURES, Architecture, MaskTargets, Precision


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on packed shards, distributed; run again with the same output to go on."""

    train: str | list[str] = option(
        "what to train on, one or more: packed sets (`segjobs pack`), data sets and versions of `segjobs label`"
    )
    output: str = option("folder or prefix of checkpoints, curves, and the bundle at the end")
    train_weights: list[float] | None = option(
        "the share of each of --train that an epoch has, drawn anew in each: 1 0.5 halves the second; all of "
        "all if left out",
        None,
    )
    val: str | None = option("packed set whose mask AP chooses the best checkpoint", None)
    model: str | None = option("bundle to start from; else random weights of --arch", None)
    arch: Architecture | None = option(
        f"without --model: one of {', '.join(ARCHITECTURES)}; small if left out", None
    )
    workers: int | str = option(
        "training processes: N, or MIN..MAX to go on with what there is; one for each GPU, or 1, if "
        "left out",
        0,
    )
    device: Literal["auto", "cpu", "gpu"] = option(
        "auto takes GPUs where there are some now; say gpu where a cluster adds them when asked",
        "auto",
    )
    epochs: int = option("passes over the training set", 12)
    batch_size: int = option("images of each worker at a time", 2)
    accumulate: int = option("batches of each worker in one step", 1)
    optimizer: Literal["sgd", "adamw"] = option("sgd has momentum", "sgd")
    learning_rate: float = option(
        "at its peak for 16 images in a step; scaled linearly to the images of all workers", 0.02
    )
    momentum: float = option("of sgd", 0.9)
    weight_decay: float = option("of weights; biases and normalisation have none", 1e-4)
    warmup_epochs: float = option("over which the learning rate rises", 0.5)
    schedule: Literal["cosine", "step"] = option("how the learning rate falls", "cosine")
    clip_norm: float = option("longest gradient; 0 for no limit", 10.0)
    ema_decay: float = option("of the average of the weights; 0 for none", 0.999)
    precision: Precision = option(
        "auto is bf16 on GPUs and on CPUs that have it (AVX512-BF16), else fp32; fp16 is for GPUs without bf16",
        "auto",
    )
    norm: Literal["auto", "train", "sync", "frozen"] = option(
        "batch statistics; auto freezes those of --model, and trains those of random weights (over all GPUs: sync)",
        "auto",
    )
    freeze_stages: int = option("stages of the backbone, from the image on, that stay", 0)
    proposals_per_image: int = option("that class, box and mask heads learn from", 512)
    mask_targets: MaskTargets = option(
        "what masks learn: torchvision's way, or pasted, which makes up for the half pixel that pasting "
        "a mask adds at each side, and pays where objects are small",
        "torchvision",
    )
    min_size: int | None = option("shorter side of the network's input; else the model's", None)
    max_size: int | None = option("longer side, at most; else the model's", None)
    crop_size: int | None = option("train on square crops of so many pixels", None)
    scale_min: float = option("images are scaled by a random factor, at least this", 1.0)
    scale_max: float = option("and at most this", 1.0)
    flip: Literal["none", "horizontal", "both"] = option("mirror at random", "horizontal")
    rotate: bool = option("turn by 90 degrees at random", False)  # noqa: FBT003
    colour: float = option("strength of random colour changes, 0 to 1", 0.0)
    copy_paste: float = option("share of images that get instances of another one", 0.0)
    eval_every: int = option("epochs between two evaluations on --val", 1)
    checkpoint_every: int = option("steps between two checkpoints, at most", 500)
    seed: int = option("of weights, order and augmentation", 0)
    score_threshold: float = option("of the bundle", 0.05)
    max_detections: int = option("of the bundle", 100)
    max_failures: int = option("lost workers or nodes until the run gives up", 8)
    address: str | None = option(
        "Ray cluster to use; RAY_ADDRESS, then a local Ray, if left out", None
    )
    endpoint_url: str | None = option(ENDPOINT_HELP, None)

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "accumulate",
            "proposals_per_image",
            "eval_every",
            "checkpoint_every",
            "max_detections",
        ):
            check(name, getattr(self, name), lambda v: v >= 1, "1 or more")
        for name in ("min_size", "max_size", "crop_size"):
            check(name, getattr(self, name), lambda v: v >= 32, "32 or more")
        for name in ("momentum", "ema_decay"):
            check(name, getattr(self, name), lambda v: 0 <= v < 1, "0 or more and less than 1")
        for name in ("colour", "copy_paste", "score_threshold"):
            check(name, getattr(self, name), lambda v: 0 <= v <= 1, "from 0 to 1")
        for name in ("weight_decay", "warmup_epochs", "clip_norm", "max_failures", "seed"):
            check(name, getattr(self, name), lambda v: v >= 0, "0 or more")
        for name in ("learning_rate", "weight_decay", "warmup_epochs", "clip_norm", "scale_max"):
            check(name, getattr(self, name), math.isfinite, "a finite number")
        check("learning_rate", self.learning_rate, lambda v: v > 0, "more than 0")
        check("freeze_stages", self.freeze_stages, lambda v: 0 <= v <= 5, "from 0 to 5")
        self._refuse_bad_weights()
        self._refuse_what_does_not_go_together()
        _ = self.worker_range

    @property
    def train_sets(self) -> list[str]:
        """What to train on."""
        return [self.train] if isinstance(self.train, str) else list(self.train)

    def _refuse_bad_weights(self) -> None:
        sets, weights = self.train_sets, self.train_weights
        if weights is None:
            return
        if len(weights) != len(sets):
            raise ConfigError(
                f"--train-weights has {len(weights)} numbers, and --train {len(sets)} sets: give one for each"
            )
        for weight in weights:
            check("train_weights", weight, lambda v: 0 < v <= 1, "more than 0 and at most 1")

    def _refuse_what_does_not_go_together(self) -> None:
        if not 0 < self.scale_min <= self.scale_max:
            raise ConfigError(
                f"--scale-min ({self.scale_min}) must be more than 0, and at most --scale-max "
                f"({self.scale_max})"
            )
        if self.model is not None and self.arch is not None:
            raise ConfigError("--model brings its architecture: leave --arch out")
        if self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"--warmup-epochs ({self.warmup_epochs:g}) is more than --epochs ({self.epochs}): the learning "
                "rate would never reach its peak"
            )
        if self.copy_paste and self.batch_size == 1:
            raise ConfigError(
                "--copy-paste takes instances from other images of a batch: --batch-size must be 2 or more"
            )

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """The fewest and the most workers; None where it is left to the cluster."""
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(self.workers))
        if found is not None:
            least, most = int(found[1]), int(found[2] or found[1])
            if 1 <= least <= most:
                return least, most
            if most == 0:
                return None
        raise ConfigError(f"--workers must be N or MIN..MAX, such as 2 or 1..4, not {self.workers}")
