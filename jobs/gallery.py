"""The gallery of a report: which images are shown, their thumbnails, and what is drawn over them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import tables
from jobs.pairing import NONE, Pairing
from jobs.pictures import Picture, Wanted
from jobs.reference import Truth
from jobs.store import Store
from jobs.survey import Survey
from jobs.tables import COLUMNS, Tables
from segmodel import thumbnails
from segmodel.faults import Fault, Faults
from segmodel.images import ImageError, decode

IMAGES = "images"
BATCH_SIZE = 64
# What keeps a page small, for each image and side: the best detections, and bytes of their masks.
MOST_ITEMS, MASK_BYTES = 100, 14_000
MAX_TEXT = 300  # characters of an error


@dataclass(frozen=True)
class Tile:
    """An image in a group.

    Attributes:
        row: Of the table.
        mark: The place of what is wrong, among the detections or the annotations.
        words: What is said about it.
    """

    row: int
    mark: int | None = None
    words: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images that are shown together."""

    id: str
    label: str
    about: str
    tiles: Sequence[Tile]


@dataclass(kw_only=True)
class Shown:
    """An image that is shown.

    Attributes:
        row: Its row of the table.
        truth: Its annotations; None where no truth is known.
        src: Of the thumbnail, relative to the page; None where the image cannot be shown.
        size_hw: Of the upright image, as it is now or as the table says.
        error: Why it is in error or cannot be shown.
        note: What else a person should know.
    """

    row: Mapping[str, Any]
    truth: Sequence[Mapping[str, Any]] | None = None
    src: str | None = None
    size_hw: tuple[int, int] | None = None
    error: str | None = None
    note: str = ""
    marks: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))


def groups_of(found: Survey, most: int, *, by_truth: bool) -> list[Group]:
    """Return the groups of a survey: best, worst, random, errors; those that have any image."""
    measure = (
        "by the share that is right: right / (right + wrong + missed)"
        if by_truth
        else "by how sure the model was: the mean of |2 x score - 1| over all detections"
    )
    groups = [
        ("best", "Best", f"The best images, {measure}.", found.best.rows),
        ("worst", "Worst", f"The worst images, {measure}.", found.worst.rows),
        ("random", "Random", "Readable images, drawn at random.", found.random.rows),
        ("errors", "Errors", "Images in error, of every kind.", _mixed(found, most)),
    ]
    return [
        Group(id=id_, label=label, about=about, tiles=[Tile(row) for row in rows])
        for id_, label, about, rows in groups
        if rows
    ]


def read_rows(table: Tables, numbers: Sequence[int]) -> tuple[dict[int, Shown], list[Wanted]]:
    """Read the rows that are shown, with their masks; return them by number, and whose images are wanted."""
    shown: dict[int, Shown] = {}
    wanted: list[Wanted] = []
    left = sorted(set(numbers))
    start = 0
    of_object: defaultdict[str, int] = defaultdict(int)
    for group in table.groups:
        stop = start + group.num_rows
        here = [number for number in left if start <= number < stop]
        for number, row in _rows(table, group, start, here):
            shown[number] = Shown(row=row, error=row["error"] and row["error"][:MAX_TEXT])
            names = {name: row[name] for name in ("image_id", "shard", "key")}
            position = of_object[group.info.path] + number - start
            wanted.append(Wanted(row=number, path=group.info.path, position=position, **names))
        of_object[group.info.path] += group.num_rows
        start = stop
    return shown, wanted


def add_truth(shown: Mapping[int, Shown], truth: Truth, paired: Pairing) -> None:
    """Give images their annotations."""
    places = {int(paired.places[row]): row for row in shown if paired.places[row] != NONE}
    order = np.array(sorted(places), np.int64)
    if len(order):
        for place, row in zip(order.tolist(), truth.rows.take(order).to_pylist(), strict=True):
            shown[places[place]].truth = row["detections"]


def rows_of(faults: Faults, paired: Pairing) -> dict[int, int]:
    """Return the rows of the images that have faults, by the images' numbers in the truth."""
    images = {one.image for one in (*faults.wrong, *faults.missed)}
    return {place: row for row, place in enumerate(paired.places.tolist()) if place in images}


def fault_groups(
    faults: Faults, rows: Mapping[int, int], shown: Mapping[int, Shown]
) -> list[Group]:
    """Return the groups of wrong detections and of missed annotations, and mark them in their images.

    Args:
        faults: The worst ones.
        rows: See `rows_of`; a missed annotation of an image without a row cannot be shown.
        shown: By row, with their truth.
    """
    wrong = [_wrong(one, rows[one.image], shown) for one in faults.wrong]
    missed = [_missed(one, rows[one.image], shown) for one in faults.missed if one.image in rows]
    at = f"at scores of {faults.score_threshold:g} or more"
    groups = [
        Group(
            id="wrong",
            label="False positives",
            about=f"Detections of which the truth knows nothing, or another category ({at}): of each image "
            "the most confident one, in red, and the most confident images first.",
            tiles=wrong,
        ),
        Group(
            id="missed",
            label="Misses",
            about=f"Annotations for which nothing was found ({at}): of each image the largest one, in red.",
            tiles=missed,
        ),
    ]
    return [group for group in groups if group.tiles]


def _wrong(fault: Fault, row: int, shown: Mapping[int, Shown]) -> Tile:
    image = shown[row]
    image.marks["found"].add(fault.item)
    found = image.row["detections"][fault.item]
    there = "nothing"
    if fault.taken is not None and image.truth is not None:
        there = name_of(image.truth[fault.taken])
    words = f"{name_of(found)} at {found['score']:.2f}; the truth has {there} there"
    return Tile(row, fault.item, words)


def _missed(fault: Fault, row: int, shown: Mapping[int, Shown]) -> Tile:
    image = shown[row]
    assert image.truth is not None
    image.marks["truth"].add(fault.item)
    missed = image.truth[fault.item]
    return Tile(row, fault.item, f"missed: {name_of(missed)} of {missed['area']:,.0f} pixels")


def put_thumbnails(
    shown: Mapping[int, Shown], found: Iterator[Picture], output: Store, max_pixels: int
) -> None:
    """Decode images as they come, and put their thumbnails beside the page."""
    used: set[str] = set()
    for picture in found:
        image = shown[picture.row]
        pixels, why = _decoded(picture, max_pixels)
        if pixels is None:
            image.error = image.error or f"This image cannot be read any more. {why}"[:MAX_TEXT]
            continue
        size_hw = pixels.shape[0], pixels.shape[1]
        if image.row["status"] == "ok" and size_hw != (image.row["height"], image.row["width"]):
            image.error = (
                f"This image is not what it was: it has {size_hw[0]} x {size_hw[1]} pixels now (height x "
                f"width), and had {image.row['height']} x {image.row['width']}."
            )
            continue
        image.size_hw = size_hw
        image.src = f"{IMAGES}/{len(used):04d}.webp"
        used.add(image.src)
        output.put(image.src, thumbnails.encode(pixels))
    for old in list(output.list_objects(IMAGES)):
        if old.path.endswith(".webp") and old.path not in used:
            output.delete(old.path)


def _decoded(picture: Picture, max_pixels: int) -> tuple[thumbnails.UInt8 | None, str]:
    if picture.data is None:
        return None, picture.error or ""
    try:
        return decode(picture.data, max_pixels), ""
    except ImageError as error:
        return None, str(error)


def to_data(
    groups: Sequence[Group], shown: Mapping[int, Shown], categories: Sequence[str]
) -> dict[str, Any]:
    """Return what the page's script draws."""
    numbers = {row: n for n, row in enumerate(shown)}
    index = {name: n for n, name in enumerate(categories)}
    places: dict[tuple[int, str], dict[int, int]] = {}
    images = []
    for row, image in shown.items():
        size_hw = image.size_hw or (1, 1)
        sides: dict[str, Any] = {}
        for side, items in (("found", image.row["detections"]), ("truth", image.truth)):
            kept = _kept(items or (), image.marks[side])
            places[row, side] = {n: place for place, n in enumerate(kept)}
            sides[side] = None if items is None else _items([items[n] for n in kept], image, index)
        left_out = len(image.row["detections"]) - len(sides["found"])
        note = f"{left_out} detections of lower scores are not shown" if left_out else ""
        thumb_hw = thumbnails.size_of(size_hw)
        images.append(
            {
                "id": image.row["image_id"],
                "key": image.row["key"] or image.row["image_id"],
                "h": image.size_hw and size_hw[0],
                "w": image.size_hw and size_hw[1],
                "th": thumb_hw[0],
                "tw": thumb_hw[1],
                "src": image.src,
                "error": image.error,
                "note": note,
                **sides,
            }
        )
    return {
        "categories": list(categories),
        "images": images,
        "groups": [
            {
                "id": group.id,
                "label": group.label,
                "about": group.about,
                "tiles": [
                    {
                        "image": numbers[tile.row],
                        "words": tile.words,
                        "mark": None
                        if tile.mark is None
                        else places[tile.row, _SIDES[group.id]][tile.mark],
                    }
                    for tile in group.tiles
                ],
            }
            for group in groups
        ],
    }


_SIDES = {"wrong": "found", "missed": "truth"}


def _kept(items: Sequence[Mapping[str, Any]], marks: set[int]) -> list[int]:
    """Return the places of what is drawn, best score first; what is marked is always among it."""

    def rank(n: int) -> tuple[bool, float]:
        score = items[n]["score"]
        return n not in marks, -(1.0 if score is None else score)

    kept = sorted(range(len(items)), key=rank)[:MOST_ITEMS]
    return sorted(kept, key=lambda n: rank(n)[1])


def _items(
    items: Sequence[Mapping[str, Any]], image: Shown, index: Mapping[str, int]
) -> list[dict[str, Any]]:
    room = MASK_BYTES
    drawn = []
    for item in items:
        mask = _mask(item, image)
        if mask is not None and len(mask) > room:
            mask = None
        room -= len(mask or "")
        drawn.append(
            {
                "c": index[name_of(item)],
                "s": _rounded(item["score"], 4),
                "b": [_rounded(value, 1) or 0 for value in item["bbox"]],
                "a": _rounded(item["area"], 0),
                "m": mask,
                **({"crowd": 1} if item["iscrowd"] else {}),
            }
        )
    return drawn


def name_of(item: Mapping[str, Any]) -> str:
    """Return the name of an item's category, or its id."""
    return str(item["category"] or item["category_id"])


def _mask(item: Mapping[str, Any], image: Shown) -> str | None:
    rle = item["segmentation"]
    if rle is None or image.size_hw is None or tuple(rle["size"]) != image.size_hw:
        return None
    try:
        counts = thumbnails.shrink(rle, thumbnails.size_of(image.size_hw))["counts"]
    except ValueError:
        # A damaged mask of a foreign table: its box is drawn all the same.
        return None
    return counts


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def _mixed(found: Survey, most: int) -> list[int]:
    """Return rows in error, in turn of each kind, the most frequent kind first."""
    kinds = [found.failed[kind].rows for kind, _ in found.kinds.most_common()]
    turns = max(map(len, kinds), default=0)
    rows = [rows[turn] for turn in range(turns) for rows in kinds if turn < len(rows)]
    return rows[:most]


def _rows(
    table: Tables, group: tables.RowGroup, start: int, wanted: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    if not wanted:
        return
    columns = (*COLUMNS, "shard", "key", "error")
    for batch in tables.stream(table.store, group, BATCH_SIZE, columns):
        here = [number - start for number in wanted if start <= number < start + batch.num_rows]
        taken = batch.take(pa.array(here, pa.int64())).to_pylist()
        yield from zip((start + n for n in here), taken, strict=True)
        start += batch.num_rows
