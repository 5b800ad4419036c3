"""Reviewed labels come back: COCO instances, or Label Studio's tasks, over a version of a data set.

The reviewer wins: each image of the file gets the file's labels in the place of the machine's, wherever its row
was, and one without annotations is accepted as empty. The version that this makes holds the same images. An image
whose name another photo has by now is left out: its labels are of the old one.

Of several reviews the one that was imported last wins, image by image. A file that the current version builds upon
is not imported again, whatever came after it, so an old one can never undo a newer one by accident; nor is one
that says what the version says already.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs import label_view, labelling, review_files, sorting, suffixes, version_facts, versions
from jobs.config import ConfigError
from jobs.console import facts
from jobs.contents import FIELD, Contents
from jobs.detect import InputError
from jobs.label_config import LabelConfig
from jobs.labelling import DIGITS
from jobs.pairing import NONE
from jobs.records import some_of
from jobs.review_files import Reviewed, ReviewedImage
from jobs.sorting import Sorted, Stage
from jobs.store import Store
from jobs.tables import NAMES
from jobs.versions import ACCEPTED, REJECTED, REVIEW, TABLES, Version
from segmodel.matching import pairwise_iou
from segmodel.policy import AUDIT

Row: TypeAlias = dict[str, Any]

# From which a label of the machine and one of the reviewer are of the same thing.
SAME_IOU = 0.5
ROWS_PER_OBJECT = 256

_WERE = {ACCEPTED: "accepted", REVIEW: "to review", REJECTED: "rejected"}


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
    found = review_files.read(config.reviewed, config.endpoint_url, parent.categories)
    if (earlier := _import_of(parent, found)) is not None:
        return _nothing_to_do(found, _already(earlier, parent))
    categories = version_facts.merged_categories(parent, found.categories, found.uri)
    found, old = _of_the_same_photos(parent, found, _rows_of(parent, found))
    _refuse_other_sizes(found, old)
    _refuse_to_empty(config, found, old, parent)
    if all(_says(mine, theirs) for mine, theirs in zip(old, found.images, strict=True)):
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
        "notes": [
            "the reviewer wins: the machine's labels of these images are replaced",
            *found.notes,
        ],
    }
    if not labelling.put(stage, most + 1, manifest, objects, parent.inputs):
        return None
    label_view.show(versions.load(dataset, most + 1))
    return 0


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
    said = [("note", note) for note in found.notes]
    facts("Nothing to do", [("reviewed", f"{found.uri}: {why}. Nothing was published."), *said])
    return 0


def _says(mine: Row, theirs: ReviewedImage) -> bool:
    """Say whether a person has given an image these very labels already."""
    # An empty image has no score that would tell who says so.
    by_a_person = mine["detections"] and all(one["score"] is None for one in mine["detections"])
    return bool(
        mine["table"] == ACCEPTED
        and by_a_person
        and _labels(mine["detections"]) == _labels(theirs.detections)
    )


def _labels(detections: Sequence[Row]) -> list[tuple[Any, ...]]:
    return sorted(
        (one["category_id"], one["iscrowd"], one["segmentation"]["counts"]) for one in detections
    )


def _rows_of(parent: Version, found: Reviewed) -> list[Row]:
    """Return the parent's row of each reviewed image, in the order of the file, with its `table`.

    Raises:
        InputError: It has none, or the file does not say which.
    """
    listed = [row for row in parent.objects.to_pylist() if row["table"] in TABLES]
    parts = [_names(parent, row) for row in listed]
    places = _places(parent, found, pa.concat_tables(parts))
    old: list[Row] = [{}] * len(found.images)
    start = 0
    for row, part in zip(listed, parts, strict=True):
        here = places[start : start + part.num_rows]
        start += part.num_rows
        wanted = {part["image_id"][n].as_py(): at for n, at in enumerate(here) if at != NONE}
        if wanted:
            for mine in sorting.read(parent.store, row).to_pylist():
                if mine["image_id"] in wanted and _stands_for_image(row["table"], mine):
                    old[wanted[mine["image_id"]]] = {**mine, "table": row["table"]}
    return old


def _places(parent: Version, found: Reviewed, names: pa.Table) -> npt.NDArray[np.int64]:
    """Return for each row of `names` the number of its image in the file, or `NONE`."""
    names = names.append_column("row", pa.array(np.arange(names.num_rows)))
    # What stands for a damaged shard is no image.
    images = names.filter(pc.not_equal(names["key"], ""))
    ids = pa.array([image.image_id for image in found.images], pa.string())
    rows: list[int | None] = pc.index_in(ids, images["image_id"]).to_pylist()
    without = [n for n, image in enumerate(found.images) if image.image_id is None]
    by_path = suffixes.rows_of([found.images[n].path for n in without], images)
    for number, row in zip(without, by_path, strict=True):
        rows[number] = row
    _refuse_unknown(
        [
            image.image_id or image.path
            for image, row in zip(found.images, rows, strict=True)
            if row is None
        ],
        found,
        parent,
    )
    places = np.full(names.num_rows, NONE, np.int64)
    for number, row in enumerate(images["row"].take(pa.array(rows, pa.int64())).to_pylist()):
        if places[row] != NONE:
            both = [found.images[n].path for n in (places[row], number)]
            raise InputError(
                f"two images of {found.uri} are {names['image_id'][row].as_py()!r}: {some_of(both)}"
            )
        places[row] = number
    return places


def _of_the_same_photos(
    parent: Version, found: Reviewed, old: Sequence[Row]
) -> tuple[Reviewed, list[Row]]:
    """Leave out the images whose name another photo has, since the file was exported.

    Raises:
        InputError: None is left.
    """
    if not any(image.content for image in found.images):
        note = f"the file does not say what its images held ({FIELD}): whether they were replaced is not known"
        return replace(found, notes=(*found.notes, note)), list(old)
    contents = Contents(parent)
    both = list(zip(found.images, old, strict=True))
    same = [one for one in both if one[0].content in ("", contents.of(one[1]["image_id"]))]
    if len(same) == len(both):
        return found, list(old)
    is_same = {one[1]["image_id"] for one in same}
    others = [row["image_id"] for row in old if row["image_id"] not in is_same]
    words = (
        f"{len(others)} images are other photos than those that were exported, and are left out: "
        f"{some_of(others)}"
    )
    if not same:
        raise InputError(f"{found.uri}: {words}: export the queue of version {parent.number} anew")
    left = replace(found, images=[one[0] for one in same], notes=(*found.notes, words))
    return left, [one[1] for one in same]


def _refuse_other_sizes(found: Reviewed, old: Sequence[Row]) -> None:
    for mine, theirs in zip(old, found.images, strict=True):
        size_hw = (mine["height"], mine["width"])
        if theirs.size_hw not in (None, size_hw) and size_hw != (None, None):
            raise InputError(
                f"image {mine['image_id']!r} has {size_hw[0]} x {size_hw[1]} pixels (height x width), "
                f"and {found.uri} says {theirs.size_hw[0]} x {theirs.size_hw[1]}: correct the file"
            )


def _refuse_to_empty(
    config: LabelConfig, found: Reviewed, old: Sequence[Row], parent: Version
) -> None:
    """Refuse a file without any label: more often a tool has left them out than all of them were wrong."""
    labelled = sum(bool(row["detections"]) for row in old if row["table"] != REJECTED)
    if labelled and not config.reviewed_empty and not any(i.detections for i in found.images):
        raise InputError(
            f"{found.uri} has no label for any of its {len(found.images)} images, and {labelled} of them have "
            f"labels in version {parent.number}: Label Studio's COCO export leaves brush masks out (export its "
            "JSON), other tools have their own ways. If all of it is to be background, say --reviewed-empty"
        )


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
    for image, mine in zip(found.images, old, strict=True):
        if mine["image"] is None:
            raise InputError(
                f"image {mine['image_id']!r} could not be read when it was labelled ({mine['error']}), and "
                f"cannot be trained on: take it out of {found.uri}"
            )
        counts.update(_judged(image.detections, mine["detections"]))
        counts[f"images that were {_WERE[mine['table']]}"] += 1
        kept = {
            name: mine[name] for name in (*NAMES, "height", "width", "status", "error", "image")
        }
        rows.append({**kept, "detections": image.detections})
        new.profile.add(image.detections)
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
