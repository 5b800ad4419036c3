import numpy as np
import pytest
from pycocotools import mask as coco_mask

from segmodel.drawing import COLOURS, grid, overlay

GREY = np.full((120, 160, 3), 100, np.uint8)


def square(top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros(GREY.shape[:2], np.bool_)
    mask[top : top + side, left : left + side] = True
    return mask


def test_mask_is_tinted_and_outlined() -> None:
    mask = square(40, 50, 20)
    picture = overlay(GREY, [[50, 40, 20, 20]], [""], mask[None])
    assert (picture.shape, picture.dtype) == (GREY.shape, np.uint8)
    assert (GREY == 100).all()
    assert tuple(picture[40, 60]) == COLOURS[0]
    tint = 0.58 * 100 + 0.42 * np.array(COLOURS[0])
    np.testing.assert_allclose(picture[50, 60], tint, atol=1)
    np.testing.assert_array_equal(picture[70:, :], GREY[70:, :])


def test_outline_closes_around_holes_and_at_the_border() -> None:
    mask = square(0, 0, 30)
    mask[10:20, 10:20] = False
    picture = overlay(GREY, [[0, 0, 30, 30]], [""], mask[None])
    for row, column in ((0, 15), (15, 0), (9, 15), (15, 20)):
        assert tuple(picture[row, column]) == COLOURS[0]
    assert tuple(picture[15, 15]) == (100, 100, 100)


def test_encodings_and_arrays_look_the_same() -> None:
    masks = np.stack([square(40, 50, 20), square(10, 100, 31), square(0, 0, 0)])
    rles = []
    for mask in masks:
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        rles.append({"size": [120, 160], "counts": rle["counts"].decode()})
    boxes = [[50, 40, 20, 20], [100, 10, 31, 31], [0, 0, 0, 0]]
    labels = ["a", "b", "c"]
    np.testing.assert_array_equal(
        overlay(GREY, boxes, labels, masks), overlay(GREY, boxes, labels, rles)
    )


def test_instances_differ_in_colour() -> None:
    boxes = [[10 * i, 80, 8, 8] for i in range(9)]
    picture = overlay(GREY, boxes, [""] * 9)
    colours = [tuple(picture[87, 10 * i + 4]) for i in range(9)]
    assert colours == [*COLOURS, *COLOURS[:2]]


def test_captions_are_legible_and_stay_inside() -> None:
    """Above, within and below boxes, each somewhere else; none leaves the image."""
    boxes = [[20, 60, 40, 40], [22, 61, 40, 40], [140, 0, 20, 20], [0, 110, 30, 10]]
    plain = overlay(GREY, boxes, [""] * 4)
    named = overlay(GREY, boxes, ["disc", "star", "ring", "box"], scores=[0.5, None, 1, 0.25])
    changed = (plain != named).any(axis=2)
    assert changed[45:60, 20:70].any()
    assert changed[:16, 120:].any()
    for i in range(4):
        plate = (named == COLOURS[i]).all(axis=2) & changed
        assert plate.sum() > 40
    ink = changed & ((named > 230).all(axis=2) | (named < 25).all(axis=2))
    assert ink.sum() > 40


def test_scores_are_written() -> None:
    box = [[20, 60, 100, 40]]
    assert (overlay(GREY, box, ["disc"]) != overlay(GREY, box, ["disc"], scores=[0.5])).any()
    np.testing.assert_array_equal(
        overlay(GREY, box, ["disc"]), overlay(GREY, box, ["disc"], scores=[None])
    )


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 300), (8, 8), (30, 20), (1200, 900)])
def test_any_size(size_hw: tuple[int, int]) -> None:
    image = np.zeros((*size_hw, 3), np.uint8)
    masks = np.ones((1, *size_hw), np.bool_)
    picture = overlay(image, [[0, 0, size_hw[1], size_hw[0]]], ["something long"], masks, [0.5])
    assert picture.shape == image.shape
    assert picture.any()


def test_nothing_to_draw() -> None:
    np.testing.assert_array_equal(overlay(GREY, [], [], np.zeros((0, 120, 160), np.bool_)), GREY)


def test_boxes_beyond_the_image() -> None:
    boxes = [[-20.5, -3.25, 500, 500], [170, 130, 5, 5], [30.2, 30.7, 0.1, 0.1]]
    assert overlay(GREY, boxes, ["a", "b", "c"]).shape == GREY.shape


def test_counts_must_agree() -> None:
    with pytest.raises(ValueError, match=r"longer|shorter"):
        overlay(GREY, [[0, 0, 5, 5]], [])
    with pytest.raises(ValueError, match=r"longer|shorter"):
        overlay(GREY, [[0, 0, 5, 5]], ["a"], np.zeros((0, 120, 160), np.bool_))


def test_grid() -> None:
    images = [
        np.full((10, 20, 3), 1, np.uint8),
        np.full((30, 10, 3), 2, np.uint8),
        np.full((4, 4, 3), 3, np.uint8),
    ]
    sheet = grid(images, columns=2, pad=5)
    assert (sheet.shape, sheet.dtype) == ((65, 45, 3), np.uint8)
    assert (sheet[10:20, :20] == 1).all()
    assert (sheet[:30, 30:40] == 2).all()
    assert (sheet[48:52, 8:12] == 3).all()
    assert (sheet == 255).sum() == sheet.size - 3 * (200 + 300 + 16)
    assert grid(images[:1], columns=4).shape == (10, 20, 3)


@pytest.mark.parametrize(("num_images", "columns"), [(0, 1), (1, 0)])
def test_a_grid_needs_images_and_columns(num_images: int, columns: int) -> None:
    with pytest.raises(ValueError, match="grid"):
        grid([GREY] * num_images, columns)
