"""The flags of `label`."""

from dataclasses import dataclass

from jobs.config import ConfigError, check, option
from jobs.detect import Format
from segmodel.images import MAX_PIXELS
from segmodel.settings import InferencePrecision

_LABELS = ("input", "model", "policy")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Label what is new at the input since the last version of a data set, and publish the next one."""

    dataset: str = option("folder or prefix of the data set and its versions")
    input: str | None = option("what is labelled: folder, prefix, shard or manifest", None)
    model: str | None = option("model bundle: a folder or prefix", None)
    policy: str | None = option(
        "YAML file that says which detections become labels; see the README", None
    )
    max_drift: float | None = option(
        "publish as a candidate only (exit code of --held-exit-code) where a distribution has moved further than this "
        "Jensen-Shannon distance, 0 to 1, and further than chance",
        None,
    )
    held_exit_code: int = option(
        "exit code where somebody has to look: at a candidate, or at a version that was rolled back; 0 for "
        "schedulers that would run a failed job again",
        4,
    )
    list: bool = option("show the versions, and do nothing", False)  # noqa: FBT003
    show: int | None = option("show a version, and do nothing", None)
    dry_run: bool = option(
        "show what is new, check model and policy where they are given, say what a run would do, and do "
        "nothing",
        False,  # noqa: FBT003
    )
    promote: int | None = option(
        "make a version (a candidate, or an older one) current until the next is published", None
    )
    reviewed: str | None = option(
        "COCO instances file, or Label Studio's JSON, of images that people went over: publish a version with "
        "their labels in the place of the machine's",
        None,
    )
    reviewed_empty: bool = option(
        "take a reviewed file without any label, too, of images that have some",
        False,  # noqa: FBT003
    )
    format: Format = option("how the input is read; auto looks and says what it chose", "auto")
    precision: InferencePrecision = option("arithmetic; see `segjobs predict --help`", "auto")
    batch_size: int | None = option("images in a batch; see `segjobs predict --help`", None)
    min_actors: int | None = option("copies of the model, at least", None)
    max_actors: int | None = option("copies of the model, at most", None)
    gpus_per_actor: float | None = option("GPUs of each copy, fractions too", None)
    chunk_size: int = option("images in an object, at most", 256)
    image_column: str | None = option("column of Parquet shards that holds the images", None)
    max_pixels: int = option("refuse larger images, before they are decoded", MAX_PIXELS)
    single_writer: bool = option(
        "go on where the store has no conditional puts: you see to it that no two runs overlap",
        False,  # noqa: FBT003
    )
    address: str | None = option(
        "Ray cluster to use; RAY_ADDRESS, then a local Ray, if left out", None
    )
    endpoint_url: str | None = option(
        "S3-compatible store, for example http://127.0.0.1:9000; AWS_ENDPOINT_URL if left out", None
    )

    def __post_init__(self) -> None:
        check("max_drift", self.max_drift, lambda v: 0 <= v <= 1, "from 0 to 1")
        check("held_exit_code", self.held_exit_code, lambda v: 0 <= v <= 255, "from 0 to 255")
        for name in ("show", "promote", "chunk_size", "max_pixels", "batch_size"):
            check(name, getattr(self, name), lambda v: v >= 1, "1 or more")
        others = self.others
        if len(others) > 1:
            raise ConfigError(f"{' and '.join(others)} exclude one another: give one")
        if self.reviewed_empty and self.reviewed is None:
            raise ConfigError("--reviewed-empty is of --reviewed alone: leave it out")
        wanted = ("input",) if self.dry_run else () if others else _LABELS
        missing = [f"--{name}" for name in wanted if getattr(self, name) is None]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} must be given to label; --list, --show N and --promote N need "
                "--dataset alone"
            )
        if self.dry_run and (self.model is None) != (self.policy is None):
            raise ConfigError(
                "a policy is checked against the model's categories: give --model and --policy to --dry-run, or "
                "neither"
            )

    @property
    def others(self) -> tuple[str, ...]:
        """What was asked for instead of labelling, as flags."""
        asked = {
            "--list": self.list,
            "--show": self.show is not None,
            "--dry-run": self.dry_run,
            "--promote": self.promote is not None,
            "--reviewed": self.reviewed is not None,
        }
        return tuple(flag for flag, value in asked.items() if value)
