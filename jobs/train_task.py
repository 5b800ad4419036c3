"""What is to be trained: data, first weights and recipe, made of a configuration and written down once."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs import training_set
from jobs.config import ConfigError
from jobs.processor import cpu_has_bf16
from jobs.store import Store
from jobs.train_config import TrainConfig
from jobs.training_set import TrainingSet
from jobs.weights import load_bundle
from segmodel import initial
from segmodel.augment import Augmentation
from segmodel.bundle import Bundle
from segmodel.settings import DEFAULT_SIZES, ModelSettings
from segmodel.training import Norm, Recipe

TASK = "_train.json"

# What may differ when a training is gone on with: it says where and how long, not what.
FREE = frozenset(
    {
        *(
            "workers",
            "device",
            "address",
            "endpoint_url",
            "max_failures",
            "checkpoint_every",
            "output",
        ),
        # What helps where the loss was not finite.
        *("learning_rate", "warmup_epochs", "clip_norm"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained.

    Attributes:
        train: What to train on.
        val: What to evaluate with, if anything.
        bundle: The first weights, with the heads and sizes that the bundle at the end will have.
        origin: In words, where those weights come from.
        recipe: How to train.
        augmentation: How samples are varied.
    """

    train: TrainingSet
    val: TrainingSet | None
    bundle: Bundle
    origin: str
    recipe: Recipe
    augmentation: Augmentation


def settled(config: TrainConfig, output: Store, *, gpus: bool) -> TrainConfig:
    """Return the configuration with a precision: that of the training that was begun, or this machine's.

    Imitated on a CPU without AVX512-BF16, bf16 takes some twenty times as long as fp32 (an AMD EPYC
    with AVX2).
    """
    if config.precision != "auto":
        return config
    if output.info(TASK) is not None:
        return replace(config, precision=json.loads(output.read(TASK))["precision"])
    return replace(config, precision="bf16" if gpus or cpu_has_bf16() else "fp32")


def make(config: TrainConfig, *, gpus: bool) -> Task:
    """Look at the data and make the first weights.

    Raises:
        ValueError: Data, bundle or settings do not fit; the message says what to change.
    """
    train = training_set.load(config.train_sets, config.endpoint_url, config.train_weights or ())
    val = None if config.val is None else training_set.load([config.val], config.endpoint_url)
    if val is not None and not set(val.categories) <= set(train.categories):
        unknown = sorted(set(val.categories) - set(train.categories))[:5]
        raise ConfigError(f"--val has categories that --train has not, such as {unknown}")
    bundle, origin = _first_bundle(config, train)
    return Task(
        train=train,
        val=val,
        bundle=bundle,
        origin=origin,
        recipe=_recipe(config, bundle, gpus=gpus),
        augmentation=_augmentation(config, bundle.settings),
    )


def freeze(output: Store, config: TrainConfig, task: Task) -> None:
    """Write down what is trained, once; refuse to go on with something else.

    Raises:
        ConfigError: The output belongs to another training; the message names the difference.
    """
    # Whatever the places are called now: what lies there has a digest, of paths, sizes and etags.
    settings = {
        n: v for n, v in _described_by(config).items() if n not in ("train", "val", "model")
    }
    described = settings | {
        "train data": task.train.digest,
        "val data": task.val and task.val.digest,
        "first weights": task.bundle.digest,
        "norm": task.recipe.norm,
        "precision": task.recipe.precision,
    }
    data = json.dumps(described, indent=2, sort_keys=True).encode()
    if output.put_if_absent(TASK, data):
        return
    old = json.loads(output.read(TASK))
    different = [
        f"{name} was {old.get(name)!r} and is now {described.get(name)!r}"
        for name in sorted({*old, *described})
        if old.get(name) != described.get(name)
    ]
    if different:
        raise ConfigError(
            f"{output.uri} belongs to another training: {'; '.join(different)}. Give the old values to "
            "go on with it, or another --output to start anew."
        )


def _described_by(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that the result depends on."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def _first_bundle(config: TrainConfig, train: TrainingSet) -> tuple[Bundle, str]:
    """Return the bundle to start from, made to fit the categories, and in words where it comes from."""
    categories = initial.numbered_categories(train.categories)
    if config.model is None:
        arch = config.arch or "small"
        min_size, max_size = DEFAULT_SIZES[arch]
        settings = ModelSettings(
            arch=arch, num_classes=1 + len(categories), min_size=min_size, max_size=max_size
        )
        bundle, origin = initial.random_bundle(settings, categories, config.seed), "random weights"
    else:
        old = load_bundle(config.model, config.endpoint_url)
        if {(c.id, c.name) for c in old.categories} == {(c.id, c.name) for c in categories}:
            bundle, origin = old, f"{config.model}, all of it"
        else:
            bundle, kept = initial.with_categories(old, categories, config.seed)
            origin = (
                f"{config.model}, backbone and heads; of the last layers "
                f"{len(kept)} of {len(categories)} categories are kept"
                + (f" ({', '.join(kept[:5])}{', ...' if len(kept) > 5 else ''})" if kept else "")
            )
    sizes = bundle.settings
    settings = replace(
        sizes,
        min_size=config.min_size or sizes.min_size,
        max_size=config.max_size or max(sizes.max_size, config.min_size or 0),
    )
    made = replace(
        bundle,
        settings=settings,
        score_threshold=config.score_threshold,
        max_detections=config.max_detections,
        digest="",
    )
    return made, origin


def _recipe(config: TrainConfig, bundle: Bundle, *, gpus: bool) -> Recipe:
    norm: Norm
    if config.norm != "auto":
        norm = config.norm
    elif bundle.settings.norm == "frozen" or not initial.saw_no_data(bundle):
        norm = "frozen"
    else:
        # One worker, too, may be joined by others.
        norm = "sync" if gpus else "train"
    if norm != "frozen" and bundle.settings.norm == "frozen":
        raise ConfigError(
            f"--norm {norm} has nothing to train: the normalisation of {config.model} is constants. Leave "
            "--norm out, or start from weights with BatchNorm"
        )
    if norm == "sync" and not gpus:
        raise ConfigError("--norm sync needs GPUs: torch shares batch statistics on them only")
    assert config.precision != "auto", "settled() chooses one"
    return Recipe(
        epochs=config.epochs,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        warmup_epochs=config.warmup_epochs,
        schedule=config.schedule,
        clip_norm=config.clip_norm,
        ema_decay=config.ema_decay,
        accumulate=config.accumulate,
        precision=config.precision,
        norm=norm,
        freeze_stages=config.freeze_stages,
        proposals_per_image=config.proposals_per_image,
        mask_targets=config.mask_targets,
        seed=config.seed,
    )


def _augmentation(config: TrainConfig, settings: ModelSettings) -> Augmentation:
    return Augmentation(
        min_size=settings.min_size,
        max_size=settings.max_size,
        size_hw=None if config.crop_size is None else (config.crop_size, config.crop_size),
        scale=(config.scale_min, config.scale_max),
        flip=config.flip,
        rotate=config.rotate,
        colour=config.colour,
        copy_paste=config.copy_paste,
    )
