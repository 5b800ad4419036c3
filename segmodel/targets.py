"""Training samples: an image with its instances, each mask kept as the crop of its own box.

Full-size masks are made nowhere: 100 instances of an 800 x 1333 image would be 427 MB in float32.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segmodel.rle import decode_crop
from segmodel.schema import Float32, Int64

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

# How samples travel from the processes that decode and augment to those that train.
SAMPLES = pa.schema(
    [
        ("image_id", pa.string()),
        ("size_hw", pa.list_(pa.int32())),
        ("pixels", pa.large_binary()),
        ("labels", pa.list_(pa.int64())),
        ("windows", pa.list_(pa.int32())),
        ("bits", pa.binary()),
        ("crowds_xyxy", pa.list_(pa.float32())),
        ("scale", pa.float32()),
    ]
)


class TargetError(ValueError):
    """A row that cannot be trained on; the message names the image and says why."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One mask, cut to its tight box.

    Attributes:
        top: Row of the image that is the crop's first.
        left: Column of the image that is the crop's first.
        mask: (h, w) bool, h and w of 1 or more; its four border lines each hold a pixel.
    """

    top: int
    left: int
    mask: Bool


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image with its N instances.

    Attributes:
        image_id: For messages.
        image: (H, W, 3) uint8, RGB.
        labels: (N,) int64, the network's output index, 1 or more.
        masks: N crops.
        crowds_xyxy: (C, 4) float32, pixels: boxes of uncounted instances, where nothing that is
            found is wrong.
        scale: Pixels of this image for one of the image as it was stored.
    """

    image_id: str
    image: UInt8
    labels: Int64
    masks: tuple[Crop, ...]
    crowds_xyxy: Float32
    scale: float = 1.0

    def __post_init__(self) -> None:
        assert len(self.labels) == len(self.masks)

    @property
    def boxes_xyxy(self) -> Float32:
        """(N, 4) float32, pixels: the tight boxes of the masks."""
        corners = [
            (m.left, m.top, m.left + m.mask.shape[1], m.top + m.mask.shape[0]) for m in self.masks
        ]
        return np.array(corners, np.float32).reshape(-1, 4)


def to_sample(row: Mapping[str, Any], image: UInt8, labels: Mapping[int, int]) -> Sample:
    """Make a sample of a row of truth.

    Crowds become regions to be ignored: their boxes, of whatever category, where COCO's evaluation goes by
    the crowd's mask and category. Empty masks are left out. Boxes are those of the masks, not
    those of the row, since they are to fit the masks after every transform.

    Args:
        row: Of the one schema.
        image: (H, W, 3) uint8, as `images.decode` gives it.
        labels: The network's output index by category id.

    Raises:
        TargetError: The row's size is not the image's, a category is unknown, or a mask is missing.
    """
    if (row["height"], row["width"]) != image.shape[:2]:
        raise TargetError(
            f"{row['image_id']}: the annotations are for {row['height']} x {row['width']} pixels, "
            f"the image has {image.shape[0]} x {image.shape[1]}"
        )
    kept: list[tuple[int, Crop]] = []
    crowds: list[tuple[float, ...]] = []
    for detection in row["detections"]:
        if detection["iscrowd"]:
            x, y, w, h = detection["bbox"]
            crowds.append((x, y, x + w, y + h))
            continue
        crop = _crop(row, detection)
        if crop is not None:
            kept.append((_label(row, detection, labels), crop))
    return Sample(
        image_id=row["image_id"],
        image=image,
        labels=np.array([label for label, _ in kept], np.int64),
        masks=tuple(crop for _, crop in kept),
        crowds_xyxy=np.array(crowds, np.float32).reshape(-1, 4),
    )


def tight(top: int, left: int, mask: Bool) -> Crop | None:
    """Return a crop of a mask, (h, w) bool, that lies at a place of the image; None of an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    inner = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Crop(top=top + int(rows[0]), left=left + int(columns[0]), mask=inner)


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """Return samples as a table of `SAMPLES`, masks as packed bits."""
    columns: list[Any] = [
        [sample.image_id for sample in samples],
        [list(sample.image.shape[:2]) for sample in samples],
        [np.ascontiguousarray(sample.image).data for sample in samples],
        [sample.labels for sample in samples],
        [_windows(sample).reshape(-1) for sample in samples],
        [_bits(sample) for sample in samples],
        [sample.crowds_xyxy.reshape(-1) for sample in samples],
        [sample.scale for sample in samples],
    ]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, SAMPLES, strict=True)]
    return pa.table(arrays, schema=SAMPLES)


def from_table(table: pa.Table) -> list[Sample]:
    """Return the samples of a table of `SAMPLES`; pixels are views of it, and not to be written to."""
    pixels = [view for chunk in table["pixels"].chunks for view in _views(chunk)]
    rows = table.drop_columns("pixels").to_pylist()
    return [_from_row(row, data) for row, data in zip(rows, pixels, strict=True)]


def _views(column: pa.LargeBinaryArray) -> Iterator[pa.Buffer]:
    """Yield the values of a column without a copy, which scalars of pyarrow would make."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    for start, stop in pairwise(bounds.tolist()):
        yield data.slice(start, stop - start)


def _from_row(row: Mapping[str, Any], pixels: pa.Buffer) -> Sample:
    windows = np.array(row["windows"], np.int64).reshape(-1, 4)
    sizes = windows[:, 2] * windows[:, 3]
    flat = np.unpackbits(np.frombuffer(row["bits"], np.uint8), count=int(sizes.sum()))
    parts = np.split(flat.view(np.bool_), np.cumsum(sizes)[:-1]) if len(sizes) else []
    return Sample(
        image_id=row["image_id"],
        image=np.frombuffer(pixels, np.uint8).reshape(*row["size_hw"], 3),
        labels=np.array(row["labels"], np.int64),
        masks=tuple(
            Crop(top=top, left=left, mask=part.reshape(h, w))
            for (top, left, h, w), part in zip(windows.tolist(), parts, strict=True)
        ),
        crowds_xyxy=np.array(row["crowds_xyxy"], np.float32).reshape(-1, 4),
        scale=row["scale"],
    )


def _windows(sample: Sample) -> npt.NDArray[np.int32]:
    return np.array([(m.top, m.left, *m.mask.shape) for m in sample.masks], np.int32)


def _bits(sample: Sample) -> bytes:
    flat = [crop.mask.reshape(-1) for crop in sample.masks]
    return np.packbits(np.concatenate(flat)).tobytes() if flat else b""


def _crop(row: Mapping[str, Any], detection: Mapping[str, Any]) -> Crop | None:
    if detection["segmentation"] is None:
        raise TargetError(f"{row['image_id']}: an instance has no mask, and training needs one")
    if tuple(detection["segmentation"]["size"]) != (row["height"], row["width"]):
        raise TargetError(
            f"{row['image_id']}: a mask is for {detection['segmentation']['size']} pixels, the image "
            f"has {[row['height'], row['width']]}"
        )
    try:
        return tight(*decode_crop(detection["segmentation"]))
    except ValueError as error:
        raise TargetError(f"{row['image_id']}: {error}") from error


def _label(row: Mapping[str, Any], detection: Mapping[str, Any], labels: Mapping[int, int]) -> int:
    label = labels.get(detection["category_id"])
    if label is None:
        raise TargetError(
            f"{row['image_id']}: category {detection['category_id']} ({detection['category']}) is "
            "not one of the model's"
        )
    return label
