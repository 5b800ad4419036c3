"""The rates of a job that is finished, for one that is to do the same with other images."""

from collections.abc import Mapping
from typing import Any

from jobs import documents
from jobs.actor import Pool
from jobs.chunks import PREDICTIONS_FOLDER
from jobs.config import ConfigError
from jobs.sizing import JOB_SHARE, Rates
from jobs.store import Store
from jobs.write import MANIFEST

# What an actor's rate depends on, besides the images.
SAME = (
    "model_digest",
    "score_threshold",
    "max_detections",
    "precision",
    "tasks",
    "decode",
    "compile",
)


def rates(table: Store, job: Mapping[str, Any], pool: Pool) -> Rates:
    """Return what one actor did in the last run of a finished job.

    Start-up is in it, and so is the time in which a pool had fewer actors than it might have: a job of many hours
    says more than a short one.

    Args:
        table: The job's output.
        job: What the results of the new job depend on (`job.described`).
        pool: How its actors are laid out.

    Raises:
        ConfigError: It is not finished, did nothing in its last run, or was another kind of job.
    """
    try:
        manifest = documents.read(table, MANIFEST)
    except FileNotFoundError:
        raise ConfigError(
            f"--like {table.uri}: no job is finished there, so there is no rate"
        ) from None
    run, then = manifest["run"], manifest["pool"]
    _refuse_other(table.uri, manifest, job, pool)
    if not run["images"] or not run["seconds"]:
        raise ConfigError(
            f"--like {table.uri}: its last run had nothing to do, so there is no rate"
        )
    # An actor without a chunk was not started.
    actors = min(then["max_actors"], manifest["chunks"])
    written = sum(one.size for one in table.list_objects(PREDICTIONS_FOLDER))
    encode = run["stage_seconds"].get("encode")
    return Rates(
        # What a job does is less than what its actors could do alone, which an estimate goes by.
        images_per_second=run["images"] / run["seconds"] / actors / JOB_SHARE,
        output_bytes=written / manifest["counts"]["images"],
        encode_seconds=None if encode is None else encode / run["images"],
        source=f"{table.uri}: {run['images']} images in {run['seconds']:.0f} s by {actors} actors",
    )


def _refuse_other(
    uri: str, manifest: Mapping[str, Any], job: Mapping[str, Any], pool: Pool
) -> None:
    for name in SAME:
        if manifest["job"].get(name) != job.get(name):
            raise ConfigError(
                f"--like {uri}: that job had {name} {manifest['job'].get(name)}, and this one has {job.get(name)}: its rate "
                "says nothing of this one"
            )
    if manifest["pool"]["gpus_per_actor"] != pool.gpus_per_actor:
        raise ConfigError(
            f"--like {uri}: its actors had {manifest['pool']['gpus_per_actor']:g} GPUs each, and this job's have "
            f"{pool.gpus_per_actor:g}: its rate says nothing of this one"
        )
