"""Model bundles: a directory with `model.safetensors`, `model.json` and a model card.

Loading a bundle executes no code from it: weights are safetensors, the rest is JSON.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from segmodel.model import shape_problems, state_shapes
from segmodel.schema import Category
from segmodel.settings import ModelSettings

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "model.json", "README.md"


class BundleError(ValueError):
    """A bundle that is missing, damaged, or does not fit its own description."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A model with all that is needed to run it.

    Attributes:
        settings: What makes the network.
        categories: What its labels mean; labels may have gaps.
        weights: The network's state dict, on the CPU.
        score_threshold: Detections below are dropped, unless the caller says otherwise.
        max_detections: At most so many for an image, best first, unless the caller says otherwise.
        provenance: Where the weights come from: free text and numbers.
        metrics: What was measured on which data.
        digest: SHA-256 over weights, settings, categories and thresholds; what results depend on.
    """

    settings: ModelSettings
    categories: tuple[Category, ...]
    weights: Mapping[str, Tensor]
    score_threshold: float = 0.05
    max_detections: int = 100
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    def __post_init__(self) -> None:
        _check_categories(self.categories, self.settings.num_classes)
        if not self.digest:
            object.__setattr__(self, "digest", _digest(self))

    def by_label(self) -> dict[int, Category]:
        """Return the categories by the network's output index."""
        return {category.label: category for category in self.categories}


def save(path: Path | str, bundle: Bundle) -> None:
    """Write `bundle` into the directory `path`, which is made; files of an older bundle are replaced."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in bundle.weights.items()}
    safetensors.torch.save_file(weights, directory / WEIGHTS)
    description = json.dumps(_describe(bundle), indent=2, ensure_ascii=False)
    (directory / DESCRIPTION).write_text(description + "\n", encoding="utf-8")
    (directory / CARD).write_text(_card(bundle), encoding="utf-8")


def load(path: Path | str) -> Bundle:
    """Read the bundle in the directory `path`.

    Raises:
        BundleError: A file is missing or damaged, or weights and description do not fit.
    """
    directory = Path(path)
    for name in (DESCRIPTION, WEIGHTS):
        if not (directory / name).is_file():
            raise BundleError(
                f"{directory} is not a model bundle: it has no {name}. "
                "Make one with `segjobs init --arch small --weights random --output DIR`."
            )
    return parse(
        (directory / DESCRIPTION).read_bytes(), (directory / WEIGHTS).read_bytes(), str(directory)
    )


def parse(description: bytes, weights: bytes, name: str = "the bundle") -> Bundle:
    """Make a bundle of the contents of its two files; `name` is for the error messages.

    Raises:
        BundleError: The contents are damaged or do not fit one another.
    """
    try:
        fields = json.loads(description)
        _check_version(fields["format_version"], name)
        state = safetensors.torch.load(weights)
        settings = fields["settings"]
        for triple in ("image_mean", "image_std"):
            settings[triple] = tuple(settings[triple])
        bundle = Bundle(
            settings=ModelSettings(**settings),
            categories=tuple(Category(**category) for category in fields["categories"]),
            weights=state,
            score_threshold=fields["score_threshold"],
            max_detections=fields["max_detections"],
            provenance=fields["provenance"],
            metrics=fields["metrics"],
        )
    except BundleError:
        raise
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise BundleError(f"{name} is damaged: {type(error).__name__}: {error}") from error
    if bundle.digest != fields.get("digest"):
        raise BundleError(
            f"{name} was changed after it was written: its digest is {bundle.digest[:12]}, "
            f"{DESCRIPTION} says {str(fields.get('digest'))[:12]}. Fetch or make it anew."
        )
    if problems := shape_problems(state_shapes(bundle.settings), state):
        raise BundleError(f"{name}: weights and architecture do not fit: {'; '.join(problems[:5])}")
    return bundle


def _check_version(version: int, name: str) -> None:
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{name} has format version {version}, this program reads {FORMAT_VERSION}: "
            "use a segjobs of its time, or make the bundle anew"
        )


def _check_categories(categories: tuple[Category, ...], num_classes: int) -> None:
    if not categories:
        raise BundleError("a model needs at least one category")
    for what in ("id", "name", "label"):
        count = Counter(getattr(category, what) for category in categories)
        if twice := [str(value) for value, times in count.items() if times > 1]:
            raise BundleError(f"two categories have the same {what}: {', '.join(twice[:5])}")
    if wrong := [c for c in categories if not 1 <= c.label < num_classes]:
        raise BundleError(
            f"category {wrong[0].name!r} has label {wrong[0].label}, but the network has the labels "
            f"1 to {num_classes - 1}"
        )
    if wrong := [c for c in categories if not -(2**31) <= c.id < 2**31]:
        raise BundleError(
            f"category {wrong[0].name!r} has id {wrong[0].id}, which does not fit into 32 bits"
        )


def _results_depend_on(bundle: Bundle) -> dict[str, Any]:
    return {
        "settings": asdict(bundle.settings),
        "categories": [asdict(category) for category in bundle.categories],
        "score_threshold": bundle.score_threshold,
        "max_detections": bundle.max_detections,
    }


def _digest(bundle: Bundle) -> str:
    digest = hashlib.sha256(json.dumps(_results_depend_on(bundle), sort_keys=True).encode())
    for name, tensor in sorted(bundle.weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe(bundle: Bundle) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        **_results_depend_on(bundle),
        "precision": "weights are stored as trained; `--precision` chooses the arithmetic at run time",
        "provenance": dict(bundle.provenance),
        "metrics": dict(bundle.metrics),
        "digest": bundle.digest,
    }


def _card(bundle: Bundle) -> str:
    settings = bundle.settings
    millions = sum(tensor.numel() for tensor in bundle.weights.values()) / 1e6
    names = ", ".join(category.name for category in bundle.categories)
    lines = [
        f"# {settings.arch}: instance segmentation of {len(bundle.categories)} categories",
        "",
        f"- Mask R-CNN, {millions:.1f} million weights, digest `{bundle.digest[:12]}`",
        f"- Input: shorter side {settings.min_size} pixels, longer side at most {settings.max_size}",
        f"- Score threshold {bundle.score_threshold}, at most {bundle.max_detections} detections",
        f"- Categories: {names}",
        "",
        "## Provenance",
        "",
        *(line for item in bundle.provenance.items() for line in _card_lines(*item)),
        "",
        "## Metrics",
        "",
        *(line for item in bundle.metrics.items() for line in _card_lines(*item)),
        *([] if bundle.metrics else ["None measured yet."]),
        "",
        "Run it with `segjobs predict --model DIR --input URI --output URI`.",
        "",
    ]
    return "\n".join(lines)


def _card_lines(key: str, value: Any) -> list[str]:
    """Return an entry of a card, with its parts below it."""
    if not isinstance(value, Mapping):
        # COCO's mark for what cannot be measured.
        return [f"- {key}: {'there is no truth of that kind' if value == -1 else value}"]
    lines = (line for item in value.items() for line in _card_lines(*item))
    return [f"- {key}:", *(f"  {line}" for line in lines)]
