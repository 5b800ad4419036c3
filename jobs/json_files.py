"""Exports that are one JSON file, written image by image: COCO's and Label Studio's."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, TypeAlias
from urllib.parse import quote

import numpy as np

from jobs import brush, contents
from jobs.brush import Encode
from jobs.detect import InputError
from segmodel import coco, rle

Row: TypeAlias = Mapping[str, Any]

# Names of Label Studio's tags; the labelling configuration of the project has to use the same.
FROM_NAME, TO_NAME = "label", "image"


class List:
    """A JSON list in a file, written item by item, one a line."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._between = file, "[\n"

    def add(self, item: Any) -> None:
        """Write one more item."""
        self._file.write(self._between)
        json.dump(item, self._file, ensure_ascii=False, separators=(",", ":"))
        self._between = ",\n"

    def end(self) -> None:
        """Close the list."""
        self._file.write("[]" if self._between == "[\n" else "\n]")


def write_results(rows: Iterable[tuple[int, Row]], file: IO[str]) -> Iterator[int]:
    """Write COCO results, and yield the number of detections of each image.

    Args:
        rows: Images with their COCO ids.
        file: Is written.

    Raises:
        InputError: A detection has no score.
    """
    found = List(file)
    for number, row in rows:
        if any(one["score"] is None for one in row["detections"]):
            raise InputError(
                f"image {row['image_id']!r} has detections without a score, as truth has: export it to "
                "coco-instances"
            )
        results = coco.results([row], {row["image_id"]: number})
        for result in results:
            found.add(result)
        yield len(results)
    found.end()


def write_instances(
    rows: Iterable[Row], categories: Sequence[Mapping[str, Any]], file: IO[str]
) -> Iterator[int]:
    """Write a COCO instances file, and yield the number of annotations of each image.

    Images are numbered from 1 in the order of rows, and annotations too. `score` is kept. Annotations
    wait in a temporary file until all images are written.
    """
    file.write('{"images":')
    images = List(file)
    num_annotations = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as aside:
        annotations = List(aside)
        for number, row in enumerate(rows, start=1):
            made = coco.instances([row], categories, {row["image_id"]: number})
            images.add(made["images"][0] | _content(row))
            for annotation in made["annotations"]:
                num_annotations += 1
                annotations.add({**annotation, "id": num_annotations})
            yield len(made["annotations"])
        images.end()
        annotations.end()
        file.write(',\n"annotations":')
        aside.seek(0)
        shutil.copyfileobj(aside, file)
    file.write(f',\n"categories":{json.dumps(list(categories), ensure_ascii=False)}}}\n')


def write_tasks(
    rows: Iterable[Row], image_prefix: str, model_version: str, file: IO[str]
) -> Iterator[int]:
    """Write Label Studio's tasks, and yield the number of masks of each image; empty ones are left out.

    Masks are brush RLE, by the codec of Label Studio's own SDK.

    Args:
        rows: Images; each becomes a task with one prediction.
        image_prefix: See `image_url`.
        model_version: What Label Studio shows as the prediction's origin.
        file: Is written.

    Raises:
        InputError: The SDK is not installed.
    """
    encode = brush.encoder("--to labelstudio")
    tasks = List(file)
    for row in rows:
        regions = [
            _region(number, one, encode)
            for number, one in enumerate(row["detections"])
            if one["area"] > 0
        ]
        data = {"image": image_url(row, image_prefix)}
        data |= {name: row[name] for name in ("image_id", "shard", "key")} | _content(row)
        tasks.add(
            {"data": data, "predictions": [{"model_version": model_version, "result": regions}]}
        )
        yield len(regions)
    tasks.end()


def _content(row: Row) -> dict[str, str]:
    """Return what tells an image from any other of its name, where that is known."""
    return {contents.FIELD: row[contents.FIELD]} if row.get(contents.FIELD) else {}


def image_url(row: Row, prefix: str) -> str:
    """Return where Label Studio finds an image.

    That is prefix, shard and key with slashes between; none follows a prefix that ends in `=`. What
    cannot stand in a URL is percent-encoded, except below `s3://`, `gs://` and the like, where Label
    Studio takes names literally. A key that is a URI, as manifests have them, stands for itself.
    """
    key = str(row["key"])
    if "://" in key:
        return key
    path = f"{row['shard']}/{key}" if row["shard"] else key
    scheme, separator, _ = prefix.partition("://")
    if not separator or scheme in ("http", "https"):
        path = quote(path)
    return f"{prefix}{path}" if prefix.endswith(("=", "/")) else f"{prefix}/{path}"


def _region(number: int, detection: Row, encode: Encode) -> dict[str, Any]:
    """Return a mask as Label Studio's region.

    https://labelstud.io/guide/predictions#Import-brush-segmentation-pre-annotations-in-RLE-format
    """
    mask = rle.decode(detection["segmentation"])
    height, width = mask.shape
    region = {
        "id": str(number),
        "type": "brushlabels",
        "from_name": FROM_NAME,
        "to_name": TO_NAME,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {
            "format": "rle",
            "rle": encode(np.where(mask, 255, 0).astype(np.uint8)),
            "brushlabels": [detection["category"]],
        },
    }
    score = detection["score"]
    return region if score is None else {**region, "score": float(score)}
