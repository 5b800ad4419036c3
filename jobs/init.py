"""`segjobs init --arch A --weights W --output BUNDLE`: makes a model bundle.

Input: nothing (random), torchvision's published weights (coco, imagenet), or a state-dict file.
Output: a folder with `model.safetensors`, `model.json` and a model card.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from jobs.config import ConfigError, InitConfig
from jobs.console import facts
from jobs.storage import open_uri
from jobs.weights import save_bundle
from segmodel import initial
from segmodel.bundle import Bundle
from segmodel.schema import Category
from segmodel.settings import DEFAULT_SIZES, ModelSettings


def run(config: InitConfig) -> int:
    """Make the bundle and say what it is."""
    bundle = _bundle(config)
    save_bundle(config.output, bundle, config.endpoint_url)
    facts(
        "Bundle",
        [
            ("output", config.output),
            ("architecture", bundle.settings.arch),
            ("categories", f"{len(bundle.categories)}"),
            ("weights", ", ".join(f"{key} {value}" for key, value in bundle.provenance.items())),
            ("digest", bundle.digest[:12]),
        ],
    )
    return 0


def _bundle(config: InitConfig) -> Bundle:
    default_min, default_max = DEFAULT_SIZES[config.arch]
    min_size = default_min if config.min_size is None else config.min_size
    max_size = max(default_max, min_size) if config.max_size is None else config.max_size
    categories = None if config.categories is None else _categories(config)
    if config.weights == "coco":
        if categories is not None:
            raise ConfigError(
                "--weights coco comes with COCO's categories: leave --categories out (training makes "
                "a bundle with others of it)"
            )
        made = initial.coco_bundle(config.arch, min_size, max_size)
    elif config.weights in ("random", "imagenet"):
        if categories is None:
            raise ConfigError(f"--weights {config.weights} needs --categories FILE")
        settings = ModelSettings(
            arch=config.arch,
            num_classes=_num_classes(categories),
            min_size=min_size,
            max_size=max_size,
        )
        make = initial.random_bundle if config.weights == "random" else initial.imagenet_bundle
        made = make(settings, categories, config.seed)
    else:
        made = _from_file(config, categories, (min_size, max_size))
    return replace(
        made,
        score_threshold=config.score_threshold,
        max_detections=config.max_detections,
        digest="",
    )


def _from_file(
    config: InitConfig, categories: tuple[Category, ...] | None, sizes: tuple[int, int]
) -> Bundle:
    with TemporaryDirectory() as folder:
        store, name = open_uri(config.weights, config.endpoint_url)
        path = Path(folder) / f"weights{Path(name).suffix}"
        path.write_bytes(store.read(name))
        state = initial.read_state(path, config.weights)
    classes = initial.classes_in(state)
    if categories is None:
        raise ConfigError(
            f"--weights {config.weights} needs --categories FILE"
            + (f" with {classes - 1} categories" if classes else "")
        )
    _check_labels(config, categories, classes)
    settings = ModelSettings(
        arch=config.arch,
        num_classes=classes or _num_classes(categories),
        norm="frozen" if initial.has_frozen_norm(state) else "batch",
        norm_eps=config.norm_eps,
        min_size=sizes[0],
        max_size=sizes[1],
    )
    return initial.state_bundle(state, settings, categories, config.weights)


def _num_classes(categories: Sequence[Category]) -> int:
    """Return how many outputs a new network needs, background included."""
    return 1 + max(category.label for category in categories)


def _check_labels(config: InitConfig, categories: Sequence[Category], classes: int | None) -> None:
    """Refuse to count labels when there are fewer categories than outputs: the names would be wrong."""
    counted = [category.label for category in categories] == list(range(1, len(categories) + 1))
    if classes is not None and counted and classes != len(categories) + 1:
        raise ConfigError(
            f"--weights {config.weights} has {classes} outputs (background included), so it wants "
            f"{classes - 1} categories, not the {len(categories)} of {config.categories}: list all, or "
            "write {id, name, label} with the output of each"
        )


def _categories(config: InitConfig) -> tuple[Category, ...]:
    """Read a list of {id, name} or {id, name, label}, or the `categories` of a COCO file."""
    assert config.categories is not None
    store, name = open_uri(config.categories, config.endpoint_url)
    data = store.read(name)
    try:
        found = _json_or_yaml(data)
        if isinstance(found, dict):
            found = found["categories"]
        if any("label" in one for one in found):
            categories = tuple(_labelled(one) for one in found)
        else:
            categories = initial.numbered_categories(
                [(int(one["id"]), _text(one["name"])) for one in found]
            )
    except (TypeError, KeyError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--categories {config.categories} should be a list of {{id, name}}, or a COCO file: {error!r}"
        ) from error
    if not categories:
        raise ConfigError(f"--categories {config.categories} lists none")
    return categories


def _json_or_yaml(data: bytes) -> Any:
    try:
        # COCO files have up to 500 MB: YAML, which reads JSON too, would take hours.
        return json.loads(data)
    except ValueError:
        return yaml.safe_load(data)


def _labelled(one: Any) -> Category:
    return Category(id=int(one["id"]), name=_text(one["name"]), label=int(one["label"]))


def _text(name: Any) -> str:
    if not isinstance(name, str):
        # YAML takes `no` for false and `007` for a number.
        raise TypeError(f"the name {name!r} is no text: put it in quotes")
    return name
