"""The Ray that a verb runs on: one that is there, or a local one of its own."""

import logging
import os

import ray
import ray.data


def connect(address: str | None) -> None:
    """Use the Ray at `address`, at `RAY_ADDRESS`, or that this process uses already, or start a local one."""
    if ray.is_initialized():
        return
    # Every actor warms up on its own and says so; what matters is in the tables and the progress bar.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def resources() -> tuple[float, float]:
    """Return the cluster's CPUs and GPUs, as they are now."""
    total = ray.cluster_resources()
    return total.get("CPU", 0.0), total.get("GPU", 0.0)
