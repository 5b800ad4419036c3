"""The Ray that a verb runs on: one that is there, or a local one of its own."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray
import ray.data
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from segmodel.allocator import ONE_ARENA

# Ray stops idle processes beyond the number of CPUs after a second. Tasks that reserve a part of a CPU
# have more, and one that is started again imports torch for seconds: of a training on two CPUs,
# that took half of the time. And a task that takes too much memory it would start again for ever.
LOCAL = {
    # One of its own: without a word Ray would join what `ray start` left on this machine.
    "address": "local",
    "include_dashboard": False,
    "_system_config": {"idle_worker_killing_time_threshold_ms": 600_000, "task_oom_retries": 3},
}

# How long to wait when Ray has ended a process because its node ran out of memory: others may have used it.
MEMORY_WAITS_S = (1.0, 4.0, 16.0, 64.0)


class ClusterError(RuntimeError):
    """Ray could not do what was asked; the message says why, and what to do."""


def connect(address: str | None) -> bool:
    """Use the Ray at `address`, at `RAY_ADDRESS` or of this process, or start a local one.

    Returns:
        Whether it may grow: a cluster that was named may have an autoscaler, a local Ray has none.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        quieten()
        settings = {"address": address} if address else LOCAL
        if not address:
            for name, value in ONE_ARENA.items():
                os.environ.setdefault(name, value)
        ray.init(**settings, log_to_driver=False, logging_level=logging.ERROR)
    return bool(address)


def quieten() -> None:
    """Keep what Ray prints from a user's eyes; its log files have it all.

    What goes wrong in a task is raised, and how far the job is our own tables say. Ray Data would
    print each error twice more, and Ray's core an alarm about every pool of actors.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what a task raised about a user's input or store as itself, without Ray's frames around it.

    Raises:
        ClusterError: A process, a node or Ray's own storage failed.
    """
    try:
        yield
    except (RayActorError, OutOfDiskError) as error:
        raise ClusterError(f"{reason(error)}. Run the same command again to go on") from error
    except RayTaskError as error:
        cause: BaseException | None = error.cause
        while cause is not None:
            if isinstance(cause, RayTaskError):
                # An actor passed on what one of its tasks raised.
                cause = cause.cause
                continue
            if isinstance(cause, ValueError | OSError):
                raise cause from None
            cause = cause.__cause__
        raise
    except RayError as error:
        raise ClusterError(
            f"a task of the job failed: {reason(error)}. Run the same command again to go on"
        ) from error


def lacked_memory(error: RayError) -> bool:
    """Say whether Ray ended a process because its node ran out of memory."""
    return isinstance(error, OutOfMemoryError) or "running low on memory" in str(error)


def lost_node(error: RayError) -> bool:
    """Say whether Ray lost the node that a process or an object was on."""
    return isinstance(error, NodeDiedError | ObjectLostError) or "node has died" in str(error)


def reason(error: RayError) -> str:
    """Say in a few words what Ray lost."""
    words = str(error)
    if isinstance(error, OutOfDiskError):
        return "the disk of a node is full where Ray puts what does not fit its memory: free some"
    if lacked_memory(error):
        return "Ray ended the process, since its node ran out of memory"
    if lost_node(error):
        return "its node was lost"
    if "creation task" in words:
        return "an actor could not be started: " + words.strip().rpartition("\n")[2]
    return "the process died"


def log_folder() -> str:
    """Return where Ray keeps the log files of this session, on each node."""
    return f"{ray._private.worker.global_worker.node.get_session_dir_path()}/logs"


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a node has."""

    cpus: float
    gpus: float


def nodes() -> dict[str, Node]:
    """Return the nodes that are there now, by id."""
    return {
        one["NodeID"]: Node(
            cpus=one["Resources"].get("CPU", 0.0), gpus=one["Resources"].get("GPU", 0.0)
        )
        for one in ray.nodes()
        if one["Alive"]
    }


def own_node() -> Node:
    """Return the node that this process is on."""
    return nodes()[ray.get_runtime_context().get_node_id()]


def resources() -> tuple[float, float]:
    """Return the cluster's CPUs and GPUs, as they are now."""
    total = ray.cluster_resources()
    return total.get("CPU", 0.0), total.get("GPU", 0.0)
