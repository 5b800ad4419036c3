"""Exports that have a file for each image: YOLO's polygons, class maps, and the images themselves."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import yaml

from jobs import tables
from jobs.detect import Input, InputError, objects_of
from jobs.exported import suffix_of
from jobs.pictures import Images, Picture, Wanted, fetch
from jobs.store import Store
from jobs.tar import IMAGE_SUFFIXES
from segmodel import class_map
from segmodel.images import ImageError, format_of
from segmodel.polygons import outline

Row: TypeAlias = Mapping[str, Any]
Categories: TypeAlias = Sequence[Mapping[str, Any]]
Given = TypeVar("Given")
Made = TypeVar("Made")

LABELS, MASKS, IMAGES = "labels", "masks", "images"
DATA, LEGEND = "data.yaml", "legend.json"
HEADS = (DATA, LEGEND)
# Files are put side by side, since a put mostly waits; so many rows are held at once.
THREADS = 16

# Rows whose images are looked for at once: shards without a plan are indexed for each lot of them.
WANTED_AT_ONCE = 1024

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


def write_images(
    table: Input, images: Images, file_of: Callable[[Row, bytes], str], output: Store
) -> Iterator[str | None]:
    """Write images, and yield for each row that is not in error why its image could not be written, else None.

    Args:
        table: Whose images.
        images: Where they are.
        file_of: Returns an image's path in `output`, given its shard, its key and its bytes.
        output: The folder of the images alone.
    """
    rows = _wanted(table)
    while some := list(islice(rows, WANTED_AT_ONCE)):
        by_number = {one.row: {"shard": one.shard, "key": one.key} for one in some}

        def put(picture: Picture, rows: Mapping[int, Row] = by_number) -> str | None:
            if picture.data is None:
                return picture.error
            row = rows[picture.row]
            output.put(file_of(row, picture.data), picture.data)
            return None

        yield from _in_threads(put, fetch(some, images))


def image_suffix(row: Row, data: bytes) -> str:
    """Return the suffix of an image's file: its own, or that of its content where its own says nothing."""
    own = suffix_of(row)
    if own.lower() in IMAGE_SUFFIXES:
        return own
    try:
        return f".{format_of(data)}"
    except ImageError:
        return own


def _wanted(table: Input) -> Iterator[Wanted]:
    number = 0
    for info in objects_of(table.objects):
        position = 0
        columns = (*tables.NAMES, "status")
        for batch in tables.scan(table.store, [info], columns, WANTED_AT_ONCE):
            for row in batch.to_pylist():
                if row.pop("status") == "ok":
                    yield Wanted(row=number, path=info.path, position=position, **row)
                number, position = number + 1, position + 1


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


def _in_threads(put: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    some = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(some, 4 * THREADS)):
            yield from pool.map(put, batch)
