"""How the workers of a training find one another: by the addresses that Ray knows their nodes by."""

import os
import socket
from dataclasses import dataclass

import psutil
import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from typing_extensions import override

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class NodeAddresses(TorchConfig):
    """torch's process group, with gloo on the network interface that has the node's address.

    Left alone, gloo listens where the host's name leads to: the loopback interface on a Debian that has
    `127.0.1.1` for it, or where no name service knows the host, and no worker of another node gets there. NCCL
    leaves the loopback out by itself.
    """

    @property
    @override
    def backend_cls(self) -> type[_TorchBackend]:
        """Return what Ray Train starts in the workers."""
        return _Backend


class _Backend(_TorchBackend):
    @override
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Name gloo this node's interface, unless the environment says which."""
    found = interface(ray.util.get_node_ip_address())
    if found is not None:
        os.environ.setdefault(GLOO_INTERFACE, found)


def interface(address: str) -> str | None:
    """Return the name of this machine's interface that has an IP address, or None."""
    families = (socket.AF_INET, socket.AF_INET6)
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family in families and one.address == address for one in addresses):
            return name
    return None
