"""What reviewers' tools write: COCO instances files, and the tasks that Label Studio exports as JSON.

Label Studio's own COCO export leaves brush masks out, and its other converters cut them into pieces and fill their
holes; its JSON has every mask as it was painted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from jobs import brush
from jobs.brush import Decode
from jobs.contents import FIELD
from jobs.detect import InputError
from jobs.records import some_of
from jobs.storage import open_uri
from segmodel import coco, rle

Row: TypeAlias = dict[str, Any]
Mapped: TypeAlias = Mapping[str, Any]

_BRUSH = "brushlabels"
# What a region of another kind has that lies somewhere in the image; choices and texts lie nowhere.
_PLACED = frozenset({"x", "points", "vertices", "rle", "ranges"})


@dataclass(frozen=True, kw_only=True)
class ReviewedImage:
    """What a person said of an image.

    Attributes:
        path: Its name in the file.
        image_id: Where the file says it.
        content: Digest of the bytes that were exported, see `contents`; empty where the file does not say.
        size_hw: Pixels, where the file says it.
        detections: Its labels, in the one schema.
    """

    path: str
    image_id: str | None = None
    content: str = ""
    size_hw: tuple[int, int] | None = None
    detections: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Reviewed:
    """A reviewed file.

    Attributes:
        uri: Where it is.
        sha256: Of its bytes.
        images: That it names.
        categories: `{"id", "name"}` of each.
        notes: What a person should know.
    """

    uri: str
    sha256: str
    images: Sequence[ReviewedImage]
    categories: Sequence[Mapped]
    notes: tuple[str, ...] = ()


def read(uri: str, endpoint_url: str | None, categories: Sequence[Mapped]) -> Reviewed:
    """Read a reviewed file.

    Args:
        uri: COCO instances, or a JSON list of Label Studio's tasks.
        endpoint_url: See `storage.open_store`.
        categories: Of the data set. Names say which they are: reviewers' tools count ids anew.

    Raises:
        InputError: It is neither, or cannot be used.
    """
    store, name = open_uri(uri, endpoint_url)
    data = store.read(name)
    known = {category["name"]: category["id"] for category in categories}
    try:
        file = json.loads(data)
    except ValueError as error:
        raise InputError(f"{store.url(name)} is no JSON: {error}") from error
    kind, reader = "COCO instances file", _of_coco
    if isinstance(file, list):
        kind = "list of Label Studio's tasks"
        reader = partial(_of_tasks, decode=brush.decoder(f"to read a {kind}"))
    try:
        found, of, notes = reader(file, known)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{store.url(name)} is no {kind}: {error}") from error
    if not found:
        raise InputError(f"{store.url(name)} names no image that somebody has reviewed")
    return Reviewed(
        uri=store.url(name),
        sha256=hashlib.sha256(data).hexdigest(),
        images=found,
        categories=of,
        notes=notes,
    )


Found: TypeAlias = tuple[list[ReviewedImage], list[dict[str, Any]], tuple[str, ...]]


def _of_coco(file: Mapped, known: Mapping[str, int]) -> Found:
    rows, categories = list(coco.rows(file)), coco.categories(file)
    ids = {of["id"]: known.get(of["name"], of["id"]) for of in categories}
    found = []
    for image, row in zip(file["images"], rows, strict=True):
        for one in row["detections"]:
            if one["segmentation"] is None:
                raise ValueError(
                    f"it has boxes without masks, such as in {row['image_id']!r}: export it with masks"
                )
            one["category_id"] = ids[one["category_id"]]
            _tighten(one)
        reviewed = ReviewedImage(
            path=image["file_name"],
            content=_text(image, FIELD),
            size_hw=(row["height"], row["width"]),
            detections=row["detections"],
        )
        found.append(reviewed)
    return found, [{**of, "id": ids[of["id"]]} for of in categories], ()


def _tighten(label: Row) -> None:
    """Take area and box from the mask: reviewers' tools leave the old ones, or none."""
    label["area"] = float(rle.areas([label["segmentation"]])[0])
    label["bbox"] = rle.bounding_boxes([label["segmentation"]])[0].tolist()


def _of_tasks(tasks: Sequence[Mapped], known: Mapping[str, int], *, decode: Decode) -> Found:
    """Return the newest annotation of each task; of one that nobody has submitted nothing."""
    ids = dict(known)
    found, waiting = [], 0
    for number, task in enumerate(tasks):
        if not isinstance(task.get("data"), dict) or "annotations" not in task:
            raise ValueError(
                f"task {number} has no data or no annotations: export the project as JSON"
            )
        done = [one for one in task["annotations"] if not one.get("was_cancelled")]
        waiting += not done
        if done:
            newest = sorted(done, key=_written)[-1]
            found.append(_of_task(task["data"], newest["result"], ids, decode))
    again = Counter(one.image_id or one.path for one in found)
    if twice := [name for name, times in again.items() if times > 1]:
        raise ValueError(f"{len(twice)} images have more than one task: {some_of(twice)}")
    notes = (f"{waiting} tasks that nobody has submitted are left out",) if waiting else ()
    return found, [{"id": ids[name], "name": name} for name in ids], notes


def _written(annotation: Mapped) -> str:
    # ISO 8601 in UTC: the order of texts is that of times.
    return str(annotation.get("updated_at") or annotation.get("created_at") or "")


def _of_task(
    data: Mapped, regions: Sequence[Mapped], ids: dict[str, int], decode: Decode
) -> ReviewedImage:
    name = _text(data, "image_id") or None
    path = _text(data, "image")
    if name is None and not path:
        raise ValueError("a task's data has neither image_id nor image")
    try:
        brushes = list(_brushes(regions))
        labels = [label for one in brushes if (label := _label(one, ids, decode)) is not None]
    except ValueError as error:
        raise ValueError(f"the task of {name or path!r}: {error}") from error
    sizes = {(int(one["original_height"]), int(one["original_width"])) for one in brushes}
    if len(sizes) > 1:
        raise ValueError(f"the task of {name or path!r} has regions of different sizes")
    return ReviewedImage(
        path=path,
        image_id=name,
        content=_text(data, FIELD),
        size_hw=next(iter(sizes), None),
        detections=labels,
    )


def _brushes(regions: Sequence[Mapped]) -> Iterator[Mapped]:
    for region in regions:
        value = region.get("value", {})
        if region.get("type") == _BRUSH:
            yield region
        elif _PLACED & set(value):
            raise ValueError(
                f"it has a region of type {region.get('type')!r}; only brushes are taken"
            )


def _label(region: Mapped, ids: dict[str, int], decode: Decode) -> Row | None:
    """Return a region as a label, its category numbered in `ids` where it is new; None of an empty one."""
    value, names = region["value"], region["value"].get(_BRUSH, [])
    if len(names) != 1:
        raise ValueError(f"a region has {len(names)} labels, and not one")
    if region.get("image_rotation"):
        raise ValueError("a region was painted on the turned image; turn it back")
    height, width = int(region["original_height"]), int(region["original_width"])
    mask = decode(value["rle"], (height, width))
    if not rle.areas([mask])[0]:
        return None
    category_id = ids.setdefault(names[0], max(ids.values(), default=0) + 1)
    label = {
        "category_id": category_id,
        "category": names[0],
        "score": None,
        "iscrowd": 0,
        "segmentation": mask,
    }
    _tighten(label)
    return label


def _text(values: Mapped, name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""
