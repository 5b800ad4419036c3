"""`segjobs pack --images URI --output URI`: images from anywhere to Parquet shards in the one schema.

Input: whatever `predict` reads. Output: `shards/*.parquet`, one row for every image with its bytes
as they were (null where they are no image) and an empty list of detections; `datasets` opens them
with images decoded. Run again with the same output to go on.
"""

import json
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data

from jobs import chunks, plan, write
from jobs.chunks import SHARDS_FOLDER
from jobs.cluster import connect, plain_errors
from jobs.config import PackConfig
from jobs.console import ImageProgress, console, facts, size
from jobs.detect import look
from jobs.encode import RECEIPT, receipts
from jobs.envelope import unseal
from jobs.plan import Cut, Plan
from jobs.read import Source
from jobs.source import READ_CPUS, Chunks, Work
from jobs.storage import open_store
from jobs.store import Store
from segmodel.images import ImageError, probe
from segmodel.schema import TRAINING

# Packing waits for storage: several share a CPU.
PACK_CPUS = 0.5


def run(config: PackConfig) -> int:
    """Plan or go on, pack what is left, finish; return the exit code."""
    output = open_store(config.output, config.endpoint_url)
    connect(config.address)
    planned = _planned(config, output)
    done = plan.finished_chunks(output, SHARDS_FOLDER).keys()
    left = [c for c in chunks.from_table(planned.chunks) if c.chunk_id not in done]
    facts(
        "Plan",
        [
            ("images", f"{planned.num_images} ({planned.format}), {size(planned.num_bytes)}"),
            ("shards", f"{planned.chunks.num_rows}, of them {len(left)} to do"),
        ],
    )
    sizes = {c.chunk_id: c.num_images for c in chunks.from_table(planned.chunks)}
    done_images = sum(sizes[name] for name in done)
    with ImageProgress(planned.num_images, done_images) as progress, plain_errors():
        if left:
            for batch in _packed(config, planned, [Work(chunk=c) for c in left], output):
                for receipt in receipts(batch):
                    progress.advance(receipt.rows)
    found = write.read_counts(output, sizes.keys(), SHARDS_FOLDER)
    counts = write.finish(output, sizes, found)
    manifest = {"counts": vars(counts), "job": dict(planned.job), "shards": len(sizes)}
    write.put_marks(output, manifest)
    console.print(
        f"{counts.images} images in {len(sizes)} shards, {counts.failed} of them cannot be read "
        f"({json.dumps(dict(counts.errors))}): {output.url(SHARDS_FOLDER)}/*.parquet",
        markup=False,
    )
    return 0


def _planned(config: PackConfig, output: Store) -> Plan:
    job = {
        "verb": "pack",
        "images": config.images,
        "format": config.format,
        "shard_size": config.shard_size,
    }
    frozen = plan.load(output)
    if frozen is not None:
        plan.refuse_other_job(frozen, job, output)
    found = look(config.images, config.format, config.endpoint_url)
    if frozen is not None:
        plan.refuse_changed_input(frozen, found, output)
        return frozen
    cut = Cut(
        chunk_size=config.shard_size,
        limit=None,
        image_column=None,
        endpoint_url=config.endpoint_url,
    )
    return plan.freeze(output, plan.make(found, job, cut, output))


def _packed(
    config: PackConfig, planned: Plan, work: list[Work], output: Store
) -> Iterable[pa.Table]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    source = Source(
        store=open_store(planned.folder, config.endpoint_url),
        lists=output,
        endpoint_url=config.endpoint_url,
        image_column=None,
    )
    packed = ray.data.read_datasource(
        Chunks(work, source), override_num_blocks=len(work), num_cpus=READ_CPUS
    ).map_batches(
        partial(pack_chunk, output=output),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=PACK_CPUS,
    )
    batches: Iterable[pa.Table] = packed.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    return batches


def pack_chunk(block: pa.Table, output: Store) -> pa.Table:
    """Write a sealed chunk of images as one shard; return a block of one row of `encode.RECEIPT`."""
    started = time.perf_counter()
    sealed = unseal(block)
    rows = [_row(image) for image in sealed.table.to_pylist()]
    table = pa.Table.from_pylist(rows, schema=TRAINING)
    counts = write.put_chunk(output, sealed.chunk_id, table, {}, SHARDS_FOLDER)
    receipt = {
        "chunk_id": sealed.chunk_id,
        "rows": counts.images,
        "images": counts.images,
        "detections": counts.detections,
        "errors": list(counts.errors.items()),
        "seconds": [*sealed.seconds.items(), ("write", time.perf_counter() - started)],
    }
    return pa.Table.from_pylist([receipt], schema=RECEIPT)


def _row(image: Mapping[str, Any]) -> dict[str, Any]:
    names = {name: image[name] for name in ("image_id", "shard", "key")}
    error, height, width = image["error"], None, None
    if error is None:
        try:
            height, width = probe(image["data"])
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
