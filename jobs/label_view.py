"""What `label` shows a person: versions, one of them, and what is new."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from jobs import versions
from jobs.console import console, facts, size
from jobs.detect import Input
from jobs.novelty import News
from jobs.store import Store
from jobs.versions import ACCEPTED, REJECTED, REVIEW, Version


def show_all(dataset: Store) -> None:
    """Print a table of all versions."""
    every = versions.load_all(dataset)
    if not every:
        console.print(f"{dataset.uri} has no version yet.")
        return
    now = versions.current(dataset, every[-1].number)
    table = Table(title=f"Versions of {dataset.uri}", title_justify="left", box=None)
    for name in ("", "parent", "made", "state", "images", "labels", "review", "new", "model"):
        is_number = name in ("images", "labels", "review", "new")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    for one in every:
        counts, total = one.manifest["counts"]["new"], one.manifest["counts"]["all"]
        is_current = now is not None and one.number == now.number
        table.add_row(
            str(one.number),
            str(one.manifest["parent"] or "-"),
            one.manifest["created_at"][:16].replace("T", " "),
            "current" if is_current else one.manifest["status"],
            str(total[ACCEPTED]["rows"]),
            str(total[ACCEPTED]["labels"]),
            str(total[REVIEW]["rows"]),
            str(counts["images"]),
            Text((one.manifest["model"] or {}).get("digest", "people")[:6]),
        )
    console.print(table)


def show(version: Version) -> None:
    """Print what a version is."""
    facts(f"Version {version.number}, {version.manifest['status']}", facts_of(version))


def facts_of(version: Version) -> list[tuple[str, str]]:
    """Return names and values of what a version says of itself."""
    manifest = version.manifest
    new, total = manifest["counts"]["new"], manifest["counts"]["all"]
    model = manifest["model"]
    return [
        ("parent", f"{manifest['parent'] or 'none'}"),
        ("made", manifest["created_at"]),
        ("input", manifest["input"]),
        ("labelled by", f"{model['uri']} ({model['digest'][:12]})" if model else "people"),
        (
            "new images",
            f"{new['images']}, {new['replaced']} of them replace rows of the parent",
        ),
        ("  accepted", f"{new[ACCEPTED]} with {new['labels'][ACCEPTED]} labels"),
        (
            "  to review",
            f"{new[REVIEW]} with {new['labels'][REVIEW]}, and {new['audit']} to audit",
        ),
        ("  rejected", f"{new[REJECTED]}; {new['labels'][REJECTED]} detections"),
        *((f"    {name}", f"{number}") for name, number in new["reasons"].items()),
        *_corrections(manifest),
        ("all images", f"{total[ACCEPTED]['rows']} with {total[ACCEPTED]['labels']} labels"),
        ("all to review", f"{total[REVIEW]['rows']}"),
        *_drift(manifest),
        *(("note", note) for note in manifest["notes"]),
        ("rows", version.store.url(f"{versions.folder(version.number)}")),
    ]


def show_news(parent: Version | None, found: Input, new: News) -> None:
    """Print what is new at an input."""
    objects = new.objects
    num_bytes = sum(objects["size"].to_pylist())
    facts(
        "New since " + ("the beginning" if parent is None else f"version {parent.number}"),
        [
            ("input", f"{found.objects.num_rows} objects ({found.format}): {found.store.uri}"),
            ("new", f"{objects.num_rows - len(new.changed)} objects"),
            ("changed", f"{len(new.changed) - len(new.again)} objects"),
            *((("tried again", f"{len(new.again)} objects"),) if new.again else ()),
            ("to read", size(num_bytes)),
            *((("gone", f"{new.gone} labelled objects; their rows stay"),) if new.gone else ()),
            *(("note", note) for note in found.notes),
        ],
    )


def _corrections(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, number in (manifest.get("reviewed") or {}).get("counts", {}).items():
        yield f"  {name}", f"{number}"


def _drift(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, moved in manifest["drift"].items():
        over = " - over --max-drift" if name in manifest["exceeded"] else ""
        yield (
            f"drift of {name.replace('_', ' ')}",
            f"{moved['distance']:.3f} (chance alone: up to {moved['chance']:.3f}){over}",
        )
    if manifest["exceeded"]:
        yield (
            "candidate",
            f"it moved further than {manifest['max_drift']:g}: --promote {manifest['version']} makes it current",
        )
