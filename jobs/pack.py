"""`segjobs pack --images URI --output URI`: images from anywhere to Parquet shards in the one schema.

Input: whatever `predict` reads, and what is known about the images: `--annotations COCO.json`, or
`--predictions URI`, a table of predictions or labels. Output: `shards/*.parquet`, one row for every
image that has a record, with its bytes as they were (null where they are no image), in row groups
of 32 rows or about 8 MiB; `_manifest.json` with the categories. Without either, every image has a row without
detections. `datasets` opens the shards with images decoded. Run again with the same output to go on.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from jobs import annotations, chunks, join, plan, records, retries, tally, tasks, traffic, write
from jobs.chunks import SHARDS_FOLDER
from jobs.cluster import connect, plain_errors
from jobs.config import PackConfig
from jobs.console import ImageProgress, facts, size
from jobs.detect import Input, look
from jobs.encode import RECEIPT, receipts
from jobs.envelope import unseal
from jobs.plan import Cut, Plan
from jobs.read import Source
from jobs.records import PackError, Records
from jobs.source import READ_CPUS, Chunks, Work
from jobs.storage import open_store
from jobs.store import Store
from segmodel.images import ImageError, decode
from segmodel.schema import TRAINING

# Packing waits for storage: several share a CPU.
PACK_CPUS = 0.5


def run(config: PackConfig) -> int:
    """Plan or go on, pack what is left, finish; return the exit code."""
    output = open_store(config.output, config.endpoint_url)
    retries.forget()
    connect(config.address)
    table = None
    if config.predictions is not None:
        table = join.look_at(config.predictions, config.endpoint_url)
    planned = _planned(config, table, output)
    done = plan.finished_chunks(output, SHARDS_FOLDER).keys()
    left = [c for c in chunks.from_table(planned.chunks) if c.chunk_id not in done]
    facts(
        "Plan",
        [
            ("images", f"{planned.num_images} ({planned.format}), {size(planned.num_bytes)}"),
            ("shards", f"{planned.chunks.num_rows}, of them {len(left)} to do"),
            *(("note", note) for note in planned.notes),
        ],
    )
    sizes = {c.chunk_id: c.num_images for c in chunks.from_table(planned.chunks)}
    done_images = sum(sizes[name] for name in done)
    known = None
    if config.annotations is not None or table is not None:
        known = Records(
            output=output, plan_id=planned.plan_id, table=None if table is None else table.store
        )
    with ImageProgress(planned.num_images, done_images) as progress, plain_errors():
        if left:
            for batch in _packed(config, planned, [Work(chunk=c) for c in left], output, known):
                for receipt in receipts(batch):
                    progress.advance(receipt.rows)
                    retries.add(receipt.retries)
    _finish(planned, sizes, output, has_records=known is not None)
    return 0


def _finish(planned: Plan, sizes: Mapping[str, int], output: Store, *, has_records: bool) -> None:
    """Check that nothing is missing, write the manifest and the mark, say what was packed."""
    head: Mapping[str, Any] = {"categories": [], "left_out": 0}
    if has_records:
        head = records.load_head(output, planned)
    footers = tally.read_footers(output, sizes.keys(), SHARDS_FOLDER)
    found = {name: write.Counts(**json.loads(of["counts"])) for name, of in footers.items()}
    counts = write.finish(output, sizes, found)
    crowds, empty, unread = (
        sum(int(of.get(name, 0)) for of in footers.values())
        for name in ("crowds", "empty", "unread")
    )
    manifest = {
        "plan_id": planned.plan_id,
        "counts": {
            **asdict(counts),
            "crowds": crowds,
            "without_detections": empty,
            "left_out": head["left_out"],
            "detections_of_failed": unread,
        },
        "categories": head["categories"],
        "job": dict(planned.job),
        "notes": list(planned.notes),
        "shards": len(sizes),
        "retries": dict(retries.so_far()),
    }
    write.put_marks(output, manifest)
    rows = [
        ("rows", f"{counts.images}, in {len(sizes)} shards"),
        ("instances", f"{counts.detections}, of them {crowds} crowds"),
        ("categories", f"{len(head['categories'])}"),
        ("without instances", f"{empty} images"),
        ("left out", f"{head['left_out']} images without a record"),
    ]
    facts(
        "Packed",
        [
            *(rows if has_records else rows[:1]),
            (
                "in error",
                f"{counts.failed} images that cannot be read or were in error"
                + (f"; {unread} instances on them are left out" if unread else ""),
            ),
            *((f"  {kind}", f"{number}") for kind, number in sorted(counts.errors.items())),
            ("shards", output.url(f"{SHARDS_FOLDER}/*.parquet")),
        ],
    )


def _planned(config: PackConfig, table: Input | None, output: Store) -> Plan:
    """Return the plan that lies beside the output, or make and freeze one, with its records."""
    data = None
    job: dict[str, Any] = {
        "verb": "pack",
        "images": config.images,
        "format": config.format,
        "shard_size": config.shard_size,
    }
    if config.annotations is not None:
        data = annotations.read(config.annotations, config.endpoint_url)
        job["annotations_digest"] = annotations.digest(data)
    if table is not None:
        job["predictions_digest"] = table.digest()
        job["score_threshold"] = config.score_threshold
    frozen = plan.load(output)
    if frozen is not None:
        plan.refuse_other_job(frozen, job, output)
    found = look(config.images, config.format, config.endpoint_url, tasks.aside)
    if frozen is not None:
        plan.refuse_changed_input(frozen, found, output)
        return frozen
    parsed = None
    if data is not None and config.annotations is not None:
        parsed = annotations.parse(data, config.annotations)
    cut = Cut(
        chunk_size=config.shard_size,
        limit=None,
        image_column=None,
        endpoint_url=config.endpoint_url,
    )
    made = plan.make(found, job, cut, output)
    source = _source(config, made, output)
    if parsed is not None:
        made = records.freeze(output, made, annotations.match(parsed, made, source))
    elif table is not None:
        made = records.freeze(output, made, join.match(table, made, source))
    return plan.freeze(output, made)


def _source(config: PackConfig, planned: Plan, output: Store) -> Source:
    return Source(
        store=open_store(planned.folder, config.endpoint_url),
        lists=output,
        endpoint_url=config.endpoint_url,
        image_column=None,
    )


def _packed(
    config: PackConfig, planned: Plan, work: list[Work], output: Store, known: Records | None
) -> Iterable[pa.Table]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Wrapped, what a function of ours raises would reach the driver as text alone.
    context.raise_original_map_exception = True
    packed = ray.data.read_datasource(
        Chunks(work, _source(config, planned, output)),
        override_num_blocks=len(work),
        num_cpus=READ_CPUS,
    ).map_batches(
        partial(pack_chunk, output=output, known=known, score_threshold=config.score_threshold),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=PACK_CPUS,
    )
    batches: Iterable[pa.Table] = packed.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    return batches


def pack_chunk(
    block: pa.Table, output: Store, known: Records | None, score_threshold: float | None
) -> pa.Table:
    """Write a sealed chunk of images as one shard; return a block of one row of `encode.RECEIPT`.

    Raises:
        PackError: An image does not have the size that its record states.
    """
    started = time.perf_counter()
    sealed = unseal(block)
    images = sealed.table.to_pylist()
    unread = 0
    if known is None:
        rows = [_row(image) for image in images]
    else:
        known_rows = known.rows(sealed.chunk_id)
        rows = [
            _known_row(image, record, score_threshold)
            for image, record in zip(images, known_rows, strict=True)
        ]
        unread = sum(
            len(record["detections"])
            for row, record in zip(rows, known_rows, strict=True)
            if row["status"] == "error"
        )
    table = pa.Table.from_pylist(rows, schema=TRAINING)
    crowds = sum(found["iscrowd"] for row in rows for found in row["detections"])
    empty = sum(row["status"] == "ok" and not row["detections"] for row in rows)
    with retries.counted() as again, traffic.counted() as moved:
        counts = write.put_chunk(
            output,
            sealed.chunk_id,
            table,
            {"crowds": str(crowds), "empty": str(empty), "unread": str(unread)},
            SHARDS_FOLDER,
            write.training_rows_per_group(table),
        )
    receipt = {
        "chunk_id": sealed.chunk_id,
        "rows": counts.images,
        "images": counts.images,
        "detections": counts.detections,
        "errors": list(counts.errors.items()),
        "seconds": [*sealed.seconds.items(), ("write", time.perf_counter() - started)],
        "retries": list((again + Counter(sealed.retries)).items()),
        "traffic": list((moved + Counter(sealed.traffic)).items()),
    }
    return pa.Table.from_pylist([receipt], schema=RECEIPT)


def _known_row(
    image: Mapping[str, Any], record: Mapping[str, Any], score_threshold: float | None
) -> dict[str, Any]:
    """Return an image's row with what its record says; a record in error stays one."""
    # Where the shard is gone or changed, the reader knows no names; the record has them.
    assert image["error"] is not None or image["image_id"] == record["image_id"]
    names = {name: record[name] for name in ("image_id", "shard", "key")}
    row = _row({**image, **names, "error": record["error"] or image["error"]})
    if row["status"] == "error":
        return row
    if (row["height"], row["width"]) != (record["height"], record["width"]):
        raise PackError(
            f"image {row['image_id']!r} has {row['height']} x {row['width']} pixels (height x width, "
            f"upright), and its record says {record['height']} x {record['width']}: correct the "
            "record, or store the image as it was when it was labelled"
        )
    detections = [
        found
        for found in record["detections"]
        # Scores are float32: 0.7 of them is a little less than 0.7.
        if score_threshold is None
        or found["score"] is None
        or found["score"] >= np.float32(score_threshold)
    ]
    return {**row, "detections": detections}


def _row(image: Mapping[str, Any]) -> dict[str, Any]:
    names = {name: image[name] for name in ("image_id", "shard", "key")}
    error, height, width = image["error"], None, None
    if error is None:
        try:
            # All of it: a file that is cut off has a good header, and would stop a training.
            height, width = decode(image["data"]).shape[:2]
        except ImageError as problem:
            error = str(problem)
    return {
        **names,
        "height": height,
        "width": width,
        "status": "ok" if error is None else "error",
        "error": error,
        "detections": [],
        # An image that cannot be decoded would stop whoever iterates over the shards by `datasets`.
        "image": {"bytes": image["data"], "path": image["key"]} if error is None else None,
    }
