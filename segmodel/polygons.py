"""Masks as one polygon each, for formats that have no runs."""

from typing import Any

import contourpy
import numpy as np
import numpy.typing as npt
from matplotlib.path import Path

from segmodel.rle import decode_crop
from segmodel.schema import Rle

Float64 = npt.NDArray[np.float64]


def outline(rle: Rle) -> Float64:
    """Return the outer contour of a mask as one polygon.

    The contour runs between pixel centres (marching squares by contourpy), so that what fills a
    polygon by pixel centres gives the mask back. Two things are lost: holes are filled, with all that
    lies in them; and pieces are joined by bridges of no width, there and back, as Ultralytics'
    `merge_multi_segment` joins COCO's, so that what draws outlines too adds a line between them.

    Args:
        rle: A mask of (H, W) pixels.

    Returns:
        (P, 2) float64, xy, pixels, 0..W and 0..H, not closed; (0, 2) for an empty mask.

    Raises:
        ValueError: The counts are damaged, or do not fit the size.
    """
    top, left, crop = decode_crop(rle)
    if not crop.size:
        return np.zeros((0, 2))
    # Row and column 0 are the border, and a pixel's centre lies half a pixel from its corner.
    offset = np.array([left, top]) - 0.5
    polygon, *pieces = (ring + offset for ring in _outer_rings(np.pad(crop, 1)))
    for piece in pieces:
        polygon = _joined(polygon, piece)
    return polygon


def _outer_rings(mask: npt.NDArray[np.bool_]) -> list[Float64]:
    """Return the contours of the pieces that lie in no other piece's hole, largest first."""
    generator = contourpy.contour_generator(
        z=mask.astype(np.float32), fill_type=contourpy.FillType.OuterOffset
    )
    filled: Any = generator.filled(0.5, 2)
    # Of each piece its rings, one behind the other: the outer one is first, and closed.
    rings = [_without_collinear(p[: o[1] - 1]) for p, o in zip(*filled, strict=True)]
    outer: list[Float64] = []
    for ring in sorted(rings, key=lambda ring: -_area(ring)):
        if not any(Path(other).contains_point(ring[0]) for other in outer):
            outer.append(ring)
    return outer


def _without_collinear(ring: Float64) -> Float64:
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    corners: Float64 = ring[turns]
    return corners


def _area(ring: Float64) -> float:
    x, y = ring.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _joined(polygon: Float64, piece: Float64) -> Float64:
    """Go from the polygon to a piece, around it, and back the same way."""
    start = _nearest(polygon, piece[0])
    first = _nearest(piece, polygon[start])
    around = np.roll(piece, -first, axis=0)
    return np.concatenate([polygon[: start + 1], around, around[:1], polygon[start:]])


def _nearest(points: Float64, point: Float64) -> int:
    return int(((points - point) ** 2).sum(axis=1).argmin())
