"""Exports that are a folder with a file for each image: YOLO's polygons, and class maps."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeAlias

import yaml

from jobs.detect import InputError
from jobs.store import Store
from segmodel import class_map
from segmodel.polygons import outline

Row: TypeAlias = Mapping[str, Any]
Categories: TypeAlias = Sequence[Mapping[str, Any]]

LABELS, MASKS = "labels", "masks"
DATA, LEGEND = "data.yaml", "legend.json"
HEADS = (DATA, LEGEND)
# Files are put side by side, since a put mostly waits; so many rows are held at once.
THREADS = 16

# Of a side: 0.004 pixels of 4,000.
_DECIMALS = 6


def write_labels(
    rows: Iterable[Row], name: Callable[[Row], str], categories: Categories, output: Store
) -> Iterator[int]:
    """Write `labels/*.txt` and `data.yaml` of YOLO, and yield the number of polygons of each image.

    A line is a class, counted from 0 in the order of category ids, and x and y of each point, 0..1;
    see `polygons.outline` for what is lost. An image without instances has an empty file. Empty masks
    are left out.
    """
    classes = {one["id"]: number for number, one in enumerate(categories)}

    def put(row: Row) -> int:
        lines = [line for one in row["detections"] if (line := _line(one, classes))]
        output.put(f"{LABELS}/{name(row)}.txt", "".join(lines).encode())
        return len(lines)

    names = {number: one["name"] for number, one in enumerate(categories)}
    # Without `path` Ultralytics starts from this file's own folder.
    data = {"train": "images", "val": "images", "names": names}
    output.put(DATA, yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode())
    yield from _in_threads(put, rows)


def write_class_maps(
    rows: Iterable[Row], name: Callable[[Row], str], categories: Categories, output: Store
) -> Iterator[int]:
    """Write `masks/*.png` and `legend.json`, and yield the number of instances of each image.

    A pixel's value is its class, counted from 1 in the order of category ids; 0 is background.

    Raises:
        InputError: There are more classes than a byte has values.
    """
    if len(categories) > class_map.MAX_CLASSES:
        raise InputError(
            f"the table has {len(categories)} categories, and a palette has room for "
            f"{class_map.MAX_CLASSES}: export coco-instances"
        )
    classes = {one["id"]: number for number, one in enumerate(categories, start=1)}

    def put(row: Row) -> int:
        try:
            found = class_map.paint(row["detections"], classes, (row["height"], row["width"]))
        except ValueError as error:
            raise InputError(f"image {row['image_id']!r}: {error}") from error
        output.put(f"{MASKS}/{name(row)}.png", class_map.png(found))
        return len(row["detections"])

    output.put(LEGEND, _legend(categories))
    yield from _in_threads(put, rows)


def _line(detection: Row, classes: Mapping[int, int]) -> str:
    height, width = detection["segmentation"]["size"]
    points = (outline(detection["segmentation"]) / (width, height)).ravel().tolist()
    if not points:
        return ""
    numbers = " ".join(f"{number:.{_DECIMALS}f}" for number in points)
    return f"{classes[detection['category_id']]} {numbers}\n"


def _legend(categories: Categories) -> bytes:
    colours = class_map.palette().tolist()
    classes = [
        {"value": n, "category_id": one["id"], "name": one["name"], "colour_rgb": colours[n]}
        for n, one in enumerate(categories, start=1)
    ]
    legend = {"background": 0, "classes": classes}
    return json.dumps(legend, indent=2, ensure_ascii=False).encode()


def _in_threads(put: Callable[[Row], int], rows: Iterable[Row]) -> Iterator[int]:
    some = iter(rows)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(some, 4 * THREADS)):
            yield from pool.map(put, batch)
