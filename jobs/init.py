"""`segjobs init --arch A --weights W --output BUNDLE`: makes a model bundle.

Input: nothing (random), torchvision's published weights (coco, imagenet), or a state-dict file. Output: a
folder with `model.safetensors`, `model.json` and a model card.
"""

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
    min_size = config.min_size or default_min
    max_size = config.max_size or max(default_max, min_size)
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
            num_classes=len(categories) + 1,
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
    settings = ModelSettings(
        arch=config.arch,
        num_classes=classes or len(categories) + 1,
        norm="frozen" if initial.has_frozen_norm(state) else "batch",
        norm_eps=config.norm_eps,
        min_size=sizes[0],
        max_size=sizes[1],
    )
    return initial.state_bundle(state, settings, categories, config.weights)


def _categories(config: InitConfig) -> tuple[Category, ...]:
    """Read a list of {id, name}, or the `categories` of a COCO file."""
    assert config.categories is not None
    store, name = open_uri(config.categories, config.endpoint_url)
    # YAML reads JSON too, and its safe loader runs no code.
    found: Any = yaml.safe_load(store.read(name))
    if isinstance(found, dict):
        found = found.get("categories")
    try:
        return initial.numbered_categories([(int(one["id"]), str(one["name"])) for one in found])
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"--categories {config.categories} should be a list of {{id, name}}, or a COCO file: {error!r}"
        ) from error
