"""What `predict --plan-only` says beside the plan: what is left to do, how long it takes, what it costs."""

import json
from collections.abc import Collection
from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc

from jobs import chunks, logs, pipeline, sizing
from jobs.actor import Model, Pool
from jobs.console import facts
from jobs.plan import Plan
from jobs.sizing import Estimate, Work
from jobs.storage import open_uri


def work_of(planned: Plan, done: Collection[str], model: Model, pool: Pool) -> Work:
    """Return what is left of a plan, for its whole pool.

    Args:
        planned: The plan.
        done: Ids of the chunks that are finished.
        model: What runs.
        pool: How the actors are laid out.
    """
    is_done = pc.is_in(planned.chunks["chunk_id"], pa.array(done, pa.string()))
    left = planned.chunks.filter(pc.invert(is_done))
    return Work(
        images=pc.sum(left["num_images"], min_count=0).as_py(),
        input_bytes=pc.sum(left["num_bytes"], min_count=0).as_py(),
        # An actor without a chunk would not be started.
        actors=min(pool.max_actors, max(1, left.num_rows)),
        gpus_per_actor=pool.gpus_per_actor,
        store_limit_bytes=pipeline.store_bytes(chunks.from_table(left), model, pool),
    )


def show(found: Estimate, uri: str | None, endpoint_url: str | None) -> None:
    """Print an estimate, and write it as JSON where a URI is given."""
    facts("What it takes", sizing.in_rows(found))
    logs.event("estimate", "what it takes", estimate=asdict(found))
    if uri is not None:
        store, name = open_uri(uri, endpoint_url)
        store.put(name, json.dumps(asdict(found), indent=2).encode())
