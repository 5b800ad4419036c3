"""Rows of truth to samples, samples to tables and back, all against full-size masks."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pycocotools.mask as coco
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmodel import rle as rle_
from segmodel.images import decode
from segmodel.schema import Rle
from segmodel.targets import (
    SAMPLES,
    Crop,
    Sample,
    TargetError,
    from_table,
    tight,
    to_sample,
    to_table,
)

DATA = Path(__file__).parents[3] / "shared" / "data"

# pycocotools decodes by a protocol that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Bool = npt.NDArray[np.bool_]

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 20)
SIZES = st.tuples(SIDES, SIDES)

LABELS = {7: 1, 90: 2}


def full_of(size_hw: tuple[int, int], *places: tuple[Any, Any]) -> Bool:
    mask = np.zeros(size_hw, np.bool_)
    for place in places:
        mask[place] = True
    return mask


EVERY, BOTH = slice(None), slice(2, 4)
MASKS = {
    "empty": full_of((5, 7)),
    "full": full_of((5, 7), (EVERY, EVERY)),
    "one pixel": full_of((5, 7), (2, 3)),
    "first pixel": full_of((5, 7), (0, 0)),
    "last pixel": full_of((5, 7), (4, 6)),
    "top and bottom": full_of((5, 7), (0, EVERY), (4, EVERY)),
    "left and right": full_of((5, 7), (EVERY, 0), (EVERY, 6)),
    "first column": full_of((5, 7), (EVERY, 0)),
    "last column": full_of((5, 7), (EVERY, 6)),
    # One run, from the foot of a column to the head of the next.
    "around the edge": full_of((5, 7), (4, 2), (0, 3)),
    "two columns as one run": full_of((5, 7), (EVERY, BOTH)),
    "a hole": ~full_of((5, 7), (2, 3)),
    "the only pixel": full_of((1, 1), (0, 0)),
    "no pixel of one": full_of((1, 1)),
    "a row": full_of((1, 9), (0, BOTH)),
    "a column": full_of((9, 1), (BOTH, 0)),
}


def encode(mask: Bool) -> Rle:
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode()}


def laid(size_hw: Sequence[int], top: int, left: int, mask: Bool) -> Bool:
    """Return a full-size mask with a crop at its place."""
    canvas = np.zeros(size_hw, np.bool_)
    height, width = mask.shape
    canvas[top : top + height, left : left + width] = mask
    return canvas


def random_masks(rng: np.random.Generator, size_hw: tuple[int, int]) -> list[Bool]:
    shares = rng.choice([0, 0.02, 0.3, 1], rng.integers(6))
    return [rng.random(size_hw) < share for share in shares]


def detection(mask: Bool | None, category_id: int = 7, **change: Any) -> dict[str, Any]:
    return {
        "category_id": category_id,
        "category": "bee",
        "iscrowd": 0,
        # Wrong on purpose: boxes are those of the masks.
        "bbox": [0.0, 0.0, 1.0, 1.0],
        "segmentation": None if mask is None else encode(mask),
        **change,
    }


def row(size_hw: tuple[int, int], *detections: Mapping[str, Any]) -> dict[str, Any]:
    height, width = size_hw
    return {
        "image_id": "a.tar#1",
        "height": height,
        "width": width,
        "detections": list(detections),
    }


def black(size_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    return np.zeros((*size_hw, 3), np.uint8)


# --- Encodings to crops -------------------------------------------------------------------------


def check_crop(rle: Rle, expected: Bool) -> None:
    """Fail unless the crop, laid at its place, is the mask, and its first and last columns hold some."""
    np.testing.assert_array_equal(rle_.decode(rle), expected)
    top, left, crop = rle_.decode_crop(rle)
    assert crop.dtype == np.bool_
    assert (top, crop.shape[0]) == (0, expected.shape[0])
    np.testing.assert_array_equal(laid(expected.shape, top, left, crop), expected)
    columns = np.flatnonzero(expected.any(axis=0))
    if len(columns):
        assert (left, left + crop.shape[1]) == (columns[0], columns[-1] + 1)
    else:
        assert crop.shape == (expected.shape[0], 0)


@pytest.mark.parametrize("name", MASKS)
def test_crop_of_an_encoding(name: str) -> None:
    check_crop(encode(MASKS[name]), MASKS[name])


@given(SEEDS, SIZES)
def test_crop_of_any_encoding(seed: int, size_hw: tuple[int, int]) -> None:
    for mask in random_masks(np.random.default_rng(seed), size_hw):
        check_crop(encode(mask), mask)


@given(SIZES, st.data())
def test_crop_of_runs_that_are_empty(size_hw: tuple[int, int], data: st.DataObject) -> None:
    """Others write runs of no pixels; two of them in a row say nothing."""
    height, width = size_hw
    lengths = data.draw(st.lists(st.integers(0, 9), max_size=12))
    ends = np.minimum(np.cumsum(lengths, dtype=np.int64), height * width)
    runs = np.diff([0, *ends, height * width]).tolist()
    packed = coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    rle: Rle = {"size": [height, width], "counts": packed["counts"].decode()}
    check_crop(rle, coco.decode(packed).astype(np.bool_))


@pytest.mark.parametrize("counts", ["", "P", "é", "0", "Q1", "5O"])
def test_crop_of_damaged_counts(counts: str) -> None:
    rle: Rle = {"size": [3, 3], "counts": counts}
    for function in (rle_.decode, rle_.decode_crop):
        with pytest.raises(ValueError, match=r"damaged|do not describe|ascii"):
            function(rle)


@given(SEEDS, SIZES)
def test_tight(seed: int, size_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    for mask in [*random_masks(rng, size_hw), np.zeros((0, 3), np.bool_), np.zeros((3, 0), bool)]:
        crop = tight(2, 5, mask)
        assert (crop is None) == (not mask.any())
        if crop is not None:
            lines = [crop.mask[0], crop.mask[-1], crop.mask[:, 0], crop.mask[:, -1]]
            assert all(line.any() for line in lines)
            back = laid(mask.shape, crop.top - 2, crop.left - 5, crop.mask)
            np.testing.assert_array_equal(back, mask)


# --- Rows to samples ----------------------------------------------------------------------------


@given(SEEDS, SIZES)
def test_sample_of_a_row(seed: int, size_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    drawn = random_masks(rng, size_hw)
    categories = rng.choice(list(LABELS), len(drawn)).tolist()
    image = black(size_hw)
    one = to_sample(row(size_hw, *map(detection, drawn, categories)), image, LABELS)
    kept = [n for n, mask in enumerate(drawn) if mask.any()]
    assert one.image is image
    assert one.image_id == "a.tar#1"
    assert one.labels.dtype == np.int64
    assert one.labels.tolist() == [LABELS[categories[n]] for n in kept]
    assert one.crowds_xyxy.shape == (0, 4)
    for crop, n in zip(one.masks, kept, strict=True):
        np.testing.assert_array_equal(laid(size_hw, crop.top, crop.left, crop.mask), drawn[n])
    boxes = one.boxes_xyxy
    assert boxes.dtype == np.float32
    xywh = rle_.bounding_boxes([encode(drawn[n]) for n in kept]) if kept else np.zeros((0, 4))
    np.testing.assert_array_equal(boxes[:, :2], xywh[:, :2])
    np.testing.assert_array_equal(boxes[:, 2:] - boxes[:, :2], xywh[:, 2:])


def test_a_row_without_detections_is_a_sample() -> None:
    one = to_sample(row((4, 6)), black((4, 6)), LABELS)
    assert one.masks == ()
    assert one.boxes_xyxy.shape == one.crowds_xyxy.shape == (0, 4)
    assert one.labels.shape == (0,)


def test_crowds_are_regions_whatever_their_mask_and_category() -> None:
    crowd = detection(None, category_id=4, iscrowd=1, bbox=[1.5, 2.0, 3.0, 1.0])
    one = to_sample(row((4, 6), crowd, detection(full_of((4, 6), (1, 1)))), black((4, 6)), LABELS)
    assert one.crowds_xyxy.dtype == np.float32
    assert one.crowds_xyxy.tolist() == [[1.5, 2.0, 4.5, 3.0]]
    assert one.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("size_hw", "bad", "says"),
    [
        ((6, 4), detection(full_of((6, 4), (1, 1))), "are for 6 x 4 pixels, the image has 4 x 6"),
        ((4, 6), detection(None), "has no mask"),
        ((4, 6), detection(full_of((4, 6), (1, 1)), 8), r"category 8 \(bee\) is not one of"),
        (
            (4, 6),
            detection(None, segmentation={"size": [4, 6], "counts": "Q1"}),
            "do not describe 4 x 6",
        ),
        ((4, 6), detection(None, segmentation={"size": [4, 6], "counts": "P"}), "damaged"),
        ((4, 6), detection(None, segmentation={"size": [4, 6], "counts": "é"}), "ascii"),
    ],
)
def test_rows_that_cannot_be_trained_on(
    size_hw: tuple[int, int], bad: dict[str, Any], says: str
) -> None:
    good = detection(full_of((4, 6), (2, 2)))
    with pytest.raises(TargetError, match=rf"^a\.tar#1: .*{says}"):
        to_sample(row(size_hw, good, bad), black((4, 6)), LABELS)


def test_a_row_of_an_image_that_could_not_be_read() -> None:
    unread = {**row((4, 6)), "height": None, "width": None}
    with pytest.raises(TargetError, match="None x None"):
        to_sample(unread, black((4, 6)), LABELS)


# --- Samples to tables and back -----------------------------------------------------------------


def random_sample(seed: int, size_hw: tuple[int, int]) -> Sample:
    rng = np.random.default_rng(seed)
    crops = [crop for mask in random_masks(rng, size_hw) if (crop := tight(0, 0, mask))]
    return Sample(
        image_id=f"shard.tar#{seed}",
        image=rng.integers(0, 256, (*size_hw, 3), np.uint8),
        labels=rng.integers(1, 90, len(crops)),
        masks=tuple(crops),
        crowds_xyxy=rng.uniform(0, 20, (rng.integers(3), 4)).astype(np.float32),
    )


def assert_same(a: Sample, b: Sample) -> None:
    assert a.image_id == b.image_id
    for old, new in [
        (a.image, b.image),
        (a.labels, b.labels),
        (a.crowds_xyxy, b.crowds_xyxy),
        (a.boxes_xyxy, b.boxes_xyxy),
    ]:
        assert old.dtype == new.dtype
        assert old.shape == new.shape
        np.testing.assert_array_equal(old, new)
    for one, two in zip(a.masks, b.masks, strict=True):
        assert (one.top, one.left, two.mask.dtype) == (two.top, two.left, np.bool_)
        np.testing.assert_array_equal(one.mask, two.mask)


@given(st.lists(st.tuples(SEEDS, SIZES), max_size=5))
def test_samples_survive_a_table(drawn: list[tuple[int, tuple[int, int]]]) -> None:
    samples = [random_sample(seed, size_hw) for seed, size_hw in drawn]
    table = to_table(samples)
    assert table.schema.equals(SAMPLES)
    for old, new in zip(samples, from_table(table), strict=True):
        assert_same(old, new)
    # As Ray hands it on: cut, in several chunks, through a stream.
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, SAMPLES) as writer:
        writer.write_table(pa.concat_tables([table.slice(1), table.slice(0, 1)]))
    received = from_table(pa.ipc.open_stream(sink.getvalue()).read_all())
    for old, new in zip([*samples[1:], *samples[:1]], received, strict=True):
        assert_same(old, new)


def test_masks_travel_as_bits() -> None:
    big = Crop(top=1, left=2, mask=np.ones((40, 50), np.bool_))
    odd = Crop(top=0, left=0, mask=np.ones((1, 3), np.bool_))
    sample = Sample(
        image_id="one",
        image=black((60, 60)),
        labels=np.array([1, 2]),
        masks=(big, odd, big)[:2],
        crowds_xyxy=np.zeros((0, 4), np.float32),
    )
    table = to_table([sample])
    assert len(table["bits"][0].as_py()) == -(-(40 * 50 + 3) // 8)
    assert_same(from_table(table)[0], sample)


def test_images_with_other_strides_survive_a_table() -> None:
    sample = random_sample(5, (6, 9))
    turned = Sample(
        image_id="turned",
        image=sample.image[::-1, ::-1].transpose(1, 0, 2),
        labels=sample.labels[:0],
        masks=(),
        crowds_xyxy=sample.crowds_xyxy,
    )
    assert_same(from_table(to_table([turned]))[0], turned)


# --- Real annotations ---------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.exists(), reason="the shared photos are not beside the checkout")
def test_photos_of_coco() -> None:
    annotated = json.loads((DATA / "coco/annotations/instances_train.json").read_text("utf-8"))
    labels = {c["id"]: n for n, c in enumerate(annotated["categories"], start=1)}
    num_masks = 0
    for entry in annotated["images"]:
        size_hw = entry["height"], entry["width"]
        own = [a for a in annotated["annotations"] if a["image_id"] == entry["id"]]
        detections = [{**annotation, "category": ""} for annotation in own]
        image = np.broadcast_to(np.uint8(0), (*size_hw, 3))
        sample = to_sample({**row(size_hw), "detections": detections}, image, labels)
        plain = [coco.decode(a["segmentation"]).astype(bool) for a in own if not a["iscrowd"]]
        plain = [mask for mask in plain if mask.any()]
        for crop, mask in zip(sample.masks, plain, strict=True):
            np.testing.assert_array_equal(laid(size_hw, crop.top, crop.left, crop.mask), mask)
        assert len(sample.crowds_xyxy) == sum(a["iscrowd"] for a in own)
        assert_same(from_table(to_table([sample]))[0], sample)
        num_masks += len(plain)
    assert num_masks > 700


@pytest.mark.skipif(not DATA.exists(), reason="the shared photos are not beside the checkout")
def test_photos_have_the_size_of_their_annotations() -> None:
    annotated = json.loads((DATA / "coco/annotations/instances_train.json").read_text("utf-8"))
    for entry in annotated["images"][:5]:
        image = decode((DATA / "coco/images" / entry["file_name"]).read_bytes())
        size_hw = entry["height"], entry["width"]
        assert to_sample(row(size_hw), image, {}).image.shape == (*size_hw, 3)
