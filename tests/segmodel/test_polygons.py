"""A mask's polygon gives the mask back, but for holes and the bridges between pieces."""

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from segmodel.polygons import outline
from segmodel.rle import decode
from segmodel.scenes import scene
from segmodel.schema import Rle

Bool = npt.NDArray[np.bool_]
SIZE = HEIGHT, WIDTH = 60, 80


def encoded(mask: Bool) -> Rle:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def filled(polygon: npt.NDArray[np.float64], size_hw: tuple[int, int]) -> Bool:
    """Fill by pixel centres, even and odd: (H, W) bool."""
    x0, y0 = polygon.T
    x1, y1 = np.roll(polygon, -1, axis=0).T
    rows, columns = np.arange(size_hw[0]) + 0.5, np.arange(size_hw[1]) + 0.5
    inside = np.zeros(size_hw, np.bool_)
    for row, y in enumerate(rows):
        crosses = (y0 <= y) != (y1 <= y)
        at = x0[crosses] + (y - y0[crosses]) / (y1 - y0)[crosses] * (x1 - x0)[crosses]
        inside[row] = (at[:, None] > columns).sum(axis=0) % 2 == 1
    return inside


def rectangle(top: int, left: int, bottom: int, right: int) -> Bool:
    mask = np.zeros(SIZE, np.bool_)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        rectangle(20, 30, 21, 31),
        rectangle(0, 0, 60, 80),
        rectangle(0, 10, 60, 11),
        rectangle(5, 0, 6, 80),
        rectangle(0, 0, 1, 1),
        rectangle(59, 79, 60, 80),
        rectangle(10, 10, 30, 30) | rectangle(25, 25, 50, 70),
    ],
    ids=["pixel", "full", "column", "row", "first", "last", "two that overlap"],
)
def test_a_piece_without_holes_comes_back_exactly(mask: Bool) -> None:
    polygon = outline(encoded(mask))
    assert (filled(polygon, SIZE) == mask).all()
    assert polygon.min() >= 0
    assert (polygon <= (WIDTH, HEIGHT)).all()


def test_an_empty_mask_has_no_points() -> None:
    assert outline(encoded(np.zeros(SIZE, np.bool_))).shape == (0, 2)


def test_points_on_straight_lines_are_left_out() -> None:
    # Four corners, each cut by half a pixel.
    assert len(outline(encoded(rectangle(10, 10, 40, 60)))) == 8


def test_pieces_are_joined_without_loss() -> None:
    pieces = rectangle(5, 5, 20, 20) | rectangle(30, 40, 50, 70) | rectangle(2, 70, 6, 74)
    assert (filled(outline(encoded(pieces)), SIZE) == pieces).all()


def test_holes_are_filled_with_all_that_lies_in_them() -> None:
    ring = rectangle(10, 10, 50, 70) & ~rectangle(20, 20, 40, 60)
    island = rectangle(28, 38, 32, 42)
    polygon = outline(encoded(ring | island))
    assert (filled(polygon, SIZE) == rectangle(10, 10, 50, 70)).all()


def test_what_is_lost_on_scenes_is_holes() -> None:
    """Visible parts of objects that lie over one another have pieces; rings have holes."""
    masks = [mask for seed in range(12) for mask in scene(seed, (96, 128)).masks]
    with_holes = 0
    for mask in masks:
        again, solid = filled(outline(encoded(mask)), mask.shape), _without_holes(mask)
        with_holes += bool((mask != solid).any())
        assert (again == solid).all()
        polygon = outline(encoded(mask)).ravel().tolist()
        merged = coco_mask.merge(coco_mask.frPyObjects([polygon], *mask.shape))
        by_coco = decode({"size": list(mask.shape), "counts": merged["counts"].decode()})
        assert (by_coco == solid).all()
        # Half of the smallest rings is hole.
        assert (again & mask).sum() / again.sum() > 0.5
    assert 0 < with_holes < len(masks) / 2


def _without_holes(mask: Bool) -> Bool:
    """The pixels that cannot be reached from the border without the mask, by flooding."""
    image = Image.fromarray(np.pad(mask, 1).astype(np.uint8) * 255).copy()
    ImageDraw.floodfill(image, (0, 0), 128)
    return np.asarray(image)[1:-1, 1:-1] != 128
