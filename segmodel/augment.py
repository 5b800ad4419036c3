"""Transforms of training samples: flip, turn, resize, crop, paste, colours, and all of them in turn.

Each takes a sample and returns another one; the first stays as it was, but both may share memory. Each
draw comes from the generator that the caller gives, so that a seed gives the same samples again.
Masks are moved as crops of their boxes: full-size ones are made nowhere here either.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch.nn import functional

from segmodel.colours import jitter_colours
from segmodel.schema import Float32, Int64
from segmodel.targets import Crop, Sample, UInt8, tight

Flip = Literal["none", "horizontal", "both"]

# What lies outside of an image: the default mean of the network's inputs, 0 after normalisation, as
# the padding of a batch is.
FILL_RGB = (124, 116, 104)

# An instance of which less is left, as a share of its area or in pixels, is not to be found, and not
# to be called background either. A tenth: people label truncated objects too, and of less it can
# mostly not be told what it was. 4 pixels are a quarter of a cell of the finest feature map.
MIN_VISIBLE = 0.1
_MIN_PIXELS = 4

# How often a window is drawn around an instance rather than anywhere: in a large picture with few
# small instances, nearly all windows would be empty; some of them still have to be seen.
_WINDOW_WITH_INSTANCE = 0.9
# Each instance of the donor is pasted this often: "Simple Copy-Paste" takes a random subset.
_PASTED_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training samples are varied. The defaults do not vary them: they only resize.

    Attributes:
        min_size: An image is scaled so that its shorter side has this many pixels ...
        max_size: ... unless its longer side would have more than this many.
        size_hw: With it, the scaled image is then cropped and padded to this size at a random place
            (large-scale jitter, https://arxiv.org/abs/2012.07177); without it, it is kept whole.
        scale: Range of a factor by which the scaled image grows, drawn uniformly, as there:
            (0.1, 2.0) is theirs. Of a log-uniform one, half of the draws from that range would be
            below 0.45: most of the canvas would be padding. Without `size_hw`, `max_size` still
            holds after it.
        flip: Each of the axes named is flipped in every second image.
        rotate: Whether to turn by a multiple of 90 degrees.
        colour: Strength of the change of colours, 0..1.
        copy_paste: How often instances of another image are pasted, 0..1.

    Raises:
        ValueError: A value is out of its range.
    """

    min_size: int
    max_size: int
    size_hw: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    flip: Flip = "none"
    rotate: bool = False
    colour: float = 0.0
    copy_paste: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(
                f"min_size ({self.min_size}) must be 1 or more, and at most max_size ({self.max_size})"
            )
        if self.size_hw is not None and min(self.size_hw) < 1:
            raise ValueError(f"size_hw must be 1 or more, not {self.size_hw}")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale must be a range of numbers above 0, not {self.scale}")
        if self.flip not in get_args(Flip):
            raise ValueError(f"unknown flip {self.flip!r}: use {', '.join(get_args(Flip))}")
        for name, share in [("colour", self.colour), ("copy_paste", self.copy_paste)]:
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be 0..1, not {share}")


def augment(
    sample: Sample,
    augmentation: Augmentation,
    rng: np.random.Generator,
    donor: Sample | None = None,
) -> Sample:
    """Vary a sample at random.

    Colours come before the padding, which is to stay neutral, and after pasting, so that what is
    pasted changes as its surroundings do.

    Args:
        sample: Of any size.
        augmentation: Says how.
        rng: Its state decides; the same state gives the same sample.
        donor: Where instances are copied from, of any size; needed for `copy_paste` only.

    Returns:
        A sample with an image of `augmentation.size_hw`, or of the size to which it was scaled; it
        may be a view, with negative strides, and it may be the given sample itself.
    """
    view = _view(sample, augmentation, rng)
    if donor is not None and rng.random() < augmentation.copy_paste:
        view = paste(view, _view(donor, augmentation, rng), rng)
    if augmentation.colour > 0:
        view = jitter_colours(view, augmentation.colour, rng)
    if augmentation.size_hw is None:
        return view
    top, left = _place(view.image.shape[:2], augmentation.size_hw, rng)
    return crop(view, top, left, augmentation.size_hw)


def flip_horizontal(sample: Sample) -> Sample:
    """Exchange left and right; the image is a view."""
    width = sample.image.shape[1]
    x1, y1, x2, y2 = sample.crowds_xyxy.T
    masks = [
        Crop(top=m.top, left=width - m.left - m.mask.shape[1], mask=m.mask[:, ::-1])
        for m in sample.masks
    ]
    crowds_xyxy = np.stack([width - x2, y1, width - x1, y2], axis=1)
    return _moved(sample, sample.image[:, ::-1], masks, crowds_xyxy)


def flip_vertical(sample: Sample) -> Sample:
    """Exchange top and bottom; the image is a view."""
    height = sample.image.shape[0]
    x1, y1, x2, y2 = sample.crowds_xyxy.T
    masks = [
        Crop(top=height - m.top - m.mask.shape[0], left=m.left, mask=m.mask[::-1])
        for m in sample.masks
    ]
    crowds_xyxy = np.stack([x1, height - y2, x2, height - y1], axis=1)
    return _moved(sample, sample.image[::-1], masks, crowds_xyxy)


def rotate90(sample: Sample, times: int) -> Sample:
    """Turn counter-clockwise by 90 degrees, `times` times, as `np.rot90`; the image is a view."""
    if times % 4 >= 2:
        sample = flip_vertical(flip_horizontal(sample))
    return flip_vertical(_transpose(sample)) if times % 2 else sample


def fit(sample: Sample, min_size: int, max_size: int) -> Sample:
    """Resize to the size that `settings.network_size` gives: what the network sees when it predicts."""
    return resize(sample, _fitted(sample.image.shape[:2], min_size, max_size))


def resize(sample: Sample, size_hw: tuple[int, int]) -> Sample:
    """Resize a sample; instances that vanish are left out.

    The image is interpolated as `inference.Predictor` does it, bilinear and without antialiasing,
    but in 8 bits: columns and rows one after the other, each rounded to the nearest level, so a value
    may be off by one. Masks take the pixel in which the centre of the new one lies: i of H comes from
    floor((i + 0.5) h / H). That is torch's `nearest-exact`, without its roundings: where the centre
    lies between two pixels, torch may take the other one.

    Args:
        sample: Of (h, w) pixels.
        size_hw: 1 or more each.
    """
    old_hw: tuple[int, int] = sample.image.shape[:2]
    if size_hw == old_hw:
        return sample
    rows, columns = (_sources(old, new) for old, new in zip(old_hw, size_hw, strict=True))
    masks = [_resized(mask, rows, columns) for mask in sample.masks]
    growth = np.array(size_hw[::-1], np.float32) / np.array(old_hw[::-1], np.float32)
    crowds_xyxy = sample.crowds_xyxy * np.tile(growth, 2)
    resized = _moved(sample, _resized_image(sample.image, size_hw), masks, crowds_xyxy)
    return replace(resized, scale=sample.scale * float(growth.mean()))


def crop(
    sample: Sample,
    top: int,
    left: int,
    size_hw: tuple[int, int],
    *,
    min_visible: float = MIN_VISIBLE,
) -> Sample:
    """Cut a window, which may reach beyond the image and is `FILL_RGB` there.

    Args:
        sample: Of any size.
        top: First row of the window, in rows of the image; may be negative.
        left: First column, likewise.
        size_hw: Of the window, 1 or more each.
        min_visible: An instance of which a smaller share is left, 0..1, or fewer than 4 pixels,
            becomes a region to be ignored.
    """
    height, width = size_hw
    image = sample.image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if image.shape[:2] != size_hw:
        filled = np.full((height, width, 3), FILL_RGB, np.uint8)
        y, x = max(-top, 0), max(-left, 0)
        filled[y : y + image.shape[0], x : x + image.shape[1]] = image
        image = filled
    crowds_xyxy = sample.crowds_xyxy - np.array([left, top, left, top], np.float32)
    crowds_xyxy = crowds_xyxy.clip(0, np.array([width, height, width, height], np.float32))
    crowds_xyxy = crowds_xyxy[(crowds_xyxy[:, 2:] > crowds_xyxy[:, :2]).all(axis=1)]
    masks = [_cut(mask, top, left, size_hw) for mask in sample.masks]
    return _remaining(_moved(sample, image, sample.masks, crowds_xyxy), masks, min_visible)


def paste(
    sample: Sample,
    donor: Sample,
    rng: np.random.Generator,
    *,
    min_visible: float = MIN_VISIBLE,
) -> Sample:
    """Paste a random half of another sample's instances, with hard edges, upon a sample.

    "Simple Copy-Paste is a Strong Data Augmentation Method", https://arxiv.org/abs/2012.07177. Where
    the sizes differ, the donor is cut or laid at a random place.

    Args:
        sample: What is pasted upon. What it hides leaves the masks beneath.
        donor: Its instances come last in the result; its crowds do not.
        rng: Decides which instances, and where.
        min_visible: As of `crop`, for what is hidden and for what is cut.
    """
    height, width = sample.image.shape[:2]
    top, left = _place(donor.image.shape[:2], (height, width), rng)
    donor = crop(donor, top, left, (height, width), min_visible=min_visible)
    chosen = np.flatnonzero(rng.random(len(donor.masks)) < _PASTED_SHARE)
    pasted = replace(
        donor, labels=donor.labels[chosen], masks=tuple(donor.masks[n] for n in chosen)
    )
    image = sample.image.copy()
    for mask in pasted.masks:
        window = _window(mask)
        np.copyto(image[window], donor.image[window], where=mask.mask[:, :, None])
    below = _remaining(replace(sample, image=image), _uncovered(sample, pasted), min_visible)
    labels = np.concatenate([below.labels, pasted.labels])
    return replace(below, labels=labels, masks=below.masks + pasted.masks)


def _view(sample: Sample, augmentation: Augmentation, rng: np.random.Generator) -> Sample:
    """Scale a sample, cut from it what fits into `size_hw`, flip and turn it."""
    factor = rng.uniform(*augmentation.scale)
    size_hw = augmentation.size_hw
    longest = augmentation.max_size if size_hw is None else augmentation.max_size * factor
    view = resize(sample, _fitted(sample.image.shape[:2], augmentation.min_size * factor, longest))
    turns = int(rng.integers(4)) if augmentation.rotate else 0
    if size_hw is not None:
        # It is turned afterwards, when there are fewer pixels.
        height, width = size_hw if turns % 2 == 0 else size_hw[::-1]
        view = _cropped_within(view, height, width, rng)
    if augmentation.flip != "none" and rng.random() < 0.5:
        view = flip_horizontal(view)
    if augmentation.flip == "both" and rng.random() < 0.5:
        view = flip_vertical(view)
    return rotate90(view, turns)


def _fitted(size_hw: tuple[int, int], min_size: float, max_size: float) -> tuple[int, int]:
    """Return the size of a scaled image, as `settings.network_size`, of sizes that may be broken."""
    height, width = size_hw
    scale = min(min_size / min(size_hw), max_size / max(size_hw))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def _cropped_within(sample: Sample, height: int, width: int, rng: np.random.Generator) -> Sample:
    """Cut a window of at most this size, mostly around an instance, that does not leave the image."""
    image_hw: tuple[int, int] = sample.image.shape[:2]
    window_hw = min(height, image_hw[0]), min(width, image_hw[1])
    around = None
    if sample.masks and rng.random() < _WINDOW_WITH_INSTANCE:
        around = sample.masks[rng.integers(len(sample.masks))]
    return crop(sample, *_place(image_hw, window_hw, rng, around), window_hw)


def _place(
    image_hw: tuple[int, int],
    window_hw: tuple[int, int],
    rng: np.random.Generator,
    around: Crop | None = None,
) -> tuple[int, int]:
    """Draw the first row and column of a window that lies in the image or, if larger, around it.

    Args:
        image_hw: Of the image.
        window_hw: Of the window.
        rng: Decides.
        around: The middle of its box is to be in the window.
    """
    starts = []
    for axis, (length, size) in enumerate(zip(image_hw, window_hw, strict=True)):
        first, last = min(0, length - size), max(0, length - size)
        if around is not None:
            middle = (around.top, around.left)[axis] + around.mask.shape[axis] // 2
            first, last = max(first, middle - size + 1), min(last, middle)
        starts.append(int(rng.integers(first, last, endpoint=True)))
    return starts[0], starts[1]


def _transpose(sample: Sample) -> Sample:
    masks = [Crop(top=m.left, left=m.top, mask=m.mask.T) for m in sample.masks]
    image, crowds_xyxy = sample.image.transpose(1, 0, 2), sample.crowds_xyxy[:, [1, 0, 3, 2]]
    return _moved(sample, image, masks, crowds_xyxy)


def _moved(
    sample: Sample, image: UInt8, masks: Sequence[Crop | None], crowds_xyxy: Float32
) -> Sample:
    """Return a sample whose instances are elsewhere, or nowhere: None."""
    kept = [n for n, mask in enumerate(masks) if mask is not None]
    return Sample(
        image_id=sample.image_id,
        image=image,
        labels=sample.labels[kept],
        masks=tuple(mask for mask in masks if mask is not None),
        crowds_xyxy=crowds_xyxy,
        scale=sample.scale,
    )


def _remaining(sample: Sample, remnants: Sequence[Crop | None], min_visible: float) -> Sample:
    """Replace masks by what is left of them, or by a region to be ignored where that is too little."""
    enough = []
    for whole, remnant in zip(sample.masks, remnants, strict=True):
        if remnant is not None:
            least = max(_MIN_PIXELS, min_visible * np.count_nonzero(whole.mask))
            enough.append(np.count_nonzero(remnant.mask) >= least)
    left = _moved(sample, sample.image, remnants, sample.crowds_xyxy)
    ignored_xyxy = left.boxes_xyxy[~np.array(enough, np.bool_)]
    return _moved(
        left,
        left.image,
        [mask if is_enough else None for mask, is_enough in zip(left.masks, enough, strict=True)],
        np.concatenate([left.crowds_xyxy, ignored_xyxy]),
    )


def _sources(old: int, new: int) -> Int64:
    """Return the pixel of an axis of `old` that each one of `new` takes; ascending."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


def _resized(mask: Crop, rows: Int64, columns: Int64) -> Crop | None:
    """Resize a mask; `rows` and `columns` are the sources of the whole image's."""
    height, width = mask.mask.shape
    top, bottom = np.searchsorted(rows, [mask.top, mask.top + height]).tolist()
    left, right = np.searchsorted(columns, [mask.left, mask.left + width]).tolist()
    taken = mask.mask[rows[top:bottom] - mask.top]
    return tight(top, left, taken[:, columns[left:right] - mask.left])


def _resized_image(image: UInt8, size_hw: tuple[int, int]) -> UInt8:
    # torch refuses negative strides and warns of read-only memory: only those are copied.
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    height, width, _ = pixels.shape
    # The stride of a batch of one is arbitrary, but by it torch tells what lies next to what: with
    # any other, this takes nearly twice as long, and what it gives has to be transposed.
    batch = pixels.as_strided((1, 3, height, width), (3 * height * width, 1, 3 * width, 3))
    resized = functional.interpolate(batch, size=size_hw, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def _cut(mask: Crop, top: int, left: int, size_hw: tuple[int, int]) -> Crop | None:
    y, x = mask.top - top, mask.left - left
    height, width = size_hw
    if 0 <= y <= height - mask.mask.shape[0] and 0 <= x <= width - mask.mask.shape[1]:
        return Crop(top=y, left=x, mask=mask.mask)
    inside = mask.mask[max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0)]
    return tight(max(y, 0), max(x, 0), inside)


def _uncovered(sample: Sample, covers: Sample) -> list[Crop | None]:
    """Return what is left of a sample's masks under others."""
    a, b = sample.boxes_xyxy[:, None], covers.boxes_xyxy
    touched = ((a[..., :2] < b[:, 2:]) & (b[:, :2] < a[..., 2:])).all(axis=-1)
    return [
        _without(mask, [covers.masks[n] for n in np.flatnonzero(near)])
        for mask, near in zip(sample.masks, np.asarray(touched), strict=True)
    ]


def _without(mask: Crop, covers: Sequence[Crop]) -> Crop | None:
    if not covers:
        return mask
    remnant = mask.mask.copy()
    for cover in covers:
        part = _cut(cover, mask.top, mask.left, mask.mask.shape)
        if part is not None:
            remnant[_window(part)] &= ~part.mask
    return tight(mask.top, mask.left, remnant)


def _window(mask: Crop) -> tuple[slice, slice]:
    height, width = mask.mask.shape
    return slice(mask.top, mask.top + height), slice(mask.left, mask.left + width)
