"""Pictures for people: what was found, drawn over the image, and many of them side by side."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from segmodel.rle import decode
from segmodel.schema import Rle

Bool = npt.NDArray[np.bool_]
UInt8 = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # first and last column and row: left, top, right, bottom

# Okabe and Ito's colours, which the colour-blind can tell apart, without black.
# Order: neighbours differ in lightness too.
COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (0, 114, 178),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
)

_FILL_STRENGTH = 0.42
# From this luminance on, black letters have more contrast than white ones.
_BLACK_ON = 125
# A line is one pixel wide for each of these in the shorter side, and a caption's letters have this
# share of it, within limits between which the built-in font is legible and leaves the image seen.
_PIXELS_PER_LINE = 300
_LETTER_SHARE, _SMALLEST_LETTER, _LARGEST_LETTER = 1 / 26, 10, 28


def overlay(
    image: UInt8,
    boxes_xywh: Sequence[Sequence[float]],
    labels: Sequence[str],
    masks: Sequence[Rle] | Bool | None = None,
    scores: Sequence[float | None] | None = None,
) -> UInt8:
    """Draw N detections, or annotations, over an image.

    Args:
        image: (H, W, 3) uint8, RGB; not changed.
        boxes_xywh: N boxes, COCO's [x, y, width, height] in pixels.
        labels: N names; where a caption does not fit into the image it is left out.
        masks: N encodings or (N, H, W) bool; None where there are boxes only.
        scores: N scores, written behind the names; None where there are none.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: There are not as many boxes, labels and masks.
    """
    height, width = image.shape[:2]
    line = max(1, round(min(height, width) / _PIXELS_PER_LINE))
    painted = image.copy()
    if masks is not None:
        for i, (mask, _) in enumerate(zip(masks, boxes_xywh, strict=True)):
            pixels = mask if isinstance(mask, np.ndarray) else decode(mask)
            _paint_mask(painted, pixels, _colour(i), line)

    canvas = Image.fromarray(painted)
    draw = ImageDraw.Draw(canvas)
    for i, (x, y, w, h) in enumerate(boxes_xywh):
        # The last pixel inside of the box; a box of less than one pixel still shows.
        corner = (x, y, max(x, x + w - 1), max(y, y + h - 1))
        draw.rectangle(corner, outline=_colour(i), width=line)
    captions = [
        label if scores is None or scores[i] is None else f"{label} {scores[i]:.2f}"
        for i, label in enumerate(labels)
    ]
    _write_captions(draw, boxes_xywh, captions)
    return np.array(canvas)


def grid(images: Sequence[UInt8], columns: int, pad: int = 8) -> UInt8:
    """Arrange images, (H, W, 3) uint8 of any sizes, row by row on white, each amid its cell.

    Raises:
        ValueError: There is no image, or no column.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid needs images and columns, not {len(images)} and {columns}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    shape = (rows * (height + pad) - pad, columns * (width + pad) - pad, 3)
    sheet = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top = i // columns * (height + pad) + (height - image.shape[0]) // 2
        left = i % columns * (width + pad) + (width - image.shape[1]) // 2
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def _colour(i: int) -> Colour:
    return COLOURS[i % len(COLOURS)]


def _paint_mask(image: UInt8, mask: Bool, colour: Colour, line: int) -> None:
    """Tint a mask, (H, W) bool, and draw its outline inside of it."""
    if not mask.any():
        return
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    part, inside = image[window], mask[window]
    outline = inside & ~_eroded(inside, line)
    part[inside] = (1 - _FILL_STRENGTH) * part[inside] + _FILL_STRENGTH * np.array(colour)
    part[outline] = colour


def _eroded(mask: Bool, width: int) -> Bool:
    """Take a border off a mask, (h, w) bool; what lies outside of the array is outside of the mask."""
    h, w = mask.shape
    padded = np.pad(mask, width)
    narrow = np.logical_and.reduce([padded[:, i : i + w] for i in range(2 * width + 1)])
    core = np.logical_and.reduce([narrow[i : i + h] for i in range(2 * width + 1)])
    return np.asarray(core, np.bool_)


def _write_captions(
    draw: ImageDraw.ImageDraw, boxes_xywh: Sequence[Sequence[float]], captions: Sequence[str]
) -> None:
    image_w, image_h = draw.im.size
    letter = np.clip(min(image_h, image_w) * _LETTER_SHARE, _SMALLEST_LETTER, _LARGEST_LETTER)
    font = ImageFont.load_default(round(letter))
    plates: list[Box] = []
    for i, (box, caption) in enumerate(zip(boxes_xywh, captions, strict=True)):
        _, _, right, bottom = draw.textbbox((0, 0), caption, font=font)
        size_hw = (round(bottom) + 3, round(right) + 4)
        if size_hw[1] > image_w or 3 * size_hw[0] > image_h:
            continue
        plate = _free_plate(box, size_hw, (image_h, image_w), plates)
        plates.append(plate)
        colour = _colour(i)
        draw.rectangle(plate, fill=colour)
        luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        ink = "black" if luminance > _BLACK_ON else "white"
        draw.text((plate[0] + 2, plate[1] + 1), caption, font=font, fill=ink)


def _free_plate(
    box_xywh: Sequence[float], size_hw: tuple[int, int], image_hw: tuple[int, int], taken: list[Box]
) -> Box:
    """Return the first place for a caption, above, in or below its box, that covers no other."""
    x, y, _, h = (round(value) for value in box_xywh)
    height, width = size_hw
    left = max(0, min(x, image_hw[1] - width))
    tops = [top for top in (y - height, y, y + h) if 0 <= top <= image_hw[0] - height] or [0]
    plates = [(left, top, left + width - 1, top + height - 1) for top in tops]
    return next(
        (plate for plate in plates if not any(_meet(plate, one) for one in taken)), plates[0]
    )


def _meet(a: Box, b: Box) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
