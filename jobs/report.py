"""`segjobs report --predictions URI --images URI --output DIR`: a page to look at.

Input: a table of the one schema, the images that it was made of, and with `--truth` a COCO instances
file or a packed set. Output: `index.html` and thumbnails beside it, at most 20 MB for a table of any
size, which a browser opens without any network. One pass reads the small columns of the table; masks
and images are read for those that are shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from jobs import documents, gallery, label_view, page, pictures, retries, versions
from jobs.cluster import plain_errors
from jobs.comparison import Asked, Result, compared
from jobs.config import ConfigError, ReportConfig
from jobs.console import ImageProgress, console, duration, facts
from jobs.gallery import Group, Shown
from jobs.page import Content, Quality
from jobs.pairing import NONE, Pairing, pair
from jobs.plan import PLAN
from jobs.reference import Truth, open_truth
from jobs.storage import lies_within, open_store
from jobs.survey import Survey, Wish, survey
from jobs.tables import Tables, open_tables
from jobs.versions import Version
from jobs.write import MANIFEST, SUCCESS
from segmodel.drawing import COLOURS

INDEX = "index.html"
# Of errors in the table of kinds; the gallery shows more.
EXAMPLES_OF_KIND = 3


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Predictions, compared with the truth."""

    truth: Truth
    paired: Pairing
    result: Result


def run(config: ReportConfig) -> int:
    """Survey, choose, fetch, draw; return the exit code."""
    output = open_store(config.output, config.endpoint_url)
    _refuse_nested(config)
    table = open_tables(config.predictions, config.endpoint_url)
    versus = None if config.truth is None else _compare(config, config.truth, table)
    measure = None if versus is None else _shares(versus)
    wish = Wish(most=config.examples, per_kind=config.examples, seed=config.seed, measure=measure)
    with ImageProgress(table.names.num_rows, 0) as progress:
        found = survey(table, wish, progress.advance)
    groups = gallery.groups_of(found, config.examples, by_truth=versus is not None)
    rows = [tile.row for group in groups for tile in group.tiles]
    fault_rows: Mapping[int, int] = {}
    if versus is not None:
        fault_rows = gallery.rows_of(versus.result.faults, versus.paired)
        rows += fault_rows.values()
    shown, wanted = gallery.read_rows(table, rows)
    if versus is not None:
        gallery.add_truth(shown, versus.truth, versus.paired)
        groups += gallery.fault_groups(versus.result.faults, fault_rows, shown)
    images = pictures.open_images(config.images, table.store, config.endpoint_url)
    fetched = pictures.fetch(wanted, images)
    gallery.put_thumbnails(shown, fetched, output, config.max_pixels)
    content = _content(config, table, found, versus, groups, shown)
    output.put(INDEX, page.render(content))
    _show(found, shown, output.url(INDEX))
    return 0


def _refuse_nested(config: ReportConfig) -> None:
    """Refuse a page within the images: its thumbnails would be taken for new input.

    Raises:
        ConfigError: It is.
    """
    if lies_within(config.output, config.images, config.endpoint_url):
        raise ConfigError(f"--output {config.output} lies within --images: choose a place outside")


def _compare(config: ReportConfig, uri: str, table: Tables) -> Compared:
    truth = open_truth(uri, config.endpoint_url)
    paired = pair(truth.names, table.names, truth.ways, subset=config.subset)
    asked = Asked(
        score_threshold=config.score_threshold, num_faults=config.examples, address=config.address
    )
    total = Result.none(asked)
    with ImageProgress(len(truth.names), 0) as progress, plain_errors():
        for part, result in compared(asked, truth, table, paired):
            total.merge(result)
            progress.advance(len(part.places))
    return Compared(truth=truth, paired=paired, result=total)


def _shares(versus: Compared) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return (rows,) float64, the share of each row's image that is right; NaN where that says nothing."""
    shares = versus.result.faults.shares
    by_place = np.full(len(versus.truth.names) + 1, np.nan)
    by_place[list(shares)] = list(shares.values())
    assert NONE == -1, "rows without an image take the last place, which stays NaN"
    return by_place[versus.paired.places]


def _content(
    config: ReportConfig,
    table: Tables,
    found: Survey,
    versus: Compared | None,
    groups: Sequence[Group],
    shown: Mapping[int, Shown],
) -> Content:
    of_version = versions.find(config.predictions, config.endpoint_url)
    manifest, notes = _manifest(table, found)
    quality = None
    if versus is not None:
        scores = versus.result.matches.summary(versus.truth.image_order)
        quality = Quality(
            scores=scores, confusion=versus.result.confusion, truth=versus.truth.facts["uri"]
        )
        notes += _notes_on_truth(versus)
    ranked = sorted(found.categories.items(), key=lambda item: (-item[1].detections, item[0]))
    names = dict.fromkeys(name for (_, name), _ in ranked)
    for image in shown.values():
        names |= dict.fromkeys(gallery.name_of(item) for item in image.truth or ())
    data = {
        **gallery.to_data(groups, shown, list(names)),
        "palette": [list(colour) for colour in COLOURS],
        "threshold": config.score_threshold,
    }
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Content(
        title="Instance segmentation report",
        subtitle=f"{table.url} · page made {made}",
        notes=notes,
        found=found,
        quality=quality,
        examples=_examples(found, shown),
        facts=_version_facts(config, of_version[0])
        if of_version
        else _facts(config, table, manifest),
        details=_details(of_version[0].manifest if of_version else manifest),
        data=data,
    )


def _manifest(table: Tables, found: Survey) -> tuple[dict[str, Any], list[str]]:
    """Return the job's manifest, or nothing, and what is to be said about it."""
    store = table.store
    if store.info(PLAN) is not None and store.info(SUCCESS) is None:
        return {}, [
            "The job is not finished: this page shows the part of the table that was there. Run the job "
            "again to finish it, and then this command."
        ]
    try:
        manifest = documents.read(store, MANIFEST, made_by_us=False)
    except FileNotFoundError:
        return {}, []
    counted = manifest.get("counts", {}).get("images")
    if counted not in (None, found.images):
        return manifest, [
            f"The manifest counts {counted:,} images, and the table has {found.images:,} rows: objects "
            "were added to it or taken away."
        ]
    return manifest, []


def _notes_on_truth(versus: Compared) -> list[str]:
    numbers = {
        "images of the truth have no prediction and count as nothing found.": len(
            versus.paired.missing
        ),
        "predictions are not compared: the truth has not their images.": versus.paired.num_others,
    }
    return [f"{number:,} {words}" for words, number in numbers.items() if number]


def _facts(
    config: ReportConfig, table: Tables, manifest: Mapping[str, Any]
) -> list[tuple[str, str]]:
    job, of_run, pool = (manifest.get(name, {}) for name in ("job", "run", "pool"))
    again = of_run.get("retries", manifest.get("retries"))
    known = {
        "finished": manifest.get("finished_at"),
        "run": of_run.get("run_id"),
        "model digest": ", ".join(table.models) or job.get("model_digest"),
        "images": config.images,
        "truth": config.truth,
        "images of last run": of_run.get("images"),
        "time of last run": duration(of_run["seconds"]) if "seconds" in of_run else None,
        "throughput": f"{of_run['images_per_second']:.2f} images/s"
        if "images_per_second" in of_run
        else None,
        "chunks": manifest.get("chunks"),
        "retries": None if again is None else retries.in_words(again) or "none",
        "actors": pool.get("max_actors"),
        "score threshold": job.get("score_threshold"),
        "most detections": job.get("max_detections"),
        "arithmetic": job.get("precision"),
        "notes": "; ".join(manifest.get("notes", ())),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def _version_facts(config: ReportConfig, version: Version) -> list[tuple[str, str]]:
    """Return what a version says of itself; it has many jobs behind it, and no manifest of one."""
    known = [("version", f"{version.number}, {version.manifest['status']}")]
    known += [(name.strip(), value) for name, value in label_view.facts_of(version)]
    known += [("images", config.images), ("truth", config.truth or "")]
    return [(name, value) for name, value in known if value]


def _details(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    titles = {
        "config": "Configuration",
        "job": "What results depend on",
        "versions": "Versions",
        "policy": "Policy of the labels",
        "drift": "Drift against the parent",
        "reviewed": "Reviews",
        "software": "Software",
    }
    return [
        (title, json.dumps(manifest[name], indent=2, ensure_ascii=False))
        for name, title in titles.items()
        if manifest.get(name)
    ]


def _examples(found: Survey, shown: Mapping[int, Shown]) -> dict[str, list[dict[str, Any]]]:
    return {
        kind: [
            {"image_id": shown[row].row["image_id"], "error": shown[row].error}
            for row in picks.rows
            if row in shown
        ][:EXAMPLES_OF_KIND]
        for kind, picks in found.failed.items()
    }


def _show(found: Survey, shown: Mapping[int, Shown], url: str) -> None:
    cannot = sum(image.src is None for image in shown.values())
    facts(
        "Report",
        [
            ("rows", f"{found.images}, of them {found.kinds.total()} in error"),
            ("instances", f"{found.detections}"),
            ("shown", f"{len(shown)} images"),
            *([("without picture", f"{cannot} of them: their tiles say why")] if cannot else []),
        ],
    )
    console.print(f"Page: {url}", markup=False)
