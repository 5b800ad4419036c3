"""What a person sees of a batch job but its progress."""

from collections.abc import Mapping
from typing import Any

from jobs import processor, retries, stages
from jobs.actor import Pool
from jobs.console import duration, facts, size
from jobs.plan import Plan
from jobs.stages import Busy
from jobs.store import Store
from jobs.write import Counts


def show_plan(planned: Plan, pool: Pool, left: int, title: str) -> None:
    """Show what there is to do, and who does it."""
    where = "CPU" if pool.threads is None else f"CPU, {pool.threads} thread"
    if pool.gpus_per_actor:
        where = f"{pool.gpus_per_actor:g} GPU each"
    arithmetic = processor.in_words(
        planned.job["precision"], "fp32-fast", gpus=pool.gpus_per_actor > 0
    )
    actors = f"{pool.min_actors} to {pool.max_actors}"
    if pool.min_actors == pool.max_actors:
        actors = f"{pool.max_actors}"
    facts(
        title,
        [
            ("images", f"{planned.num_images}"),
            (
                "input",
                f"{planned.num_objects} objects ({planned.format}), {size(planned.num_bytes)}",
            ),
            ("chunks", f"{planned.chunks.num_rows}, of them {left} to do"),
            ("actors", f"{actors} ({where})"),
            ("arithmetic", f"{arithmetic}, {planned.job['tasks']}"),
            *(("note", note) for note in planned.notes),
        ],
    )


def show_summary(
    counts: Counts, output: Store, of_run: Mapping[str, Any], busy: Busy | None = None
) -> None:
    """Show what came out."""
    rows = [
        ("rows", f"{counts.images}, one for each image"),
        ("instances", f"{counts.detections}"),
        ("in error", f"{counts.failed}"),
        *((f"  {kind}", f"{number}") for kind, number in sorted(counts.errors.items())),
    ]
    if of_run:
        rows += [
            ("this run", f"{of_run['images']} images in {duration(of_run['seconds'])}"),
            ("throughput", f"{of_run['images_per_second']:.2f} images/s"),
        ]
    if busy is not None and busy.shares:
        rows.append(("busy", stages.in_words(busy)))
    if again := of_run.get("retries"):
        rows.append(("asked again", f"the store, after trouble ({retries.in_words(again)})"))
    if counts.failed:
        rows.append(("errors", "the column `error` says why; --retry-errors does those rows again"))
    rows.append(("table", output.url("predictions/*.parquet")))
    facts("Done", rows)
