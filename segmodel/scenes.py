"""Synthetic scenes with exactly known truth, for the demo, the tests and the shipped model.

Shapes lie on a table, later ones upon earlier ones. The shape makes the category; colour, pattern,
size and angle say nothing about it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask

from segmodel.schema import Category, Float32

Bool = npt.NDArray[np.bool_]
UInt8 = npt.NDArray[np.uint8]

# The ids have gaps on purpose, as COCO's have: whoever takes them for indices fails early.
CATEGORIES = (
    Category(id=1, name="disc", label=1),
    Category(id=2, name="box", label=2),
    Category(id=4, name="star", label=3),
    Category(id=7, name="ring", label=4),
)

# Diameters, in pixels and as a share of the shorter side.
_SMALLEST, _LARGEST_SHARE = 14.0, 0.4
_FEWEST, _MOST = 3, 9
_EMPTY_SHARE = 1 / 25
# What is seen of an object, at least; less is not a task but a guess.
_VISIBLE_SHARE, _VISIBLE_PIXELS = 0.25, 40
# How far its shadow reaches beyond an object, as a share of its diameter.
_SHADOW_SHARE = 0.25
# How often an object is drawn again until it neither hides nor loses too much.
_TRIES = 12
# Edges are drawn at this scale and averaged; a pixel belongs to the object that covers most of it.
_SUPERSAMPLING = 4

_OBJECT_COLOURS = np.array(
    [
        (226, 88, 62),
        (244, 172, 54),
        (38, 70, 110),
        (82, 152, 186),
        (120, 168, 96),
        (128, 84, 138),
        (30, 140, 134),
        (238, 130, 134),
        (250, 236, 204),
        (58, 54, 66),
    ],
    np.float32,
)
_TABLE_COLOURS = np.array(
    [
        (226, 214, 194),
        (196, 164, 130),
        (148, 108, 82),
        (176, 190, 182),
        (158, 172, 196),
        (204, 184, 188),
        (92, 108, 100),
        (76, 88, 104),
    ],
    np.float32,
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An image and its truth.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        masks: (N, H, W) bool, the visible part of each object, lowest first; disjoint.
        category_ids: N ids of `CATEGORIES`.
    """

    image: UInt8
    masks: Bool
    category_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class _Object:
    """An object that may be laid upon a scene.

    Attributes:
        category_id: What it is.
        window: The rows and columns of the scene that it and its shadow may touch.
        coverage: (h, w) float32, 0..1, the share of each pixel of the window that it covers.
        diameter: In pixels.
    """

    category_id: int
    window: tuple[slice, slice]
    coverage: Float32
    diameter: float


def scene(seed: int, size_hw: tuple[int, int] = (256, 320)) -> Scene:
    """Draw the scene of a seed: nothing, or 3 to 9 objects; the same with every call."""
    rng = np.random.default_rng(seed)
    image = _table(rng, size_hw)
    masks: list[Bool] = []
    areas: list[int] = []
    category_ids: list[int] = []
    num_objects = 0 if rng.random() < _EMPTY_SHARE else int(rng.integers(_FEWEST, _MOST + 1))
    for _ in range(num_objects * _TRIES):
        if len(masks) == num_objects:
            break
        new = _draw_object(rng, size_hw)
        mask = np.zeros(size_hw, np.bool_)
        mask[new.window] = new.coverage > 0.5
        visible, full = [*(old & ~mask for old in masks), mask], [*areas, int(mask.sum())]
        if _all_recognisable(visible, full):
            masks, areas = visible, full
            category_ids.append(new.category_id)
            _lay(rng, image, new)
    image += _grain(rng, size_hw, 3)
    return Scene(
        image=np.clip(image, 0, 255).astype(np.uint8),
        masks=np.array(masks, np.bool_).reshape(-1, *size_hw),
        category_ids=category_ids,
    )


def coco(scenes: Iterable[Scene], file_names: Iterable[str]) -> dict[str, Any]:
    """Return the truth of scenes as a COCO instances file.

    Args:
        scenes: In the order of their image ids, from 1.
        file_names: As many.

    Raises:
        ValueError: There are more scenes than names, or fewer.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (one, file_name) in enumerate(zip(scenes, file_names, strict=True), start=1):
        height, width = one.image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for category_id, mask in zip(one.category_ids, one.masks, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "area": int(coco_mask.area(rle)),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                }
            )
    categories = [{"id": category.id, "name": category.name} for category in CATEGORIES]
    return {"images": images, "annotations": annotations, "categories": categories}


def _all_recognisable(visible: list[Bool], full_areas: list[int]) -> bool:
    return all(
        mask.sum() >= max(_VISIBLE_PIXELS, _VISIBLE_SHARE * area)
        for mask, area in zip(visible, full_areas, strict=True)
    )


def _draw_object(rng: np.random.Generator, size_hw: tuple[int, int]) -> _Object:
    category = CATEGORIES[rng.integers(len(CATEGORIES))]
    largest = max(_SMALLEST, _LARGEST_SHARE * min(size_hw))
    diameter = _SMALLEST + (largest - _SMALLEST) * rng.random() ** 1.5  # half of them are small
    centre_yx = rng.normal(0.5, 0.25, 2).clip(0, 1) * size_hw
    reach = 0.5 * diameter + _SHADOW_SHARE * diameter
    starts = np.maximum(np.floor(centre_yx - reach), 0).astype(int)
    stops = np.minimum(np.ceil(centre_yx + reach), size_hw).astype(int)

    height, width = (_SUPERSAMPLING * (stops - starts)).tolist()
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    offset_xy = (centre_yx - starts)[::-1]
    for fill, outline in _outlines(rng, category.name):
        points = _SUPERSAMPLING * (0.5 * diameter * outline + offset_xy) - 0.5
        draw.polygon(points.ravel().tolist(), fill=fill)
    return _Object(
        category_id=category.id,
        window=(slice(starts[0], stops[0]), slice(starts[1], stops[1])),
        coverage=_to_float(canvas.reduce(_SUPERSAMPLING)),
        diameter=diameter,
    )


def _outlines(rng: np.random.Generator, name: str) -> list[tuple[int, Float32]]:
    """Return the fills and outlines, (K, 2) x and y in a circle of radius 1, that make a shape."""
    flatness = rng.uniform(0.75, 1)
    if name == "disc":
        outlines = [(255, _circle() * (1, flatness))]
    elif name == "box":
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (1, rng.uniform(0.45, 1))
        outlines = [(255, corners / np.linalg.norm(corners[0]))]
    elif name == "star":
        radii = np.where(np.arange(10) % 2 == 0, 1, rng.uniform(0.42, 0.55))
        outlines = [(255, radii[:, None] * _circle(10))]
    else:
        ring = _circle() * (1, flatness)
        outlines = [(255, ring), (0, rng.uniform(0.45, 0.62) * ring)]
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    return [(fill, (outline @ turn).astype(np.float32)) for fill, outline in outlines]


def _circle(num_points: int = 72) -> npt.NDArray[np.float64]:
    angles = np.arange(num_points) * (2 * np.pi / num_points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _lay(rng: np.random.Generator, image: Float32, new: _Object) -> None:
    """Paint an object and its shadow onto the image, (H, W, 3) float32."""
    below = image[new.window]
    blurred = _blurred(new.coverage, 0.06 * new.diameter + 1)
    # The light comes from the upper left, and edges are darker than the middle.
    shift = int(0.04 * new.diameter) + 1
    shadow = np.pad(blurred, ((shift, 0), (shift, 0)), mode="edge")[:-shift, :-shift]
    below *= 1 - 0.45 * shadow[..., None]
    relief = 0.72 + 0.32 * blurred
    y, x = np.indices(new.coverage.shape, np.float32)
    light = 1.1 - 0.22 * (y + x) / sum(new.coverage.shape)
    surface = _pattern(rng, new.coverage.shape) * (relief * light)[..., None]
    below += new.coverage[..., None] * (surface - below)


def _pattern(rng: np.random.Generator, size_hw: tuple[int, ...]) -> Float32:
    """Return (h, w, 3) float32: two tones of a colour in stripes, checks, clouds or a gradient."""
    colour = _OBJECT_COLOURS[rng.integers(len(_OBJECT_COLOURS))]
    other = colour + rng.uniform(0.25, 0.45) * ((255 if rng.random() < 0.5 else 30) - colour)
    kind = rng.integers(5)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 14)
    y, x = np.indices(size_hw, np.float32)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    if kind == 0:
        mix = np.clip(0.5 + 2 * np.sin(along * (2 * np.pi / period)), 0, 1)
    elif kind == 1:
        waves = np.sin(along * (np.pi / period)) * np.sin(across * (np.pi / period))
        mix = np.clip(0.5 + 4 * waves, 0, 1)
    elif kind == 2:
        mix = _clouds(rng, size_hw, period)
    elif kind == 3:
        mix = (along - along.min()) / np.ptp(along)
    else:
        mix = np.zeros(size_hw, np.float32)
    return np.asarray(colour + mix[..., None] * (other - colour), np.float32)


def _table(rng: np.random.Generator, size_hw: tuple[int, int]) -> Float32:
    """Return an empty table: (H, W, 3) float32, 0..255."""
    colour = _TABLE_COLOURS[rng.integers(len(_TABLE_COLOURS))]
    tones = 0.7 * _clouds(rng, size_hw, 60) + 0.3 * _clouds(rng, size_hw, 9)
    y, x = np.indices(size_hw, np.float32)
    if rng.random() < 0.5:  # the grain of wood
        angle, period = rng.uniform(0, np.pi), rng.uniform(8, 24)
        along = x * np.cos(angle) + y * np.sin(angle)
        tones += 0.2 * np.sin(along * (2 * np.pi / period) + 9 * tones)
    light = (1.1 - 0.24 * (y + x) / sum(size_hw)) * (0.86 + 0.2 * tones)
    return np.asarray(colour * light[..., None], np.float32)


def _clouds(rng: np.random.Generator, size_hw: tuple[int, ...], period: float) -> Float32:
    """Return smooth noise: (h, w) float32, 0..1, with spots as large as the period in pixels."""
    height, width = size_hw
    spots = rng.random((int(height / period) + 2, int(width / period) + 2), np.float32)
    smooth = Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32).clip(0, 1)


def _grain(rng: np.random.Generator, size_hw: tuple[int, int], strength: float) -> Float32:
    return np.float32(strength) * rng.standard_normal((*size_hw, 1), np.float32)


def _blurred(coverage: Float32, radius: float) -> Float32:
    grey = Image.fromarray((255 * coverage).astype(np.uint8))
    return _to_float(grey.filter(ImageFilter.GaussianBlur(radius)))


def _to_float(grey: Image.Image) -> Float32:
    return np.asarray(grey, np.float32) / np.float32(255)
