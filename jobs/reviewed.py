"""Reviewed labels come back: a COCO instances file over a version of a data set.

The reviewer wins: each image of the file gets the file's labels in the place of the machine's, wherever its row
was, and one without annotations is accepted as empty. The version that this makes holds the same images.

Of several reviews the one that was imported last wins, image by image. A file that the current version builds upon
is not imported again, whatever came after it, so an old one can never undo a newer one by accident; nor is one
that says what the version says already.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import label_view, labelling, sorting, version_facts, versions
from jobs.config import ConfigError
from jobs.console import facts
from jobs.detect import InputError
from jobs.label_config import LabelConfig
from jobs.labelling import DIGITS
from jobs.pairing import BY_FILE_NAME, NONE, pair
from jobs.records import some_of
from jobs.sorting import Sorted, Stage
from jobs.storage import open_uri
from jobs.store import Store
from jobs.tables import NAMES
from jobs.versions import ACCEPTED, REJECTED, REVIEW, TABLES, Version
from segmodel import coco, rle
from segmodel.matching import pairwise_iou
from segmodel.policy import AUDIT

Row: TypeAlias = dict[str, Any]

# From which a label of the machine and one of the reviewer are of the same thing.
SAME_IOU = 0.5
ROWS_PER_OBJECT = 256

_WERE = {ACCEPTED: "accepted", REVIEW: "to review", REJECTED: "rejected"}


@dataclass(frozen=True, kw_only=True)
class Reviewed:
    """A reviewed file.

    Attributes:
        uri: Where it is.
        sha256: Of its bytes.
        rows: One for each image, in the one schema.
        categories: `{"id", "name"}` of each.
    """

    uri: str
    sha256: str
    rows: Sequence[Row]
    categories: Sequence[Mapping[str, Any]]


def label(config: LabelConfig, dataset: Store) -> int | None:
    """Publish a version with reviewed labels; return the exit code, or None where another was faster.

    Raises:
        ConfigError: There is no version yet, or categories contradict one another.
        InputError: The file cannot be used, or names images that the version has not.
    """
    assert config.reviewed is not None
    most = versions.latest(dataset)
    parent = versions.current(dataset, most)
    if parent is None:
        raise ConfigError(f"{dataset.uri} has no version to review: label something first")
    found = _with_ids_of(parent, _read(config.reviewed, config.endpoint_url))
    if (earlier := _import_of(parent, found)) is not None:
        return _nothing_to_do(found, _already(earlier, parent))
    categories = version_facts.merged_categories(parent, found.categories, found.uri)
    old = _rows_of(parent, found)
    if all(_says(mine, theirs) for mine, theirs in zip(old, found.rows, strict=True)):
        return _nothing_to_do(found, f"version {parent.number} says the same of its images")
    name = version_facts.digest([version_facts.identity(parent), found.sha256])[:DIGITS]
    stage = Stage(store=dataset, folder=f"{versions.folder(most + 1)}/{name}")
    new, counts = _merged(found, old, stage)
    replaced = sorted(row["image_id"] for row in old)
    kept, taken = sorting.replace_rows(parent.objects, replaced, stage, TABLES)
    objects = pa.concat_tables([kept, sorting.listed(stage, [*taken.objects, *new.objects])])
    inherited = ("input", "format", "work", "policy_digest")
    manifest = {
        **version_facts.made(parent, new, taken, objects, None),
        **{name: parent.manifest[name] for name in inherited},
        "model": None,
        "policy": None,
        "categories": categories,
        "reviewed": {"uri": found.uri, "sha256": found.sha256, "counts": counts},
        "notes": ["the reviewer wins: the machine's labels of these images are replaced"],
    }
    if not labelling.put(stage, most + 1, manifest, objects, parent.inputs):
        return None
    label_view.show(versions.load(dataset, most + 1))
    return 0


def _read(uri: str, endpoint_url: str | None) -> Reviewed:
    store, name = open_uri(uri, endpoint_url)
    data = store.read(name)
    try:
        file = json.loads(data)
        rows = list(coco.rows(file))
        categories = coco.categories(file)
    except (ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{store.url(name)} is no COCO instances file: {error}") from error
    for row in rows:
        for one in row["detections"]:
            if one["segmentation"] is None:
                raise InputError(
                    f"{store.url(name)} has boxes without masks, such as in {row['image_id']!r}: export it "
                    "with masks"
                )
            _tighten(one)
    return Reviewed(
        uri=store.url(name),
        sha256=hashlib.sha256(data).hexdigest(),
        rows=rows,
        categories=categories,
    )


def _with_ids_of(parent: Version, found: Reviewed) -> Reviewed:
    """Give categories the ids that their names have in the data set: reviewers' tools count anew."""
    known = {category["name"]: category["id"] for category in parent.categories}
    ids = {of["id"]: known.get(of["name"], of["id"]) for of in found.categories}
    for row in found.rows:
        for one in row["detections"]:
            one["category_id"] = ids[one["category_id"]]
    categories = [{**of, "id": ids[of["id"]]} for of in found.categories]
    return replace(found, categories=categories)


def _tighten(label: Row) -> None:
    """Take area and box from the mask: reviewers' tools leave the old ones, or none."""
    label["area"] = float(rle.areas([label["segmentation"]])[0])
    label["bbox"] = rle.bounding_boxes([label["segmentation"]])[0].tolist()


def _import_of(parent: Version, found: Reviewed) -> Version | None:
    """Return the version that the same file became, of those that a version builds upon and itself."""
    made = {version.number: version for version in versions.load_all(parent.store)}
    step: int | None = parent.number
    while step is not None:
        if (made[step].manifest.get("reviewed") or {}).get("sha256") == found.sha256:
            return made[step]
        step = made[step].manifest["parent"]
    return None


def _already(earlier: Version, parent: Version) -> str:
    if earlier.number == parent.number:
        return f"is in version {parent.number} already"
    return (
        f"is in version {parent.number} already, which builds upon version {earlier.number}; what was imported or "
        f"replaced since stays. To have its labels win again, export the file anew from the reviewers' tool, or "
        f"--promote {earlier.number}"
    )


def _nothing_to_do(found: Reviewed, why: str) -> int:
    facts("Nothing to do", [("reviewed", f"{found.uri}: {why}. Nothing was published.")])
    return 0


def _says(mine: Row, theirs: Row) -> bool:
    """Say whether a person has given an image these very labels already."""
    # An empty image has no score that would tell who says so.
    by_a_person = mine["detections"] and all(one["score"] is None for one in mine["detections"])
    return bool(mine["table"] == ACCEPTED and by_a_person and _labels(mine) == _labels(theirs))


def _labels(row: Row) -> list[tuple[Any, ...]]:
    return sorted(
        (one["category_id"], one["iscrowd"], one["segmentation"]["counts"])
        for one in row["detections"]
    )


def _rows_of(parent: Version, found: Reviewed) -> list[Row]:
    """Return the parent's row of each reviewed image, in the order of the file, with its `table`.

    Raises:
        InputError: It has none, or of another size.
    """
    listed = [row for row in parent.objects.to_pylist() if row["table"] in TABLES]
    parts = [_names(parent, row) for row in listed]
    names = pa.concat_tables(parts)
    paths = [f"{row['shard']}/{row['key']}" if row["shard"] else row["key"] for row in found.rows]
    # `pair` refuses where nothing pairs, in words of `evaluate`.
    known = {_base_name(key) for key in names["key"].to_pylist()}
    _refuse_unknown([path for path in paths if _base_name(path) not in known], found, parent)
    paired = pair(paths, names, BY_FILE_NAME, subset=True)
    _refuse_unknown([paths[number] for number in paired.missing.tolist()], found, parent)
    old: list[Row] = [{}] * len(paths)
    start = 0
    for row, part in zip(listed, parts, strict=True):
        places = paired.places[start : start + part.num_rows]
        start += part.num_rows
        wanted = {part["image_id"][n].as_py(): at for n, at in enumerate(places) if at != NONE}
        if wanted:
            for mine in sorting.read(parent.store, row).to_pylist():
                if mine["image_id"] in wanted and _stands_for_image(row["table"], mine):
                    old[wanted[mine["image_id"]]] = {**mine, "table": row["table"]}
    for mine, theirs in zip(old, found.rows, strict=True):
        if (mine["height"], mine["width"]) not in (
            (None, None),
            (theirs["height"], theirs["width"]),
        ):
            raise InputError(
                f"image {mine['image_id']!r} has {mine['height']} x {mine['width']} pixels (height x width), "
                f"and {found.uri} says {theirs['height']} x {theirs['width']}: correct the file"
            )
    return old


def _base_name(path: str) -> str:
    return path.rpartition("/")[2]


def _refuse_unknown(paths: Sequence[str], found: Reviewed, parent: Version) -> None:
    if paths:
        raise InputError(
            f"{len(paths)} images of {found.uri} are not in version {parent.number}: {some_of(paths)}"
        )


def _stands_for_image(table: str, row: Row) -> bool:
    """Say whether a row is the one of its image, not one to be audited, or of rejected detections alone."""
    return table == ACCEPTED or row["reason"] not in ((AUDIT,) if table == REVIEW else (None,))


def _names(parent: Version, row: Row) -> pa.Table:
    """Return the names of an object's rows that stand for images."""
    columns = [*NAMES, *(() if row["table"] == ACCEPTED else ("reason",))]
    held = sorting.read(parent.store, row, columns)
    if row["table"] == REVIEW:
        held = held.filter(pc.not_equal(held["reason"], AUDIT))
    elif row["table"] == REJECTED:
        held = held.filter(pc.is_valid(held["reason"]))
    return held.select(list(NAMES)).replace_schema_metadata(None)


def _merged(found: Reviewed, old: Sequence[Row], stage: Stage) -> tuple[Sorted, dict[str, int]]:
    """Write the reviewed rows; return what they are, and what the reviewer did to the machine's."""
    counts: Counter[str] = Counter()
    new = Sorted(images=len(old))
    rows = []
    for row, mine in zip(found.rows, old, strict=True):
        if mine["image"] is None:
            raise InputError(
                f"image {mine['image_id']!r} could not be read when it was labelled ({mine['error']}), and "
                f"cannot be trained on: take it out of {found.uri}"
            )
        counts.update(_judged(row["detections"], mine["detections"]))
        counts[f"images that were {_WERE[mine['table']]}"] += 1
        kept = {
            name: mine[name] for name in (*NAMES, "height", "width", "status", "error", "image")
        }
        rows.append({**kept, "detections": row["detections"]})
        new.profile.add(row["detections"])
    new.fates[ACCEPTED] = len(rows)
    new.labels[ACCEPTED] = sum(len(row["detections"]) for row in rows)
    for start in range(0, len(rows), ROWS_PER_OBJECT):
        some, name = rows[start : start + ROWS_PER_OBJECT], f"reviewed-{start:08d}"
        stage.put(ACCEPTED, name, some, {"reviewed_sha256": found.sha256})
        new.objects += sorting.entry(stage, ACCEPTED, name, some)
    return new, dict(sorted(counts.items()))


def _judged(theirs: Sequence[Row], ours: Sequence[Row]) -> Counter[str]:
    """Count the machine's labels that the reviewer kept, renamed or took out, and those that he added."""
    masks, others = ([one["segmentation"] for one in of] for of in (theirs, ours))
    ious = pairwise_iou(masks, others, np.zeros(len(ours), np.bool_))
    counts: Counter[str] = Counter()
    pairs = np.argwhere(ious >= SAME_IOU)
    best_first = pairs[np.argsort(-ious[tuple(pairs.T)], kind="stable")]
    seen, used = set[int](), set[int]()
    for mine, machine in best_first.tolist():
        if mine in seen or machine in used:
            continue
        seen.add(mine)
        used.add(machine)
        is_same = theirs[mine]["category_id"] == ours[machine]["category_id"]
        counts["labels kept" if is_same else "labels of another category"] += 1
    counts["labels added"] += len(theirs) - len(seen)
    counts["labels taken out"] += len(ours) - len(used)
    return counts
