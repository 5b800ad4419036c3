"""The one table: Arrow schemas, the detections of one image, and how they become rows.

Predictions, pseudo-labels and ground truth share `PREDICTIONS`; training shards add an image column
(`TRAINING`). Every table that leaves this project is built with one of these schemas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = "1"

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Status = Literal["ok", "error"]


class Rle(TypedDict):
    """COCO compressed run-length encoding: `size` is [height, width], `counts` is ASCII."""

    size: list[int]
    counts: str


SEGMENTATION = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])

DETECTION = pa.struct(
    [
        ("category_id", pa.int32()),
        ("category", pa.string()),
        ("score", pa.float32()),
        ("bbox", pa.list_(pa.float32())),
        ("area", pa.float32()),
        ("iscrowd", pa.int8()),
        ("segmentation", SEGMENTATION),
    ]
)

_COLUMNS: list[pa.Field] = [
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("shard", pa.string(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("height", pa.int32()),
    pa.field("width", pa.int32()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("detections", pa.list_(DETECTION), nullable=False),
]
PREDICTIONS = pa.schema(_COLUMNS)

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

# The metadata under which the Hugging Face `datasets` library finds that `image` is an Image
# feature.
_HUGGINGFACE = b'{"info": {"features": {"image": {"_type": "Image"}}}}'

TRAINING = PREDICTIONS.append(pa.field("image", IMAGE)).with_metadata({"huggingface": _HUGGINGFACE})

# Of a version of a data set: images that wait for a person, with why; what was rejected, with why the image as
# a whole was (null where it was not) and why each of its detections.
REVIEW = TRAINING.append(pa.field("reason", pa.string(), nullable=False))
REJECTED = TRAINING.append(pa.field("reason", pa.string())).append(
    pa.field("reasons", pa.list_(pa.string()), nullable=False)
)
SCHEMAS = (PREDICTIONS, TRAINING, REVIEW, REJECTED)


@dataclass(frozen=True, kw_only=True)
class Category:
    """One category of a data set.

    Attributes:
        id: The data set's own id; COCO ids keep their gaps.
        name: Its name, unique within a bundle.
        label: The network's output index, 1 or more (0 is background).
    """

    id: int
    name: str
    label: int


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What the network says about one image, best score first.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the upright original image.
        scores: (N,) float32, 0..1, descending.
        labels: (N,) int64, the network's output index, 1 or more.
        mask_probs: (N, M, M) float32, 0..1, each over its own box; None where only boxes were
            asked.
        size_hw: Height and width of the upright original image.

    Raises:
        ValueError: The arrays do not have these shapes and types.
    """

    boxes_xyxy: Float32
    scores: Float32
    labels: Int64
    mask_probs: Float32 | None
    size_hw: tuple[int, int]

    def __post_init__(self) -> None:
        n = self.scores.size
        expected: list[tuple[str, Any, tuple[int, ...], type]] = [
            ("boxes_xyxy", self.boxes_xyxy, (n, 4), np.float32),
            ("scores", self.scores, (n,), np.float32),
            ("labels", self.labels, (n,), np.int64),
        ]
        if self.mask_probs is not None:
            m = self.mask_probs.shape[-1] if self.mask_probs.ndim else 0
            expected.append(("mask_probs", self.mask_probs, (n, m, m), np.float32))
        for name, array, shape, dtype in expected:
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name} must be {np.dtype(dtype)} of shape {shape}, "
                    f"not {array.dtype} of shape {array.shape}"
                )

    def __len__(self) -> int:
        return len(self.scores)


def image_id(shard: str, key: str) -> str:
    """Return an image's id: its shard's path relative to the input root, `#`, its key there.

    A `#` in the path, where the id would no longer say what is the shard, becomes `%23`, and `%`
    `%25`.
    """
    shard = shard.replace("%", "%25").replace("#", "%23")
    return f"{shard}#{key}"


def detection_rows(
    detections: Detections, rles: Sequence[Rle] | None, categories: Mapping[int, Category]
) -> list[dict[str, Any]]:
    """Turn one image's detections into values of the `detections` column.

    Args:
        detections: N detections.
        rles: Their N masks, or None where only boxes were asked; then area and segmentation are
            null.
        categories: By label. Labels without a category (gaps of COCO's 91) are left out.

    Returns:
        At most N dictionaries with the fields of `DETECTION`.
    """
    assert rles is None or len(rles) == len(detections)
    x0, y0, x1, y1 = detections.boxes_xyxy.T
    bboxes = np.stack([x0, y0, x1 - x0, y1 - y0], axis=1).tolist()
    scores = detections.scores.tolist()
    mask_areas = None if rles is None else _areas(rles)
    return [
        {
            "category_id": category.id,
            "category": category.name,
            "score": scores[i],
            "bbox": bboxes[i],
            "area": None if mask_areas is None else mask_areas[i],
            "iscrowd": 0,
            "segmentation": None if rles is None else rles[i],
        }
        for i, label in enumerate(detections.labels.tolist())
        if (category := categories.get(label)) is not None
    ]


def _areas(rles: Sequence[Rle]) -> Any:
    # Imported here: `rle` imports this module.
    from segmodel.rle import areas

    return areas(rles).tolist()
