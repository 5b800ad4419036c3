"""`segjobs predict --input URI --output URI --model BUNDLE`: image shards to one table of masks.

Input: WebDataset tars, Parquet shards, loose images or a manifest. Output: `predictions/*.parquet`,
one row for every image, whatever its fate; `_plan.json`, `_manifest.json`, and `_SUCCESS` when all
of it is there. Throughput on named hardware stands in the README.
"""

import platform
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any, cast

import ray

from jobs import (
    calibrate,
    logs,
    pipeline,
    plan,
    precedent,
    predict_view,
    preview,
    retries,
    sizing,
    stages,
    tally,
    tasks,
    traffic,
    write,
)
from jobs.actor import Model, Pool
from jobs.cluster import connect
from jobs.config import ConfigError, PredictConfig
from jobs.console import ImageProgress, console
from jobs.detect import look
from jobs.encode import Receipt
from jobs.job import described
from jobs.layout import lay_out, places
from jobs.meter import Meter
from jobs.metrics import Metrics
from jobs.plan import Plan
from jobs.read import Source
from jobs.sizing import Rates
from jobs.source import Work
from jobs.stall import StallWarning
from jobs.storage import lies_within, open_store
from jobs.store import Store
from jobs.weights import load_bundle
from jobs.write import Counts
from segmodel.bundle import Bundle
from segmodel.settings import InferencePrecision, resolved


def run(config: PredictConfig) -> int:
    """Plan or go on, predict what is left, finish; return the exit code."""
    retries.forget()
    traffic.forget()
    output = open_store(config.output, config.endpoint_url)
    _refuse_nested(config)
    bundle = load_bundle(config.model, config.endpoint_url)
    pool = lay_out(config, may_grow=(may_grow := connect(config.address)))
    job = described(config, bundle, _precision(config, bundle, pool, plan.load(output)))
    if config.plan_only:
        _preview(config, job, output, bundle, pool, may_grow=may_grow)
        return 0
    planned = _planned(config, job, output, output)
    done = plan.finished_chunks(output).keys()
    work = _left(config, planned, output, done)
    if not work and output.info(write.SUCCESS) is not None:
        counts = write.final_counts(output)
        console.print(f"{config.output} is finished: nothing to do.")
        predict_view.show_summary(counts, output, {})
        return _exit_code(config, counts)
    predict_view.show_plan(planned, pool, len(work), "Plan" if not done else "Plan, going on")
    output.delete(write.SUCCESS)
    try:
        counts = _work_off(config, planned, work, output, bundle, pool)
    except KeyboardInterrupt:
        rows = planned.chunks.select(["chunk_id", "num_images"]).to_pylist()
        now_done = plan.finished_chunks(output).keys()
        images = sum(row["num_images"] for row in rows if row["chunk_id"] in now_done)
        raise KeyboardInterrupt(f"{images} of {planned.num_images} images are done") from None
    return _exit_code(config, counts)


def _work_off(
    config: PredictConfig,
    planned: Plan,
    work: Sequence[Work],
    output: Store,
    bundle: Bundle,
    pool: Pool,
) -> Counts:
    """Run the pipeline over what is left, check that nothing is missing, and write the marks."""
    run_id, started = uuid.uuid4().hex, time.time()
    receipts: dict[str, Counts] = {}
    seconds: Counter[str] = Counter()
    watch = stages.Stages(partial(places, pool), skipped=pipeline.CHUNKS_IN_ACTOR * pool.max_actors)
    images = 0
    todo = sum(len(w.positions) if w.positions else w.chunk.num_images for w in work)
    wanted = {
        "GPU" if pool.gpus_per_actor else "CPU": pool.gpus_per_actor or pipeline.CPU_ACTOR_CPUS
    }
    with (
        ImageProgress(planned.num_images, planned.num_images - todo) as progress,
        StallWarning(config.stall_warning, lambda: todo - images, wanted) as stalled,
        Meter(Metrics(output.uri), planned.num_images, todo) as meter,
    ):
        logs.bind(run_id=run_id, output=output.uri)
        meter.introduce(run_id, bundle.digest)
        if work:
            for receipt in pipeline.run(
                work,
                _source(config, planned, output),
                output,
                _model(config, planned.job, bundle, output),
                pool,
                {"model_digest": bundle.digest, "run_id": run_id},
            ):
                receipts[receipt.chunk_id] = receipt.counts
                seconds.update(receipt.seconds)
                watch.add(receipt.seconds)
                retries.add(receipt.retries)
                traffic.add(receipt.traffic)
                meter.add(receipt)
                _log(receipt)
                images += receipt.rows
                progress.advance(receipt.rows)
                stalled.progress()
    done = plan.finished_chunks(output).keys()
    sizes = plan.sizes(planned)
    _refuse_others(output, done - sizes.keys())
    counted = {**tally.read_counts(output, done - receipts.keys()), **receipts}
    # What is not there any more does not count, whatever its receipt said.
    counts = write.finish(output, sizes, {name: counted[name] for name in sizes if name in done})
    took, busy = time.time() - started, watch.busy()
    facts_of_run = {
        "run_id": run_id,
        "images": images,
        "seconds": round(took, 2),
        "images_per_second": round(images / took, 3),
        "stage_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "busy": {name: round(share, 3) for name, share in busy.shares.items()},
        "busy_with_start": busy.with_start,
        # Of all processes, planning included where this run planned.
        "retries": dict(retries.so_far()),
        "bytes": dict(traffic.so_far()),
    }
    write.put_marks(output, _manifest(config, planned, counts, pool, bundle, facts_of_run))
    predict_view.show_summary(counts, output, facts_of_run, busy)
    return counts


def _log(receipt: Receipt) -> None:
    logs.event(
        "chunk",
        f"chunk {receipt.chunk_id} is written",
        chunk_id=receipt.chunk_id,
        images=receipt.rows,
        instances=receipt.counts.detections,
        errors=dict(receipt.counts.errors),
        seconds={name: round(value, 3) for name, value in receipt.seconds.items()},
        retries=dict(receipt.retries),
        bytes=dict(receipt.traffic),
    )


def _precision(
    config: PredictConfig, bundle: Bundle, pool: Pool, frozen: Plan | None
) -> InferencePrecision:
    if config.precision == "auto" and frozen is not None:
        # What it was at first: a job that goes on elsewhere keeps to it.
        return cast("InferencePrecision", frozen.job["precision"])
    device_type = "cuda" if pool.gpus_per_actor else "cpu"
    precision = resolved(config.precision, device_type, bundle.settings.arch)
    if precision == "fp32" and config.compile:
        raise ConfigError(
            "--compile: fp32 is torchvision's to the bit, and what is compiled rounds otherwise: "
            "say --precision bf16, fp16 or fp32-fast with it"
        )
    return precision


def _preview(
    config: PredictConfig,
    job: Mapping[str, Any],
    output: Store,
    bundle: Bundle,
    pool: Pool,
    *,
    may_grow: bool,
) -> None:
    """Show the plan and what it takes; nothing is written to the output."""
    with TemporaryDirectory() as folder:
        # The readers of loose images look into lists that lie beside a plan.
        lists = open_store(folder) if config.calibrate else None
        planned = _planned(config, job, output, lists)
        frozen = plan.load(output) is not None
        if config.calibrate and planned.format == "manifest" and may_grow and not frozen:
            raise ConfigError(
                "--calibrate cannot run images of a manifest on a cluster: give --images-per-second, or calibrate "
                "on a folder of them"
            )
        done = plan.finished_chunks(output).keys() if frozen else ()
        model = _model(config, planned.job, bundle, output)
        predict_view.show_plan(planned, pool, planned.chunks.num_rows, "Plan (nothing was written)")
        rates = None
        if config.images_per_second is not None:
            given = f"{config.images_per_second:g} images/s of one actor, as given"
            rates = Rates(images_per_second=config.images_per_second, source=given)
        elif config.like is not None:
            rates = precedent.rates(open_store(config.like, config.endpoint_url), job, pool)
        elif config.calibrate is not None:
            source = _source(config, planned, output if frozen or lists is None else lists)
            rates = calibrate.rates(planned, config.calibrate, source, model, pool)
    found = sizing.estimate(
        preview.work_of(planned, done, model, pool), rates, config.price_per_gpu_hour
    )
    preview.show(found, config.estimate_output, config.endpoint_url)


def _planned(
    config: PredictConfig, job: Mapping[str, Any], output: Store, beside: Store | None
) -> Plan:
    """Return the plan that lies beside the output, or make one, and freeze it unless it is for show.

    Args:
        config: Of the verb.
        job: What results depend on.
        output: Of the job.
        beside: Where the lists go that a plan has; nowhere where None.
    """
    frozen = plan.load(output)
    if frozen is not None:
        plan.refuse_other_job(frozen, job, output)
        if config.frozen_plan or config.retry_errors:
            # A retry is there for what was mended since: each read still sees whether it may be used.
            return frozen
    found = look(config.input, config.format, config.endpoint_url, tasks.aside)
    if frozen is not None:
        plan.refuse_changed_input(frozen, found, output)
        return frozen
    others = plan.finished_chunks(output).keys()
    if plan.load(output) is None:
        # Else another driver was faster, and they are its.
        _refuse_others(output, others)
    console.print(f"Input {config.input} is read as {found.format}: {found.why}.")
    cut = plan.Cut(
        chunk_size=config.chunk_size,
        limit=config.limit,
        image_column=config.image_column,
        endpoint_url=config.endpoint_url,
    )
    made = plan.make(found, job, cut, beside)
    return made if config.plan_only else plan.freeze(output, made)


def _refuse_others(output: Store, others: Set[str]) -> None:
    """Refuse an output with objects of another job, which would stand in this one's table.

    Raises:
        ConfigError: There are some.
    """
    if others:
        raise ConfigError(
            f"{output.url('predictions')} holds {len(others)} objects that are not of this job's plan, such as "
            f"{min(others)}.parquet: take them away, or give another --output"
        )


def _left(config: PredictConfig, planned: Plan, output: Store, done: Set[str]) -> list[Work]:
    """Return the chunks without an object, and with `--retry-errors` the rows in error of the others."""
    work = [Work(chunk=chunk) for chunk in plan.left(planned, done)]
    if config.retry_errors:
        counted = tally.read_counts(output, done)
        failed = write.failed_positions(output, [name for name in done if counted[name].failed])
        work += [
            Work(chunk=chunk, positions=failed[chunk.chunk_id])
            for chunk in plan.left(planned, plan.sizes(planned).keys() - failed.keys())
        ]
    return work


def _source(config: PredictConfig, planned: Plan, output: Store) -> Source:
    return Source(
        store=open_store(planned.folder, config.endpoint_url),
        lists=output,
        endpoint_url=config.endpoint_url,
        image_column=config.image_column,
    )


def _model(config: PredictConfig, job: Mapping[str, Any], bundle: Bundle, output: Store) -> Model:
    return Model(
        bundle=ray.put(bundle),
        categories=bundle.by_label(),
        precision=job["precision"],
        decode=config.decode,
        compiled=config.compile,
        score_threshold=job["score_threshold"],
        max_detections=job["max_detections"],
        masks=config.tasks == "masks",
        max_pixels=config.max_pixels,
        output=output.uri,
    )


def _refuse_nested(config: PredictConfig) -> None:
    """Refuse an output within the input: its objects would be taken for new input.

    Raises:
        ConfigError: It is.
    """
    if lies_within(config.output, config.input, config.endpoint_url):
        raise ConfigError(f"--output {config.output} lies within --input: choose a place outside")


def _manifest(
    config: PredictConfig,
    planned: Plan,
    counts: Counts,
    pool: Pool,
    bundle: Bundle,
    of_run: Mapping[str, Any],
) -> dict[str, Any]:
    packages = ("segjobs", "ray", "torch", "torchvision", "pyarrow", "pycocotools")
    return {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan_id": planned.plan_id,
        "counts": asdict(counts),
        # All that the model knows: a table need not have any of them.
        "categories": [{"id": one.id, "name": one.name} for one in bundle.categories],
        "chunks": planned.chunks.num_rows,
        "job": dict(planned.job),
        "format": planned.format,
        "notes": list(planned.notes),
        "config": asdict(config),
        "pool": asdict(pool),
        "run": dict(of_run),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }


def _exit_code(config: PredictConfig, counts: Counts) -> int:
    return 3 if config.fail_on_error and counts.failed else 0
