"""How many actors a job has, what each gets, and how much the stages can have in work on the nodes that are there."""

from jobs.actor import Pool
from jobs.cluster import nodes, resources
from jobs.config import ConfigError, PredictConfig
from jobs.pipeline import CPU_ACTOR_CPUS


def lay_out(config: PredictConfig, *, may_grow: bool) -> Pool:
    """Decide how many actors there are and what each gets.

    Raises:
        ConfigError: The cluster cannot hold the actors that were asked for.
    """
    cpus, gpus = resources()
    share = config.gpus_per_actor
    if share is None:
        share = 1.0 if gpus else 0.0
    # On CPUs one thread for each actor: two one-thread processes beat one two-thread process. The
    # most that can be reserved leaves room for readers and writers, without which the job would
    # hang.
    fit = int(gpus / share + 1e-9) if share else max(1, int(cpus))
    most = fit if share else max(1, int(cpus / CPU_ACTOR_CPUS) - 1)
    max_actors = config.max_actors or max(fit, config.min_actors or 1)
    # A cluster that may grow starts with what there is, and gets more as its nodes come.
    min_actors = config.min_actors or max(1, min(max_actors, fit))
    if not may_grow and min_actors > most:
        what = f"{share:g} GPUs" if share else "CPUs"
        raise ConfigError(
            f"{min_actors} actors on {what} each do not fit: this Ray has {cpus:g} CPUs and {gpus:g} "
            f"GPUs, room for {most}. Lower --min-actors or --gpus-per-actor (0 uses CPUs), or name a "
            "larger cluster by --address"
        )
    if not may_grow:
        max_actors = max(min_actors, min(max_actors, most))
    initial_actors = config.initial_actors or min_actors
    if not min_actors <= initial_actors <= max_actors:
        raise ConfigError(
            f"--initial-actors {initial_actors} must lie between --min-actors ({min_actors}) and "
            f"--max-actors ({max_actors})"
        )
    return Pool(
        min_actors=min_actors,
        max_actors=max_actors,
        initial_actors=initial_actors,
        gpus_per_actor=share,
        # Those beside GPUs, and on CPUs that are still to come, see when they start.
        threads=None if share or not cpus else max(1, int(cpus / max_actors)),
        batch_size=config.batch_size,
        image_timeout_s=config.image_timeout,
    )


def places(pool: Pool) -> dict[str, float]:
    """Return how many chunks, or images, each stage can have in work at once, on the nodes that are there."""
    there = nodes().values()
    cpus = sum(node.cpus for node in there)
    fit = [pool.threads_on(node) for node in there if node.gpus >= pool.gpus_per_actor]
    return {
        "read": cpus,
        "decode": pool.max_actors * max(fit, default=0),
        "network": pool.max_actors,
        "encode": cpus,
        "write": cpus,
    }
