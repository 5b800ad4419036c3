"""COCO files and the one schema: instances to rows of truth, rows to instances and to results."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from pycocotools import mask as coco_mask

from segmodel import schema
from segmodel.schema import Rle

# Corners may lie outside of their image, as after a crop, but not further than so many times its longer
# side: maskApi takes memory for every pixel of the way there, and soon computes with numbers that overflowed.
_FURTHEST = 10

# What the columns of the schema hold.
_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)

Record: TypeAlias = Mapping[str, Any]
ImageIdOf: TypeAlias = Callable[[str], tuple[str, str]]  # file_name -> shard, key


def shard_and_key(file_name: str) -> tuple[str, str]:
    """Split a file name into its directory, the shard, and its base name, the key."""
    shard, _, key = file_name.rpartition("/")
    return shard, key


def image_ids(coco: Record, image_id_of: ImageIdOf = shard_and_key) -> dict[str, int]:
    """Return COCO's own image ids by `image_id`.

    Raises:
        ValueError: An image has no usable id, name or size, or comes twice.
    """
    ids: dict[str, int] = {}
    for number, image in _by_id(coco, "images").items():
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"image {number} has no file_name")
        if not all(_is_side(image.get(side)) for side in ("height", "width")):
            raise ValueError(
                f"image {number} ({name!r}) has no height and width in whole pixels, 1 to {_INT32_MAX}"
            )
        image_id = schema.image_id(*image_id_of(name))
        if image_id in ids:
            raise ValueError(f"images {ids[image_id]} and {number} are both {image_id!r}")
        ids[image_id] = number
    return ids


def rows(coco: Record, image_id_of: ImageIdOf = shard_and_key) -> Iterator[dict[str, Any]]:
    """Yield a row of truth for each image of a COCO instances file, in its order.

    Masks of every kind become compressed RLE; they stay null where there are boxes only. `area` is
    the file's, on which COCO's area ranges depend, and where it has none that of the mask or box.
    Numbers are the file's; a table rounds boxes and areas to float32.

    Args:
        coco: The parsed JSON.
        image_id_of: The shard and key of an image, from its `file_name`.

    Raises:
        ValueError: A record is unusable; the message says which. What concerns ids is
            found before the first row.
    """
    ids = image_ids(coco, image_id_of)
    images, categories = _by_id(coco, "images"), _categories_by_id(coco)
    annotations: defaultdict[int, list[Record]] = defaultdict(list)
    for number, annotation in _by_id(coco, "annotations").items():
        for kind, known in (("image", images), ("category", categories)):
            of = annotation.get(f"{kind}_id")
            if not _is_integer(of):
                raise ValueError(f"annotation {number} has the {kind}_id {of!r}, no whole number")
            if of not in known:
                raise ValueError(f"annotation {number} is of {kind} {of!r}, which is not there")
        annotations[annotation["image_id"]].append(annotation)

    for image_id, number in ids.items():
        image = images[number]
        shard, key = image_id_of(image["file_name"])
        yield {
            "image_id": image_id,
            "shard": shard,
            "key": key,
            "height": image["height"],
            "width": image["width"],
            "status": "ok",
            "error": None,
            "detections": _detections(annotations[number], image, categories),
        }


def categories(coco: Record) -> list[dict[str, Any]]:
    """Return `{"id", "name"}` of each category of a COCO file, by id, used or not.

    Raises:
        ValueError: A category has no usable id or no name, or one of them comes twice.
    """
    ids: dict[str, int] = {}
    for number, category in sorted(_categories_by_id(coco).items()):
        name = category.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"category {number} has no name")
        if name in ids:
            raise ValueError(f"categories {ids[name]} and {number} are both {name!r}")
        ids[name] = number
    return [{"id": number, "name": name} for name, number in ids.items()]


def instances(
    rows: Iterable[Record],
    categories: Iterable[Record],
    image_ids: Mapping[str, int] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Turn rows of the one schema into a COCO instances file: the way back from `rows`.

    An image's `file_name` is its shard and key, by which `pack` finds it again. Numbers are float32
    in the table; the shortest decimal that is the same float32 is written, so 473.07 comes back.

    Args:
        rows: Rows in error have no size, and are left out.
        categories: `{"id", "name"}` of each; others may be among them.
        image_ids: COCO's image ids, see `image_ids`; from 1 on, in order, where None.

    Raises:
        ValueError: A row's image has no COCO id, or a detection is of another category.
    """
    known = [{"id": int(category["id"]), "name": category["name"]} for category in categories]
    category_ids = {category["id"] for category in known}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in rows:
        if row["status"] != "ok":
            continue
        if image_ids is not None and row["image_id"] not in image_ids:
            raise ValueError(f"image {row['image_id']!r} is not in the COCO file")
        number = len(images) + 1 if image_ids is None else image_ids[row["image_id"]]
        shard, key = row["shard"], row["key"]
        name = f"{shard}/{key}" if shard else key
        size = {"height": int(row["height"]), "width": int(row["width"])}
        images.append({"id": number, "file_name": name, **size})
        for detection in row["detections"]:
            if detection["category_id"] not in category_ids:
                raise ValueError(
                    f"image {row['image_id']!r} has a detection of category "
                    f"{detection['category_id']}, which is not there"
                )
            ids = {"id": len(annotations) + 1, "image_id": number}
            annotations.append(ids | _annotation(detection))
    return {"images": images, "annotations": annotations, "categories": known}


def results(rows: Iterable[Record], image_ids: Mapping[str, int]) -> list[dict[str, Any]]:
    """Turn rows of predictions into COCO results, one for each detection.

    Args:
        rows: Rows of the one schema; those in error give nothing.
        image_ids: COCO's image ids, see `image_ids`.

    Raises:
        ValueError: A row's image has no COCO id.
    """
    found = []
    for row in rows:
        if row["image_id"] not in image_ids:
            raise ValueError(f"image {row['image_id']!r} is not in the COCO file")
        for detection in row["detections"] if row["status"] == "ok" else ():
            result = {
                "image_id": image_ids[row["image_id"]],
                "category_id": int(detection["category_id"]),
                "bbox": [float(value) for value in detection["bbox"]],
                "score": float(detection["score"]),
            }
            if detection["segmentation"] is not None:
                result["segmentation"] = dict(detection["segmentation"])
            found.append(result)
    return found


def _annotation(detection: Record) -> dict[str, Any]:
    """Return a detection as an annotation without its ids."""
    bbox = [_shortest(value) for value in detection["bbox"]]
    area, segmentation = detection["area"], detection["segmentation"]
    annotation = {
        "category_id": int(detection["category_id"]),
        "bbox": bbox,
        "area": bbox[2] * bbox[3] if area is None else _shortest(area),
        "iscrowd": int(detection["iscrowd"]),
        "segmentation": [] if segmentation is None else dict(segmentation),
    }
    if detection["score"] is not None:
        annotation["score"] = _shortest(detection["score"])
    return annotation


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _by_id(coco: Record, kind: str) -> dict[int, Record]:
    if not isinstance(coco.get(kind), list):
        message = f"not a COCO instances file: it has no list of {kind}"
        raise ValueError(message)  # noqa: TRY004  what a user's file holds is no type of ours
    records: dict[int, Record] = {}
    for i, record in enumerate(coco[kind]):
        number = record.get("id") if isinstance(record, Mapping) else None
        if not _is_integer(number):
            raise ValueError(f"{kind}[{i}] has no whole number as its id")
        if number in records:
            raise ValueError(f"{kind} have the id {number} twice")
        records[number] = record
    return records


def _categories_by_id(coco: Record) -> dict[int, Record]:
    found = _by_id(coco, "categories")
    for number in found:
        if not -_INT32_MAX - 1 <= number <= _INT32_MAX:
            raise ValueError(f"category {number}: its id does not fit in 32 bits")
    return found


def _detections(
    annotations: Iterable[Record], image: Record, categories: Mapping[int, Record]
) -> list[dict[str, Any]]:
    detections = []
    for annotation in annotations:
        category = categories[annotation["category_id"]]
        try:
            detections.append(_detection(annotation, image, category))
        except ValueError as error:
            message = f"annotation {annotation['id']} of image {image['id']}: {error}"
            raise ValueError(message) from error
    return detections


def _detection(annotation: Record, image: Record, category: Record) -> dict[str, Any]:
    bbox = _bbox(annotation.get("bbox"))
    segmentation = _rle(annotation.get("segmentation"), image["height"], image["width"])
    area, iscrowd = annotation.get("area"), annotation.get("iscrowd", 0)
    if area is None:
        area = bbox[2] * bbox[3] if segmentation is None else int(coco_mask.area(segmentation))
    if not _is_number(area) or area < 0:
        raise ValueError(f"bad area {area!r}")
    if iscrowd not in (0, 1):
        raise ValueError(f"bad iscrowd {iscrowd!r}")
    return {
        "category_id": category["id"],
        "category": category.get("name"),
        "score": None,
        "bbox": bbox,
        "area": float(area),
        "iscrowd": int(iscrowd),
        "segmentation": segmentation,
    }


def _bbox(bbox: Any) -> list[float]:
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise ValueError(f"bad bbox {bbox!r}, not four numbers in the range of float32")
    # COCO itself has boxes of no height.
    if min(bbox[2:]) < 0:
        raise ValueError(f"bad bbox {bbox!r}, of negative size")
    return [float(value) for value in bbox]


def _rle(segmentation: Any, height: int, width: int) -> Rle | None:
    """Make a compressed RLE of polygons, an uncompressed or a compressed one; None of nothing."""
    if segmentation is None or segmentation == []:  # as tools write a box without a mask
        return None
    if isinstance(segmentation, Mapping):
        counts = _counts_of_rle(segmentation, height, width)
    else:
        counts = _counts_of_polygons(segmentation, height, width)
    return {"size": [height, width], "counts": counts}


def _counts_of_polygons(polygons: Any, height: int, width: int) -> str:
    for polygon in polygons if isinstance(polygons, list) else [polygons]:
        # pycocotools would take four numbers for a box.
        usable = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        if not usable or not all(map(_is_number, polygon)):
            raise ValueError(f"bad segmentation, neither RLE nor polygons: {polygon!r:.60}")
        furthest = max(polygon, key=abs)
        if abs(furthest) > _FURTHEST * max(height, width):
            raise ValueError(
                f"its outline reaches to {furthest:g}, far outside of the image of {width} x {height} pixels"
            )
    counts: bytes = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"]
    return counts.decode()


def _counts_of_rle(rle: Record, height: int, width: int) -> str:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise ValueError(f"its mask is of size {size!r}, the image of {[height, width]}")
    if isinstance(counts, bytes):  # not in JSON, but from pycocotools
        counts = counts.decode()
    if isinstance(counts, str):
        runs = _runs(counts)
    elif isinstance(counts, list) and all(map(_is_integer, counts)):
        runs = counts
    else:
        raise ValueError(f"bad RLE counts: {counts!r:.60}")
    # pycocotools reads past the end of a mask that is cut off.
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"its mask covers {sum(runs)} of {height * width} pixels")
    if isinstance(counts, str):
        return counts
    compressed: bytes = coco_mask.frPyObjects(dict(rle), height, width)["counts"]
    return compressed.decode()


def _runs(counts: str) -> list[int]:
    """Read the lengths of runs from compressed counts, as `rleFrString` of maskApi.c does.

    https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"bad character {character!r} in RLE counts")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("RLE counts end within a number")
    return runs


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return _is_integer(value) and 0 < value <= _INT32_MAX


def _is_number(value: Any) -> bool:
    """Say whether a value is a number in the range of float32."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _FLOAT32_MAX
