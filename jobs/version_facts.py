"""What a version says of itself: its manifest, made of what went into it."""

import hashlib
import json
import platform
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs import retries
from jobs.config import ConfigError
from jobs.sorting import Sorted
from jobs.versions import CANDIDATE, PUBLISHED, TABLES, Version
from segmodel import drift
from segmodel.drift import Distance, Profile


def stamp() -> dict[str, str]:
    """Return what tells one run from any other, and when it was."""
    return {
        "run_id": uuid.uuid4().hex,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def identity(parent: Version | None) -> str:
    """Return a digest of a version's manifest, which names all that is in it."""
    if parent is None:
        return ""
    return digest(parent.manifest)


def digest(values: Any) -> str:
    """Return a digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def merged_categories(
    parent: Version | None, new: Sequence[Mapping[str, Any]], whose: str
) -> list[dict[str, Any]]:
    """Return the categories of a parent and of what is added, by id.

    Raises:
        ConfigError: They contradict one another.
    """
    names = {one["id"]: one["name"] for one in (parent.categories if parent else ())}
    for one in new:
        if names.setdefault(one["id"], one["name"]) != one["name"]:
            raise ConfigError(
                f"category {one['id']} is {names[one['id']]!r} in the data set and {one['name']!r} in {whose}: "
                "give the categories the same ids, or start another --dataset"
            )
    again = [name for name, times in Counter(names.values()).items() if times > 1]
    if again:
        ids = [number for number, name in names.items() if name == again[0]]
        raise ConfigError(
            f"category {again[0]!r} would have the ids {ids[0]} (in the data set) and {ids[1]} (in {whose}): give it "
            "one, or start another --dataset"
        )
    return [{"id": number, "name": names[number]} for number in sorted(names)]


def profile_of(parent: Version | None) -> Profile:
    """Return what all images of a version hold."""
    return Profile() if parent is None else Profile.from_dict(parent.manifest["profile"]["all"])


def passes(candidate: Version, max_drift: float | None) -> bool:
    """Say whether a candidate would be published by a gate: a looser one than its own.

    Distances are rounded in a manifest: with its own gate a candidate never passes, however close it came.
    """
    if max_drift is None:
        return True
    manifest = candidate.manifest
    moved = [Distance(**one) for one in manifest["drift"].values()]
    return max_drift > manifest["max_drift"] and not any(one.exceeds(max_drift) for one in moved)


def made(
    parent: Version | None,
    new: Sorted,
    taken: Sorted,
    objects: pa.Table,
    max_drift: float | None,
) -> dict[str, Any]:
    """Return the part of a manifest that says what is in a version.

    Args:
        parent: What it was made from.
        new: What was labelled.
        taken: What was taken out of the parent.
        objects: All objects of the version, a table of `versions.LISTING`.
        max_drift: The gate; None: there is none.
    """
    before = profile_of(parent)
    moved = drift.compare(before, new.profile)
    every = Profile()
    for part in (before, taken.profile, new.profile):
        every.merge(part)
    exceeded = [n for n, d in moved.items() if max_drift is not None and d.exceeds(max_drift)]
    return {
        **stamp(),
        "status": CANDIDATE if exceeded else PUBLISHED,
        "parent": None if parent is None else parent.number,
        "parent_digest": identity(parent) or None,
        "drift": {
            name: {k: round(v, 4) for k, v in asdict(d).items()} for name, d in moved.items()
        },
        "max_drift": max_drift,
        "exceeded": exceeded,
        "counts": {
            "new": {
                "images": new.images,
                **{name: new.fates[name] for name in (*TABLES, "audit")},
                "labels": {name: new.labels[name] for name in TABLES},
                "reasons": dict(sorted(new.reasons.items())),
                "replaced": -taken.images,
            },
            "all": _totals(objects),
        },
        "profile": {"new": new.profile.to_dict(), "all": every.to_dict()},
        "retries": dict(retries.so_far()),
        "software": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("segjobs", "ray", "torch", "pyarrow")},
        },
    }


def _totals(objects: pa.Table) -> dict[str, Any]:
    totals = {}
    for name in TABLES:
        some = objects.filter(pc.equal(objects["table"], name))
        rows, detections = (
            int(pc.sum(some[column], min_count=0).as_py()) for column in ("rows", "detections")
        )
        totals[name] = {"objects": some.num_rows, "rows": rows, "labels": detections}
    return totals
