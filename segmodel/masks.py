"""Mask probabilities and boxes to COCO run-length encodings, and what to ask of such encodings.

`encode` gives the bytes of torchvision's `paste_masks_in_image`, `> threshold` and
`pycocotools.mask.encode` without pasting: no canvas exists, and only pixels near a mask's outline
are interpolated.

The route of one mask: `_place` (its box to two `_Axis`), `_trace` (its columns to *toggles*),
`_write_counts` (toggles to text). Toggles are ascending positions on the canvas, column by column,
at which the mask starts or stops. Two equal ones cancel: so a run that goes on in the next column
is one.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from numba.extending import intrinsic

from segmodel.kernels import kernel
from segmodel.schema import Float32, Int64, Rle

# COCO's counts are 32 bits wide.
MAX_CANVAS_PIXELS = 2**32 - 1

# `F.interpolate` has two bilinear kernels, which differ in the last bit, and takes the first one up
# to this sum of output height and width: `_use_vectorized_kernel_cond_2d` in ATen's
# native/cpu/UpSampleKernel.cpp.
_SMALL_KERNEL_PIXELS = 128

# Interpolation of values in 0..1 errs by fewer than 16 roundings of 2^-24; beyond twice that, and
# something for a threshold of 0, the side of the threshold is certain.
_ROUNDING, _TINY = np.float32(2.0**-19), np.float32(1e-30)

# Coordinates beyond this are cut to it, so that sums and differences fit into 64 bits.
_FARTHEST = np.float32(2.0**60)

# A count has at most 33 bits and a sign, in groups of 5.
_MAX_COUNT_BYTES = 7

_ZERO, _HALF, _ONE, _INFINITY = np.float32(0), np.float32(0.5), np.float32(1), np.float32(np.inf)

_Buffer = TypeVar("_Buffer", npt.NDArray[np.uint8], npt.NDArray[np.int64])


class _Axis(NamedTuple):
    """One axis of a box on the canvas."""

    origin: int  # The box's first pixel, perhaps outside of the canvas,
    length: int  # and how many there are, 1 or more.
    start: int  # The first one on the canvas,
    stop: int  # and the one behind the last; not above `start` where none is on the canvas.
    scale: np.float32  # Source pixels per canvas pixel.
    small: bool  # Whether `F.interpolate` takes its kernel for small outputs.


class _Mask(NamedTuple):
    """One mask, ready to be traced; see `_rows` and `_certain`."""

    columns: Float32
    segments: Int64
    downs: Float32
    small: bool
    threshold: np.float32
    below: np.float32
    above: np.float32


def encode(
    mask_probs: Float32, boxes_xyxy: Float32, size_hw: tuple[int, int], threshold: float = 0.5
) -> list[Rle]:
    """Encode masks as COCO RLE on the whole canvas.

    The arithmetic is, bit for bit, that of torchvision and torch on x86 CPUs with AVX2. Elsewhere
    torch rounds otherwise, and a pixel whose probability is the threshold but for rounding may
    differ.

    Runs without the interpreter's lock. Memory grows with the encodings and with the height of a
    box, never with the area of the canvas.

    Args:
        mask_probs: (N, M, M) float32, 0..1, each over its own box. NaN is below every threshold,
            and so is every pixel that is interpolated from it.
        boxes_xyxy: (N, 4) float32, pixels. They may lie partly or wholly outside of the canvas. A
            box with a coordinate that is not finite, or that overflows when it is expanded, gives
            an empty mask.
        size_hw: Height and width of the canvas, pixels.
        threshold: 0..1; a pixel belongs to the mask where its probability is above it.

    Returns:
        N encodings.

    Raises:
        ValueError: The arguments do not have these types, shapes and ranges.
    """
    _check(mask_probs, boxes_xyxy, size_hw, threshold)
    height, width = map(int, size_hw)
    num_masks, m, _ = mask_probs.shape
    # torchvision's `expand_masks` with padding=1, and transposed: the work goes column by column.
    columns = np.zeros((num_masks, m + 2, m + 2), np.float32)
    columns[:, 1:-1, 1:-1] = mask_probs.transpose(0, 2, 1)
    # Of memory that cannot be written numba would make other kernels, which nothing has warmed up.
    boxes = np.require(boxes_xyxy, requirements=["C", "W"])
    text, ends = _encode(columns, boxes, (height, width), np.float32(threshold))
    counts = text.tobytes().decode("ascii")
    return [
        {"size": [height, width], "counts": counts[start:end]}
        for start, end in pairwise([0, *ends.tolist()])
    ]


def warm_up() -> None:
    """Compile the kernels (seconds), or load them from the cache (a fraction of one); once is enough."""
    encode(np.ones((1, 1, 1), np.float32), np.zeros((1, 4), np.float32), (1, 1))


def _check(mask_probs: Any, boxes_xyxy: Any, size_hw: Any, threshold: float) -> None:
    for name, array in [("mask_probs", mask_probs), ("boxes_xyxy", boxes_xyxy)]:
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"{name} must be a NumPy array of float32, not {kind}")
    shape = mask_probs.shape
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] == 0:
        raise ValueError(f"mask_probs must have a shape (N, M, M) with M of 1 or more, not {shape}")
    if boxes_xyxy.shape != (len(mask_probs), 4):
        raise ValueError(
            f"boxes_xyxy must have a shape ({len(mask_probs)}, 4), one box for each mask, "
            f"not {boxes_xyxy.shape}"
        )
    if len(size_hw) != 2 or any(int(side) != side or side < 1 for side in size_hw):
        raise ValueError(f"size_hw must be two whole numbers of 1 or more, not {size_hw}")
    if int(size_hw[0]) * int(size_hw[1]) > MAX_CANVAS_PIXELS:
        raise ValueError(f"size_hw {size_hw} has more than COCO's {MAX_CANVAS_PIXELS} pixels")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in 0..1, not {threshold}")


def _fused_multiply_add(_context: Any, a: Any, _b: Any, _c: Any) -> Any:
    return a(a, a, a), lambda _context, builder, _signature, args: builder.fma(*args)


# `fused_multiply_add(a, b, c)` is a * b + c, rounded once. All three are float32.
fused_multiply_add: Callable[[np.float32, np.float32, np.float32], np.float32] = intrinsic(
    _fused_multiply_add
)


@kernel
def _encode(
    columns: Float32, boxes_xyxy: Float32, size_hw: tuple[int, int], threshold: np.float32
) -> tuple[npt.NDArray[np.uint8], Int64]:
    """Return the text of all masks, and where each mask's text ends."""
    toggles = np.empty(1024, np.int64)
    text = np.empty(256 * len(columns), np.uint8)
    ends = np.empty(len(columns), np.int64)
    used = 0
    for i in range(len(columns)):
        toggles, count = _trace(columns[i], boxes_xyxy[i], size_hw, threshold, toggles)
        text = _with_room(text, used, _MAX_COUNT_BYTES * (count + 1))
        used = _write_counts(toggles[:count], size_hw[0] * size_hw[1], text, used)
        ends[i] = used
    return text[:used], ends


@kernel
def _with_room(buffer: _Buffer, used: int, more: int) -> _Buffer:
    """Return the buffer, or a copy of it that has room for so much more."""
    if used + more <= len(buffer):
        return buffer
    larger = np.empty(max(used + more, 2 * len(buffer)), buffer.dtype)
    for i in range(used):
        larger[i] = buffer[i]
    return larger


@kernel
def _write_counts(toggles: Int64, num_pixels: int, text: npt.NDArray[np.uint8], used: int) -> int:
    """Write one mask's run lengths as `rleToString` of COCO's maskApi.c; returns where they end."""
    previous, before, last = 0, 0, 0
    for i in range(len(toggles) + 1):
        position = toggles[i] if i < len(toggles) else num_pixels
        if position == last and i == len(toggles):
            break
        run, last = position - last, position
        rest = run - before if i > 2 else run
        before, previous = previous, run
        more = True
        while more:
            group = rest & 31
            rest >>= 5
            more = rest != -1 if group & 16 else rest != 0
            text[used] = group + (80 if more else 48)
            used += 1
    return used


@kernel
def _span(low: np.float32, high: np.float32, m: int) -> tuple[int, int]:
    """Expand one axis of a box for m source pixels, two of them padding, and cut it to pixels.

    Mirrors torchvision's `expand_boxes`. Returns the first pixel and the one behind the last, both
    0 if the box is not finite.
    """
    half = (high - low) * _HALF * np.float32(m / (m - 2))
    centre = (high + low) * _HALF
    first, last = centre - half, centre + half
    if not (np.isfinite(first) and np.isfinite(last)):
        return 0, 0
    origin = int(min(max(first, -_FARTHEST), _FARTHEST))
    return origin, int(min(max(last, -_FARTHEST), _FARTHEST)) + 1


@kernel
def _place(box_xyxy: Float32, size_hw: tuple[int, int], m: int) -> tuple[_Axis, _Axis]:
    """Return the y and the x axis of a box, laid out as by torchvision's `paste_mask_in_image`."""
    left, right = _span(box_xyxy[0], box_xyxy[2], m)
    top, bottom = _span(box_xyxy[1], box_xyxy[3], m)
    height, width = max(bottom - top, 1), max(right - left, 1)
    small = height + width <= _SMALL_KERNEL_PIXELS
    y_scale, x_scale = np.float32(m) / np.float32(height), np.float32(m) / np.float32(width)
    return (
        _Axis(top, height, max(top, 0), min(bottom, size_hw[0]), y_scale, small),
        _Axis(left, width, max(left, 0), min(right, size_hw[1]), x_scale, small),
    )


@kernel
def _source(axis: _Axis, pixel: int, m: int) -> tuple[int, int, np.float32]:
    """Return the two source pixels of a pixel, and the second one's weight.

    Mirrors `compute_source_index_and_lambda` of ATen's UpSample.h. As compiled, the small kernel
    fuses multiplication and subtraction, the other one does not.
    """
    centre = np.float32(pixel - axis.origin) + _HALF
    source = (
        fused_multiply_add(axis.scale, centre, -_HALF)
        if axis.small
        else axis.scale * centre - _HALF
    )
    source = max(source, _ZERO)
    first = min(int(source), m - 1)
    weight = min(max(source - np.float32(first), _ZERO), _ONE)
    return first, min(first + 1, m - 1), weight


@kernel
def _trace(
    columns: Float32,
    box_xyxy: Float32,
    size_hw: tuple[int, int],
    threshold: np.float32,
    toggles: Int64,
) -> tuple[Int64, int]:
    """Find the toggles of one mask; returns their buffer, perhaps a new one, and their number."""
    m = len(columns)
    y_axis, x_axis = _place(box_xyxy, size_hw, m)
    if y_axis.start >= y_axis.stop or x_axis.start >= x_axis.stop:
        return toggles, 0
    segments, downs = _rows(y_axis, m)
    below, above = _certain(columns, threshold)
    mask = _Mask(columns, segments, downs, y_axis.small, threshold, below, above)
    column = np.empty(m, np.float32)
    count = 0
    for x in range(x_axis.start, x_axis.stop):
        toggles = _with_room(toggles, count, len(downs) + 2)
        sample = _source(x_axis, x, m)
        _blend(columns, sample, column)
        count = _trace_column(mask, column, sample, x * size_hw[0], toggles, count)
    return toggles, count


@kernel
def _rows(y_axis: _Axis, m: int) -> tuple[Int64, Float32]:
    """Return where on the canvas each source row's segment begins, and each canvas row's weight.

    The pixels from segments[k] to segments[k + 1] lie between the source rows k and k + 1. Pixel y
    has the weight downs[y - segments[0]] towards the latter.
    """
    segments = np.full(m + 1, y_axis.stop, np.int64)
    downs = np.empty(y_axis.stop - y_axis.start, np.float32)
    row = 0
    for y in range(y_axis.start, y_axis.stop):
        upper, _, downs[y - y_axis.start] = _source(y_axis, y, m)
        while row <= upper:
            segments[row] = y
            row += 1
    return segments, downs


@kernel
def _certain(columns: Float32, threshold: np.float32) -> tuple[np.float32, np.float32]:
    """Return the values below and above which a segment's ends decide for all pixels between."""
    # The bounds on rounding hold in 0..1; outside of it, and for NaN, nothing is certain.
    for value in columns.flat:
        if not _ZERO <= value <= _ONE:
            return -_INFINITY, _INFINITY
    return threshold * (_ONE - _ROUNDING) - _TINY, threshold * (_ONE + _ROUNDING) + _TINY


@kernel
def _blend(columns: Float32, sample: tuple[int, int, np.float32], column: Float32) -> None:
    left, right, to_right = columns[sample[0]], columns[sample[1]], sample[2]
    to_left = _ONE - to_right
    for k in range(len(column)):
        column[k] = fused_multiply_add(left[k], to_left, right[k] * to_right)


@kernel
def _trace_column(
    mask: _Mask,
    column: Float32,
    sample: tuple[int, int, np.float32],
    base: int,
    toggles: Int64,
    count: int,
) -> int:
    """Append the toggles of the canvas column at position `base`; returns how many there are."""
    m = len(column)
    top, inside = mask.segments[0], False
    for k in range(m):
        upper, lower = column[k], column[min(k + 1, m - 1)]
        if inside and upper > mask.above and lower > mask.above:
            continue
        if not inside and upper < mask.below and lower < mask.below:
            continue
        for y in range(mask.segments[k], mask.segments[k + 1]):
            down = mask.downs[y - top]
            if mask.small:
                value = _interpolate(mask.columns, sample, k, down)
            else:
                value = fused_multiply_add(upper, _ONE - down, lower * down)
            if (value > mask.threshold) != inside:
                count = _toggle(toggles, count, base + y)
                inside = not inside
    if inside:
        count = _toggle(toggles, count, base + mask.segments[m])
    return count


@kernel
def _interpolate(
    columns: Float32, sample: tuple[int, int, np.float32], upper: int, down: np.float32
) -> np.float32:
    """Return one pixel as the small kernel computes it: four products, added in its order."""
    left, right, to_right = sample
    to_left, up = _ONE - to_right, _ONE - down
    lower = min(upper + 1, len(columns) - 1)
    total = columns[right, upper] * (up * to_right)
    total = fused_multiply_add(columns[left, upper], up * to_left, total)
    total = fused_multiply_add(columns[left, lower], down * to_left, total)
    return fused_multiply_add(columns[right, lower], down * to_right, total)


@kernel
def _toggle(toggles: Int64, count: int, position: int) -> int:
    if count and toggles[count - 1] == position:
        return count - 1
    toggles[count] = position
    return count + 1
