"""First weights: random by seed, torchvision's published ones, an ImageNet backbone, or a state-dict file."""

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torchvision.models import MobileNet_V3_Large_Weights, ResNet50_Weights, WeightsEnum
from torchvision.models.detection import (
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)

from segmodel.bundle import Bundle
from segmodel.model import mask_rcnn, shape_problems, state_shapes
from segmodel.schema import Category
from segmodel.settings import Architecture, ModelSettings

_COCO_WEIGHTS = {
    "maskrcnn_resnet50_fpn": MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    "maskrcnn_resnet50_fpn_v2": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}
_BACKBONE_WEIGHTS = {
    "maskrcnn_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "maskrcnn_resnet50_fpn_v2": ResNet50_Weights.IMAGENET1K_V2,
    "small": MobileNet_V3_Large_Weights.IMAGENET1K_V2,
}
# MobileNetV3 was trained with this epsilon, the ResNets with the usual one.
_BACKBONE_NORM_EPS = {
    "maskrcnn_resnet50_fpn": 1e-5,
    "maskrcnn_resnet50_fpn_v2": 1e-5,
    "small": 1e-3,
}
# Layers with outputs for each class, and how many.
_OUTPUTS_PER_CLASS = {
    "roi_heads.box_predictor.cls_score": 1,
    "roi_heads.box_predictor.bbox_pred": 4,
    "roi_heads.mask_predictor.mask_fcn_logits": 1,
}
_CLASS_SCORES = "roi_heads.box_predictor.cls_score.weight"
_BODY, _COUNTER = "backbone.body.", ".num_batches_tracked"

# Layers that torchvision has renamed since it published its first COCO weights. Its modules rename
# them while they load (`_load_from_state_dict`); here it is done when a bundle is made.
_RENAMED = {
    "rpn.head.conv": "rpn.head.conv.0.0",
    **{f"roi_heads.mask_head.mask_fcn{i + 1}": f"roi_heads.mask_head.{i}.0" for i in range(4)},
    **{
        f"backbone.fpn.{kind}_blocks.{i}": f"backbone.fpn.{kind}_blocks.{i}.0"
        for kind in ("inner", "layer")
        for i in range(4)
    },
}

# What `torch.load` raises for damaged bytes and for those of other formats, found by flipping
# bytes.
_DAMAGE = (
    SafetensorError,
    OSError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


class WeightsError(ValueError):
    """Weights that cannot be used, with the reason in words."""


# Of a bundle's provenance, where nothing of its weights was learned.
_RANDOM = {"weights": "random"}


def numbered_categories(pairs: Sequence[tuple[int, str]]) -> tuple[Category, ...]:
    """Return categories of ids and names, labelled 1, 2, 3, ..."""
    return tuple(
        Category(id=id_, name=name, label=label) for label, (id_, name) in enumerate(pairs, 1)
    )


def random_bundle(settings: ModelSettings, categories: Sequence[Category], seed: int) -> Bundle:
    """Return a bundle of torchvision's initial weights, the same for the same seed."""
    return Bundle(
        settings=settings,
        categories=tuple(categories),
        weights=_random_state(settings, seed),
        provenance={**_RANDOM, "seed": seed},
    )


def saw_no_data(bundle: Bundle) -> bool:
    """Say whether all of a bundle's weights are `random_bundle`'s, its normalisation's statistics too."""
    return _RANDOM.items() <= bundle.provenance.items()


def coco_bundle(arch: Architecture, min_size: int, max_size: int) -> Bundle:
    """Return torchvision's model trained on COCO; its weights are downloaded on first use.

    The heads keep torchvision's 91 outputs, so that results are the published ones; the labels that
    COCO never used have no category.

    Raises:
        WeightsError: torchvision publishes none for `arch`.
    """
    if arch not in _COCO_WEIGHTS:
        raise WeightsError(
            f"torchvision publishes no COCO weights for {arch}: use random or imagenet weights, or "
            f"--arch {next(iter(_COCO_WEIGHTS))}"
        )
    weights = _COCO_WEIGHTS[arch]
    names = weights.meta["categories"]
    # COCO_V1 of the first version was trained with an epsilon of 0; torchvision sets it likewise.
    settings = ModelSettings(
        arch=arch,
        num_classes=len(names),
        min_size=min_size,
        max_size=max_size,
        norm="frozen" if arch == "maskrcnn_resnet50_fpn" else "batch",
        norm_eps=0.0 if arch == "maskrcnn_resnet50_fpn" else 1e-5,
    )
    return Bundle(
        settings=settings,
        categories=tuple(
            Category(id=label, name=name, label=label)
            for label, name in enumerate(names)
            if name not in ("__background__", "N/A")
        ),
        weights=_fitting(settings, _published(weights), str(weights)),
        provenance={"weights": str(weights), "url": weights.url},
        metrics={"published": weights.meta["_metrics"]},
    )


def imagenet_bundle(settings: ModelSettings, categories: Sequence[Category], seed: int) -> Bundle:
    """Return a bundle with torchvision's ImageNet backbone below random heads.

    The epsilon of the backbone's normalisation is the one it was trained with, whatever `settings`
    say.
    """
    weights = _BACKBONE_WEIGHTS[settings.arch]
    settings = replace(settings, norm_eps=_BACKBONE_NORM_EPS[settings.arch])
    state = _random_state(settings, seed)
    backbone = {
        _BODY + name.removeprefix("features."): tensor
        for name, tensor in _published(weights).items()
    }
    # The classifier, and of MobileNet the last blocks, have no place in a backbone.
    fitting = {name: tensor for name, tensor in backbone.items() if name in state}
    # Weights from before batches were counted have no counters; those of the new network are 0.
    missing = [
        name
        for name in state
        if name.startswith(_BODY) and not name.endswith(_COUNTER) and name not in fitting
    ]
    if missing:
        raise WeightsError(f"{weights} lacks {len(missing)} tensors, for example {missing[0]}")
    return Bundle(
        settings=settings,
        categories=tuple(categories),
        weights=_fitting(settings, {**state, **fitting}, str(weights)),
        provenance={"backbone": str(weights), "heads": "random", "seed": seed},
    )


def with_categories(
    bundle: Bundle, categories: Sequence[Category], seed: int
) -> tuple[Bundle, tuple[str, ...]]:
    """Return a bundle for other categories, with everything else of the first one kept.

    The last layers of the heads are made anew, at random; of categories that both have by name, the
    outputs are kept. Background is always kept.

    Returns:
        The bundle, and the names of the categories that were kept.
    """
    settings = replace(bundle.settings, num_classes=1 + max(c.label for c in categories))
    old_labels = {category.name: category.label for category in bundle.categories}
    labels = {0: 0} | {c.label: old_labels[c.name] for c in categories if c.name in old_labels}
    state = _random_state(settings, seed)
    for name, tensor in bundle.weights.items():
        rows_per_class = _OUTPUTS_PER_CLASS.get(name.rpartition(".")[0])
        if rows_per_class is None:
            state[name] = tensor
            continue
        new = state[name].view(settings.num_classes, rows_per_class, *tensor.shape[1:])
        old = tensor.view(bundle.settings.num_classes, rows_per_class, *tensor.shape[1:])
        new[list(labels)] = old[list(labels.values())]
    made = Bundle(
        settings=settings,
        categories=tuple(categories),
        weights=state,
        score_threshold=bundle.score_threshold,
        max_detections=bundle.max_detections,
        provenance={**bundle.provenance, "heads": "random where categories are new", "seed": seed},
    )
    return made, tuple(c.name for c in categories if c.name in old_labels)


def state_bundle(
    state: Mapping[str, Tensor], settings: ModelSettings, categories: Sequence[Category], name: str
) -> Bundle:
    """Return a bundle of a state dict (see `read_state`); `name` is for messages and the model card.

    Raises:
        WeightsError: Tensors are missing, unknown or of another shape.
    """
    return Bundle(
        settings=settings,
        categories=tuple(categories),
        weights=_fitting(settings, state, name),
        provenance={"weights": name},
    )


def read_state(path: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of a state-dict file. No code in it is executed.

    Args:
        path: `.safetensors`, or what `torch.save` wrote: a state dict, or one under `model` or
            `state_dict`; a prefix `module.` of its names is dropped.
        name: For messages.

    Raises:
        WeightsError: It cannot be read, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise WeightsError(_refusal(name, str(error))) from error
    except _DAMAGE as error:
        raise WeightsError(
            f"{name} cannot be read as weights, it is damaged or of another format: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise WeightsError(f"{name} is not a state dict: it should map names to tensors")
    return {str(key).removeprefix("module."): tensor.detach() for key, tensor in found.items()}


def classes_in(state: Mapping[str, Tensor]) -> int | None:
    """Return how many classes, background included, the box head of a state dict has."""
    weight = state.get(_CLASS_SCORES)
    return None if weight is None else len(weight)


def has_frozen_norm(state: Mapping[str, Tensor]) -> bool:
    """Say whether a state dict's backbone has constants: running statistics count their batches."""
    return not any(name.startswith(_BODY) and name.endswith(_COUNTER) for name in state)


def _published(weights: WeightsEnum) -> Mapping[str, Tensor]:
    """Return torchvision's weights: from torch's folder of downloads, or from the network."""
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{weights.url} cannot be downloaded: {_first_line(error)}. Where there is no network, "
            f"put the file into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return state


def _random_state(settings: ModelSettings, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed() would seed the GPUs' generators too, for good.
        torch.default_generator.manual_seed(seed)
        return dict(mask_rcnn(settings).state_dict())


def _fitting(settings: ModelSettings, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    needed = state_shapes(settings)
    # Counters of batches seen mean nothing here, and frozen models have none.
    kept = {
        key: tensor
        for key, tensor in ((_new_name(old), tensor) for old, tensor in state.items())
        if key in needed or not key.endswith(_COUNTER)
    }
    if problems := shape_problems(needed, kept):
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(
            f"{name} does not fit {settings.arch} with {settings.num_classes} classes (background "
            f"included): {'; '.join(problems[:5])}{more}"
        )
    return kept


def _new_name(name: str) -> str:
    layer, dot, kind = name.rpartition(".")
    return f"{_RENAMED.get(layer, layer)}{dot}{kind}"


def _refusal(name: str, message: str) -> str:
    """Say why torch refused a file. Its own words are advice to run the file's code: not repeated."""
    found = re.search(r"unsupported global:?(?: GLOBAL)? ([\w.]+)", message, re.IGNORECASE)
    if found is None:
        return f"{name} cannot be read as weights: torch.save() did not write it, or it is damaged"
    return (
        f"{name} holds more than plain tensors ({found[1]}), and code from a file is never run: save "
        "it by torch.save(model.state_dict(), FILE)"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
