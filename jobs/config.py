"""One frozen, validated dataclass for each verb; a field is a flag, a key of the YAML file, and a help line.

`flags` makes command lines of them; what a value may be is checked here, when the dataclass is made.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from jobs.detect import Format
from jobs.redact import holds_credentials
from segmodel.images import MAX_PIXELS
from segmodel.settings import (
    ARCHITECTURES,
    Architecture,
    Decode,
    InferencePrecision,
)

ENDPOINT_HELP = (
    "S3-compatible store, for example http://127.0.0.1:9000; AWS_ENDPOINT_URL if left out"
)


class ConfigError(ValueError):
    """A value that cannot be; the message names the flag and what it may be."""


def option(help_: str, default: Any = MISSING, *, positional: bool = False) -> Any:
    """Declare a field that is a flag of the command line."""
    metadata = {"help": help_, "positional": positional}
    if default is MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Segment every image of the input and write one table row for each."""

    input: str = option("folder, prefix or single shard, image or manifest: a path or a URI")
    output: str = option("folder or prefix of the table; run again with the same one to go on")
    model: str = option("model bundle: a folder or prefix (make one by `segjobs init`)")
    format: Format = option("how the input is read; auto looks and says what it chose", "auto")
    score_threshold: float | None = option(
        "drop detections that score lower; else the bundle's", None
    )
    max_detections: int | None = option("detections for an image, at most; else the bundle's", None)
    precision: InferencePrecision = option(
        "arithmetic; fp32 is torchvision's to the bit; auto is fp32-fast on CPUs, which rounds "
        "otherwise, and fp32 on GPUs and of maskrcnn_resnet50_fpn_v2",
        "auto",
    )
    decode: Decode = option(
        "reduced: JPEGs at least twice as large as the network's input are scaled down while they are "
        "decoded, which is faster and shows the network other pixels",
        "full",
    )
    compile: bool = option(
        "have torch compile the network: faster, after a minute or more at each start of a copy; rounds otherwise, and "
        "takes a C++ compiler",
        False,  # noqa: FBT003
    )
    tasks: Literal["masks", "boxes"] = option("boxes leaves the masks out and is faster", "masks")
    batch_size: int | None = option(
        "images in a batch; 8 on a GPU and 1 on a CPU if left out", None
    )
    min_actors: int | None = option(
        "copies of the model, at least; as many as fit if left out", None
    )
    max_actors: int | None = option(
        "copies of the model, at most; as many as fit if left out", None
    )
    initial_actors: int | None = option(
        "copies of the model to start with; --min-actors if left out", None
    )
    gpus_per_actor: float | None = option(
        "GPUs of each copy, fractions too; 1 where there is a GPU, else 0", None
    )
    chunk_size: int = option("images in an output file, at most", 256)
    limit: int | None = option("plan only the first so many images", None)
    image_column: str | None = option("column of Parquet shards that holds the images", None)
    max_pixels: int = option("refuse larger images, before they are decoded", MAX_PIXELS)
    plan_only: bool = option("show the plan and what it takes, write nothing", False)  # noqa: FBT003
    calibrate: int | None = option(
        "with --plan-only: run so many images on one copy of the model, to tell time and GPU hours",
        None,
    )
    like: str | None = option(
        "with --plan-only: output of a finished job of the same model, whose rate is taken", None
    )
    images_per_second: float | None = option(
        "with --plan-only: the rate of one copy of the model, where it is known", None
    )
    price_per_gpu_hour: float | None = option("with --plan-only: to tell the cost", None)
    estimate_output: str | None = option(
        "with --plan-only: JSON file to write the estimate to, a path or a URI", None
    )
    frozen_plan: bool = option("go on although the input has changed since it was planned", False)  # noqa: FBT003
    retry_errors: bool = option("do the rows in error again, only them", False)  # noqa: FBT003
    image_timeout: float = option(
        "seconds without a result after which an image's process is ended and its row is an error",
        300.0,
    )
    stall_warning: float = option(
        "seconds without a finished chunk after which the job says what it waits for", 300.0
    )
    fail_on_error: bool = option("exit with 3 when rows are in error", False)  # noqa: FBT003
    address: str | None = option(
        "Ray cluster to use; RAY_ADDRESS, then a local Ray, if left out", None
    )
    endpoint_url: str | None = option(ENDPOINT_HELP, None)

    def __post_init__(self) -> None:
        check("score_threshold", self.score_threshold, lambda v: 0 <= v <= 1, "from 0 to 1")
        for name in (
            "max_detections",
            "batch_size",
            "min_actors",
            "max_actors",
            "initial_actors",
            "chunk_size",
            "limit",
        ):
            check(name, getattr(self, name), lambda v: v >= 1, "1 or more")
        check("max_pixels", self.max_pixels, lambda v: v >= 1, "1 or more")
        for name in ("image_timeout", "stall_warning"):
            check(name, getattr(self, name), lambda v: v > 0, "more than 0")
        check(
            "gpus_per_actor",
            self.gpus_per_actor,
            lambda v: 0 <= v < 1 or (v > 0 and float(v).is_integer()),
            "0, a fraction of 1, or a whole number",
        )
        check("calibrate", self.calibrate, lambda v: v >= 1, "1 or more")
        for name in ("images_per_second", "price_per_gpu_hour"):
            value = getattr(self, name)
            check(name, value, lambda v: 0 < v < math.inf, "a finite number of more than 0")
        self._refuse_estimates_without_plan()
        if self.min_actors and self.max_actors and self.min_actors > self.max_actors:
            raise ConfigError(
                f"--min-actors ({self.min_actors}) is more than --max-actors ({self.max_actors})"
            )

    def _refuse_estimates_without_plan(self) -> None:
        rates = ("calibrate", "like", "images_per_second")
        for name in (*rates, "price_per_gpu_hour", "estimate_output"):
            if getattr(self, name) is not None and not self.plan_only:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is of --plan-only alone: leave it out"
                )
        if sum(getattr(self, name) is not None for name in rates) > 1:
            raise ConfigError(
                "--calibrate, --like and --images-per-second exclude one another: measure the rate, take that of another "
                "job, or give it"
            )


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Say how far a job is: planned, done, failed, left, rate and time left."""

    output: str = option("the job's --output", positional=True)
    endpoint_url: str | None = option(ENDPOINT_HELP, None)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Make a model bundle from random, published or own weights."""

    arch: Architecture = option(f"one of {', '.join(ARCHITECTURES)}")
    weights: str = option(
        "random; coco or imagenet (torchvision's, downloaded once); or FILE.pth or FILE.safetensors"
    )
    output: str = option("folder or prefix of the bundle")
    categories: str | None = option(
        "JSON or YAML list of {id, name} or {id, name, label}, or a COCO file; COCO's 80 if left out "
        "with coco weights",
        None,
    )
    seed: int = option("of the random weights", 0)
    min_size: int | None = option("shorter side of the network's input in pixels", None)
    max_size: int | None = option("longer side, at most", None)
    norm_eps: float = option("of the backbone's normalisation, for weights from a file", 1e-5)
    score_threshold: float = option("the bundle's default", 0.05)
    max_detections: int = option("the bundle's default", 100)
    endpoint_url: str | None = option(ENDPOINT_HELP, None)

    def __post_init__(self) -> None:
        check("min_size", self.min_size, lambda v: v >= 32, "32 or more")
        check("max_size", self.max_size, lambda v: v >= 32, "32 or more")
        check("norm_eps", self.norm_eps, lambda v: v >= 0, "0 or more")
        check("score_threshold", self.score_threshold, lambda v: 0 <= v <= 1, "from 0 to 1")
        check("max_detections", self.max_detections, lambda v: v >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Pack images, with COCO annotations or the rows of a table, into Parquet shards to train on."""

    images: str = option("folder, prefix, shard or manifest of images")
    output: str = option("folder or prefix of the shards")
    annotations: str | None = option(
        "COCO instances file; images that it does not name are left out", None
    )
    predictions: str | None = option(
        "table of predictions or labels; images without a row are left out", None
    )
    score_threshold: float | None = option(
        "of --predictions: drop detections that score lower", None
    )
    format: Format = option("how the images are read", "auto")
    shard_size: int = option("images in a shard, at most", 1000)
    address: str | None = option(
        "Ray cluster to use; RAY_ADDRESS, then a local Ray, if left out", None
    )
    endpoint_url: str | None = option(ENDPOINT_HELP, None)

    def __post_init__(self) -> None:
        check("shard_size", self.shard_size, lambda v: v >= 1, "1 or more")
        check("score_threshold", self.score_threshold, lambda v: 0 <= v <= 1, "from 0 to 1")
        if self.annotations is not None and self.predictions is not None:
            raise ConfigError("--annotations and --predictions exclude one another: give one")
        if self.score_threshold is not None and self.predictions is None:
            raise ConfigError("--score-threshold needs --predictions: other rows have no scores")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare predictions with the truth: COCO's AP of boxes and masks, per category, and plots."""

    predictions: str = option("output of predict, or another folder of Parquet in the one schema")
    annotations: str = option("the truth: a COCO instances JSON, or a packed set")
    against: str | None = option(
        "another table, compared with the same truth, to say which of the two is better", None
    )
    output: str | None = option("folder or prefix for metrics.json and the plots", None)
    subset: bool = option("leave out predictions of images that the truth has not", False)  # noqa: FBT003
    score_threshold: float = option(
        "of the confusion matrix: detections that score lower do not count; AP takes all", 0.5
    )
    address: str | None = option(
        "Ray cluster to use; if left out RAY_ADDRESS or a local Ray, and none for small tables",
        None,
    )
    endpoint_url: str | None = option(ENDPOINT_HELP, None)

    def __post_init__(self) -> None:
        check("score_threshold", self.score_threshold, lambda v: 0 <= v <= 1, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Turn a table of masks into what the tools read that people label, train and evaluate with."""

    predictions: str = option("output of predict, or another folder of Parquet in the one schema")
    to: Literal["coco-results", "coco-instances", "labelstudio", "yolo-seg", "semantic-png"] = (
        option("what to make; the first three are one JSON file, the others a folder")
    )
    output: str = option("the JSON file, or the folder or prefix: a path or a URI")
    score_threshold: float | None = option("leave out detections that score lower", None)
    annotations: str | None = option(
        "of coco-results: COCO instances file whose image ids are taken; else images are numbered as "
        "in coco-instances",
        None,
    )
    subset: bool = option("leave out images that --annotations has not", False)  # noqa: FBT003
    image_prefix: str | None = option(
        "of labelstudio: what stands before shard and key in the images' URLs, such as "
        "s3://bucket/photos or /data/local-files/?d=photos",
        None,
    )
    images: str | None = option(
        "write the images too, to images/ in the folder or beside the JSON file: where they are, what the table "
        "was made of, or the version or packed set itself, which holds them",
        None,
    )
    overwrite: bool = option("replace what is at the output already", False)  # noqa: FBT003
    endpoint_url: str | None = option(ENDPOINT_HELP, None)

    def __post_init__(self) -> None:
        check("score_threshold", self.score_threshold, lambda v: 0 <= v <= 1, "from 0 to 1")
        if self.images is not None and self.to == "coco-results":
            raise ConfigError("--to coco-results names no image files: leave --images out")
        if self.annotations is not None and self.to != "coco-results":
            raise ConfigError("--annotations is of --to coco-results alone: leave it out")
        if self.subset and self.annotations is None:
            raise ConfigError("--subset needs --annotations, whose images it keeps: leave it out")
        if self.image_prefix is not None and self.to != "labelstudio":
            raise ConfigError("--image-prefix is of --to labelstudio alone: leave it out")
        if self.to == "labelstudio" and self.image_prefix is None:
            raise ConfigError(
                "--to labelstudio needs --image-prefix: where Label Studio finds the images, such as "
                "s3://bucket/photos"
            )
        if holds_credentials(self.image_prefix or ""):
            raise ConfigError(
                "--image-prefix holds a password or a signature, and would stand in every task: let "
                "Label Studio sign URLs by a storage connection of its own"
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make a page to look at: overlays, counts, scores, errors, and with the truth what is wrong."""

    predictions: str = option("output of predict, or another folder of Parquet in the one schema")
    images: str = option("what the table was made of: folder, prefix, shard or manifest")
    output: str = option("folder or prefix of the page (index.html) and its thumbnails")
    truth: str | None = option("a COCO instances JSON, or a packed set, to compare with", None)
    subset: bool = option("leave out predictions of images that the truth has not", False)  # noqa: FBT003
    score_threshold: float = option(
        "from which a detection counts as found, and is drawn at first; AP takes all", 0.5
    )
    examples: int = option("images of each group of the gallery, at most", 24)
    seed: int = option("of the images that are drawn at random", 0)
    max_pixels: int = option("larger images are not decoded", MAX_PIXELS)
    address: str | None = option(
        "Ray cluster for the comparison with the truth; if left out RAY_ADDRESS or a local Ray, and none "
        "for small tables",
        None,
    )
    endpoint_url: str | None = option(ENDPOINT_HELP, None)

    def __post_init__(self) -> None:
        check("score_threshold", self.score_threshold, lambda v: 0 <= v <= 1, "from 0 to 1")
        # More would not fit into the 20 MB that a page may have.
        check("examples", self.examples, lambda v: 1 <= v <= 24, "from 1 to 24")
        check("seed", self.seed, lambda v: v >= 0, "0 or more")
        check("max_pixels", self.max_pixels, lambda v: v >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Make synthetic shards, predict them, and show what came out: one machine, no network."""

    output: str = option("folder of everything the demo makes", "demo-output")
    scenes: int = option("synthetic images", 48)
    seed: int = option("of the scenes", 0)

    def __post_init__(self) -> None:
        check("scenes", self.scenes, lambda v: v >= 1, "1 or more")
        check("seed", self.seed, lambda v: v >= 0, "0 or more")


def check(name: str, value: Any, holds: Callable[[Any], bool], words: str) -> None:
    """Refuse a value that is not None and does not hold.

    Raises:
        ConfigError: It is one; the message names the flag, and says in `words` what it must be.
    """
    if value is not None and not holds(value):
        raise ConfigError(f"--{name.replace('_', '-')} must be {words}, not {value}")
