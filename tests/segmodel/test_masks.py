"""`segmodel.masks` against its plain reference: paste, threshold, `pycocotools` encode."""

import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pycocotools.mask as coco
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection import roi_heads

from segmodel import masks
from segmodel import rle as rle_
from segmodel.schema import Float32, Rle

CANVASES = [(1, 1), (1, 3000), (3000, 1), (37, 53), (61, 67), (120, 160), (250, 90)]
MASK_SIZES = [1, 7, 14, 28]
# pycocotools decodes by a protocol that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Kind = Callable[[np.random.Generator, int, int], Float32]

# Where torch's own kernels disagree with each other, and so its builds for different CPUs.
TIE = 1e-6
EXACT = torch.backends.cpu.get_cpu_capability() == "AVX2"


# --- The plain reference ------------------------------------------------------------------------


def covers_canvas(boxes_xyxy: Float32, m: int, size_hw: tuple[int, int]) -> Any:
    """Say for each box whether it has a pixel on the canvas; if none, torchvision may raise."""
    boxes = roi_heads.expand_boxes(torch.from_numpy(boxes_xyxy), (m + 2) / m).to(torch.int64)
    x0, y0, x1, y1 = boxes.numpy().T
    height, width = size_hw
    first_x, last_x = np.maximum(x0, 0), np.minimum(x1, width - 1)
    first_y, last_y = np.maximum(y0, 0), np.minimum(y1, height - 1)
    return (first_x <= last_x) & (first_y <= last_y)


def paste(mask_probs: Float32, boxes_xyxy: Float32, size_hw: tuple[int, int]) -> Float32:
    """Return the probabilities on the canvas, (N, H, W) float32; zeros for a box outside of it."""
    pasted = np.zeros((len(mask_probs), *size_hw), np.float32)
    on = covers_canvas(boxes_xyxy, mask_probs.shape[-1], size_hw)
    if on.any():
        probs, boxes = torch.from_numpy(mask_probs[on])[:, None], torch.from_numpy(boxes_xyxy[on])
        pasted[on] = roi_heads.paste_masks_in_image(probs, boxes, size_hw)[:, 0].numpy()
    return pasted


def plain_encode(binary: Any) -> list[Rle]:
    rles = coco.encode(np.asfortranarray(binary.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]


def above(pasted: Float32, threshold: float) -> Any:
    return (torch.from_numpy(pasted) > threshold).numpy()


def count_ties(
    mask_probs: Float32, boxes_xyxy: Float32, size_hw: tuple[int, int], threshold: float = 0.5
) -> int:
    """Compare bytes with the reference; return how many masks differ, in ties and nothing else."""
    pasted = paste(mask_probs, boxes_xyxy, size_hw)
    actual = masks.encode(mask_probs, boxes_xyxy, size_hw, threshold)
    expected = plain_encode(above(pasted, threshold))
    assert len(actual) == len(expected)
    ties = 0
    for rle, plain_rle, probs in zip(actual, expected, pasted, strict=True):
        if rle != plain_rle:
            prove_ties(rle, probs, threshold)
            ties += 1
    return ties


def prove_ties(rle: Rle, pasted: Float32, threshold: float) -> None:
    """Fail unless an encoding is canonical and differs from the reference only in ties."""
    binary = coco.decode(rle).astype(bool)
    assert plain_encode(binary[None]) == [rle]
    differing = binary != above(pasted, threshold)
    assert differing.any()
    assert (np.abs(pasted[differing] - threshold) < TIE).all()


# --- What is drawn ------------------------------------------------------------------------------


def smooth(rng: np.random.Generator, num: int, m: int) -> Float32:
    offsets = np.arange(m)[:, None] - np.arange(m)
    blur = np.exp(-0.5 * (offsets / max(m / 8, 0.5)) ** 2)
    field = blur @ rng.normal(size=(num, m, m)) @ blur
    field /= field.std()
    return (1 / (1 + np.exp(-3 * field))).astype(np.float32)


def noise(rng: np.random.Generator, num: int, m: int) -> Float32:
    return rng.random((num, m, m), dtype=np.float32)


def full(rng: np.random.Generator, num: int, m: int) -> Float32:
    return np.broadcast_to(rng.uniform(0.5, 1, (num, 1, 1)), (num, m, m)).astype(np.float32)


def empty(rng: np.random.Generator, num: int, m: int) -> Float32:
    return np.broadcast_to(rng.uniform(0, 0.5, (num, 1, 1)), (num, m, m)).astype(np.float32)


def half(rng: np.random.Generator, num: int, m: int) -> Float32:
    """Halves of ones: columns or rows, low or high. Their outlines are full of exact ties."""
    probs = np.zeros((num, m, m), np.float32)
    for i in range(num):
        rows = slice(m // 2, None) if i % 2 else slice(0, m // 2)
        probs[i, rows] = 1
        if i % 4 >= 2:
            probs[i] = probs[i].T
    return probs


def binary_noise(rng: np.random.Generator, num: int, m: int) -> Float32:
    return (rng.random((num, m, m)) > 0.5).astype(np.float32)


def single_pixel(rng: np.random.Generator, num: int, m: int) -> Float32:
    probs = np.zeros((num, m, m), np.float32)
    probs[np.arange(num), rng.integers(0, m, num), rng.integers(0, m, num)] = 1
    return probs


KINDS = [smooth, noise, full, empty, half, binary_noise, single_pixel]


def draw_boxes(rng: np.random.Generator, size_hw: tuple[int, int]) -> Float32:
    """Draw two boxes of each of twelve kinds; a few of them lie outside of the canvas."""
    height, width = size_hw
    unit = np.sort(rng.uniform(0, 1, (12, 2, 2)), axis=1)
    beyond = np.sort(rng.uniform(-0.5, 1.5, (12, 2, 2)), axis=1)
    kinds = unit.copy()
    kinds[1, 0] = 0  # at the upper left corner
    kinds[2, 1] = 1  # at the lower right corner
    kinds[3] = [[0, 0], [1, 1]]  # the canvas
    kinds[4, :, 1] = [0, 1]  # full height
    kinds[5, :, 0] = [0, 1]  # full width
    kinds[6] = beyond[6]
    kinds[7] = [[-0.7, -0.3], [1.2, 1.6]]  # around the canvas
    kinds[8, 1] = kinds[8, 0] + 0.5 / np.array([width, height])  # less than one pixel
    kinds[9, 1] = kinds[9, 0]  # nothing
    kinds[10] = kinds[10, ::-1]  # negative
    kinds[11, 1] = kinds[11, 0] + rng.uniform(0, 60, 2) / [width, height]  # ATen's small kernel
    boxes = (kinds * [width, height]).reshape(12, 4).astype(np.float32)
    return np.concatenate([boxes, np.round(boxes)])


# --- Parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", MASK_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_the_reference(kind: Kind, m: int) -> None:
    rng = np.random.default_rng([m, KINDS.index(kind)])
    num_masks = num_ties = 0
    for size_hw in CANVASES * 2:
        boxes_xyxy = draw_boxes(rng, size_hw)
        num_masks += len(boxes_xyxy)
        num_ties += count_ties(kind(rng, len(boxes_xyxy), m), boxes_xyxy, size_hw)
    assert num_masks == 24 * 14
    # Masks of ones have ties along their whole outline; where torch rounds otherwise, a few show.
    common = kind in (full, half, binary_noise, single_pixel)
    assert num_ties <= (0 if EXACT else num_masks // (10 if common else 1000))


@pytest.mark.parametrize("size_hw", [(480, 640), (1080, 1920)])
@pytest.mark.parametrize("kind", [smooth, noise, half])
def test_bytes_of_the_reference_on_photographs(kind: Kind, size_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(size_hw)
    boxes_xyxy = draw_boxes(rng, size_hw)
    if size_hw[0] > 1000:
        boxes_xyxy = boxes_xyxy[::2]
    assert count_ties(kind(rng, len(boxes_xyxy), 28), boxes_xyxy, size_hw) <= (0 if EXACT else 2)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_values_at_the_threshold(threshold: float) -> None:
    rng = np.random.default_rng(5)
    boxes_xyxy = draw_boxes(rng, (120, 160))
    probs = smooth(rng, len(boxes_xyxy), 14)
    steps = rng.integers(-3, 4, (12, 14, 14)) * np.spacing(np.float32(threshold))
    probs[:12] = np.clip(threshold + steps, 0, 1)
    assert count_ties(probs, boxes_xyxy, (120, 160), threshold) <= (0 if EXACT else 12)


@pytest.mark.parametrize("m", MASK_SIZES)
def test_both_sides_of_the_border_between_the_kernels_of_torch(m: int) -> None:
    rng = np.random.default_rng(m)
    heights = np.tile(np.arange(20, 108), 3)
    widths = np.repeat([127, 128, 129], 88) - heights
    # Expanded, they reach from 0.5 to the size - 0.5, and cover as many pixels.
    sizes_wh = np.stack([widths, heights], axis=1)
    halves = (sizes_wh - 1) / 2 * m / (m + 2)
    boxes_xyxy = np.concatenate([sizes_wh / 2 - halves, sizes_wh / 2 + halves], axis=1)
    boxes_xyxy = boxes_xyxy.astype(np.float32)
    assert count_ties(binary_noise(rng, len(boxes_xyxy), m), boxes_xyxy, (130, 130)) <= (
        0 if EXACT else len(boxes_xyxy) // 5
    )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    box=st.tuples(*[st.floats(-200, 300, width=32)] * 4),
    size_hw=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    m=st.sampled_from(MASK_SIZES),
    seed=st.integers(0, 99),
)
def test_any_box(box: tuple[float, ...], size_hw: tuple[int, int], m: int, seed: int) -> None:
    probs = noise(np.random.default_rng(seed), 1, m)
    count_ties(probs, np.array([box], np.float32), size_hw)


def test_the_proof_fails_on_a_wrong_pixel() -> None:
    pasted = paste(
        np.full((1, 7, 7), 0.9, np.float32), np.array([[2, 2, 9, 9]], np.float32), (12, 12)
    )
    wrong = above(pasted, 0.5)
    wrong[0, 5, 5] = False
    with pytest.raises(AssertionError):
        prove_ties(plain_encode(wrong)[0], pasted[0], 0.5)


# --- Edges --------------------------------------------------------------------------------------


def test_no_masks() -> None:
    probs, boxes_xyxy = np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32)
    assert masks.encode(probs, boxes_xyxy, (480, 640)) == []
    assert rle_.areas([]).shape == (0,)
    assert rle_.areas([]).dtype == np.float32
    assert rle_.bounding_boxes([]).shape == (0, 4)


@pytest.mark.parametrize(
    "box",
    [
        [-50, 5, -20, 15],
        [80, 5, 99, 15],
        [5, -50, 15, -20],
        [5, 60, 15, 90],
        [15, 5, 5, 15],
        [1e9, 1e9, 2e9, 2e9],
        [-3e38, 0, -2e38, 9],
        [-3e38, 0, 3e38, 9],
        [np.nan, 5, 15, 15],
        [5, 5, np.inf, 15],
        [5, -np.inf, 15, np.inf],
    ],
)
def test_a_box_outside_or_not_finite_is_empty(box: list[float]) -> None:
    probs = np.ones((1, 28, 28), np.float32)
    rle = masks.encode(probs, np.array([box], np.float32), (40, 60))[0]
    assert rle == plain_encode(np.zeros((1, 40, 60), bool))[0]


@pytest.mark.parametrize("far", [1e6, 1e12, 1e17, 1e30])
def test_a_huge_box_shows_its_middle(far: float) -> None:
    probs = np.ones((2, 28, 28), np.float32)
    probs[1, 10:18, 10:18] = 0
    boxes_xyxy = np.array([[-far, -far, far, far]] * 2, np.float32)
    rles = masks.encode(probs, boxes_xyxy, (40, 60))
    assert rle_.areas(rles).tolist() == [40 * 60, 0]


def test_nan_is_below_and_spreads_no_further_than_its_neighbours() -> None:
    rng = np.random.default_rng(9)
    boxes_xyxy = draw_boxes(rng, (120, 160))
    probs = smooth(rng, len(boxes_xyxy), 14)
    probs[:, 3, 4] = np.nan
    count_ties(probs, boxes_xyxy, (120, 160))
    rle = masks.encode(np.full((1, 7, 7), np.nan, np.float32), boxes_xyxy[3:4], (120, 160))
    assert rle_.areas(rle).tolist() == [0]


def test_values_outside_of_0_to_1_are_interpolated_as_they_are() -> None:
    rng = np.random.default_rng(10)
    boxes_xyxy = draw_boxes(rng, (120, 160))
    probs = rng.normal(scale=100, size=(len(boxes_xyxy), 14, 14)).astype(np.float32)
    assert masks.encode(probs, boxes_xyxy, (120, 160)) == plain_encode(
        above(paste(probs, boxes_xyxy, (120, 160)), 0.5)
    )


def test_input_that_is_not_contiguous() -> None:
    rng = np.random.default_rng(11)
    boxes_xyxy = draw_boxes(rng, (120, 160))[::2]
    probs = noise(rng, 24, 14)[::2, ::-1].transpose(0, 2, 1)
    together = masks.encode(np.ascontiguousarray(probs), boxes_xyxy.copy(), (120, 160))
    assert masks.encode(probs, boxes_xyxy, (120, 160)) == together


def test_masks_do_not_depend_on_their_batch() -> None:
    rng = np.random.default_rng(12)
    boxes_xyxy, probs = draw_boxes(rng, (250, 350)), noise(rng, 24, 28)
    alone = [
        masks.encode(probs[i : i + 1], boxes_xyxy[i : i + 1], (250, 350))[0] for i in range(24)
    ]
    assert masks.encode(probs, boxes_xyxy, (250, 350)) == alone


def test_memory_does_not_grow_with_the_canvas() -> None:
    probs = np.ones((3, 28, 28), np.float32)
    boxes_xyxy = np.array([[0, 0, 9, 9], [6e4, 6e4, 7e4, 7e4], [0, 0, 6e4, 9]], np.float32)
    small = masks.encode(probs[:1], boxes_xyxy[:1], (20, 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rles = masks.encode(probs, boxes_xyxy, (65_000, 65_000))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # As bytes, this canvas has 4 GiB.
    assert grown_kib < 64 << 10
    assert rle_.bounding_boxes(rles)[:2].tolist() == [
        rle_.bounding_boxes(small)[0].tolist(),
        [59_999, 59_999, 5_001, 5_001],
    ]
    assert rle_.areas(rles)[0] == rle_.areas(small)[0]


def test_threads_give_the_same_bytes() -> None:
    rng = np.random.default_rng(13)
    boxes_xyxy, probs = draw_boxes(rng, (480, 640)), noise(rng, 24, 28)
    expected = masks.encode(probs, boxes_xyxy, (480, 640))
    with ThreadPoolExecutor(4) as pool:
        for rles in pool.map(lambda _: masks.encode(probs, boxes_xyxy, (480, 640)), range(16)):
            assert rles == expected
    assert masks._encode.targetoptions["nogil"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mask_probs": np.zeros((2, 7, 7))},
            "mask_probs must be a NumPy array of float32, not float64",
        ),
        (
            {"mask_probs": torch.zeros(2, 7, 7)},
            "mask_probs must be a NumPy array of float32, not Tensor",
        ),
        (
            {"mask_probs": np.zeros((2, 7, 8), np.float32)},
            r"mask_probs must have a shape \(N, M, M\)",
        ),
        ({"mask_probs": np.zeros((2, 1, 7, 7), np.float32)}, "mask_probs must have a shape"),
        ({"mask_probs": np.zeros((2, 0, 0), np.float32)}, "M of 1 or more"),
        ({"boxes_xyxy": np.zeros((2, 4), np.int64)}, "boxes_xyxy must be a NumPy array of float32"),
        ({"boxes_xyxy": np.zeros((3, 4), np.float32)}, r"boxes_xyxy must have a shape \(2, 4\)"),
        ({"size_hw": (0, 9)}, "two whole numbers of 1 or more"),
        ({"size_hw": (9, 9, 3)}, "two whole numbers of 1 or more"),
        ({"size_hw": (9, 9.5)}, "two whole numbers of 1 or more"),
        ({"size_hw": (2**16, 2**16)}, "more than COCO's 4294967295 pixels"),
        ({"threshold": -0.1}, "threshold must be in 0..1"),
        ({"threshold": np.nan}, "threshold must be in 0..1"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "mask_probs": np.zeros((2, 7, 7), np.float32),
        "boxes_xyxy": np.zeros((2, 4), np.float32),
        "size_hw": (9, 9),
    }
    with pytest.raises(ValueError, match=message):
        masks.encode(**(arguments | change))


# --- What is asked of encodings -----------------------------------------------------------------


def test_decode_areas_and_boxes_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(14)
    boxes_xyxy = draw_boxes(rng, (120, 160))
    rles = masks.encode(noise(rng, 24, 28), boxes_xyxy, (120, 160))
    for rle in rles:
        mask = rle_.decode(rle)
        assert mask.dtype == np.bool_
        assert np.array_equal(mask, coco.decode(rle))
        assert plain_encode(mask[None]) == [rle]
    assert rle_.areas(rles).tolist() == [rle_.decode(rle).sum() for rle in rles]
    assert np.array_equal(rle_.bounding_boxes(rles), coco.toBbox(rles))


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 3000), (3000, 1), (1500, 2100)])
def test_decode_of_full_and_empty_masks(size_hw: tuple[int, int]) -> None:
    for value in (False, True):
        mask = np.full(size_hw, value)
        assert np.array_equal(rle_.decode(plain_encode(mask[None])[0]), mask)


@pytest.mark.parametrize("counts", ["", "o", "99", "4", "\x20", "5L9", "z9"])
def test_decode_refuses_damaged_counts(counts: str) -> None:
    with pytest.raises(ValueError, match="counts of this encoding"):
        rle_.decode({"size": [3, 3], "counts": counts})


def test_areas_of_any_number_of_masks() -> None:
    one: Rle = {
        "size": [20, 30],
        "counts": coco.encode(np.ones((20, 30), np.uint8, "F"))["counts"].decode(),
    }
    assert rle_.areas([one] * 369).tolist() == [600] * 369
