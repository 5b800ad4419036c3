"""Machines of a network: namespaces with an address each, and a cable between them."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil
import pytest

# For documentation (RFC 5737), so they are nobody's; and seen within the namespaces alone.
ADDRESSES = ("192.0.2.1", "192.0.2.2")


class Machine:
    """A namespace with processes, and a folder for their files."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = f"segjobs-{os.getpid()}-{name}", address
        # Sockets are below this, and their paths may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="node", dir="/tmp"))

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Start a process on it; `log` gets what it says."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdout=file,
                stderr=file,
                env={**os.environ, **environment},
            )

    def processes(self) -> list[psutil.Process]:
        """Return what runs on it."""
        found = []
        for pid in _ip("netns", "pids", self.name).split():
            if psutil.pid_exists(int(pid)):
                found.append(psutil.Process(int(pid)))
        return found

    def lose(self) -> None:
        """Pull the cable, so that nobody is told, and end all that runs on it."""
        _ip("-n", self.name, "link", "set", "cable", "down")
        self.end()

    def end(self) -> None:
        """End all that runs on it."""
        while found := self.processes():
            for process in found:
                if process.status() != psutil.STATUS_ZOMBIE:
                    os.kill(process.pid, signal.SIGKILL)
            psutil.wait_procs(found, timeout=5)


class Network:
    """Two machines; leaving the context ends all that was started on them."""

    def __init__(self) -> None:
        self.machines = [
            Machine(name, address) for name, address in zip("ab", ADDRESSES, strict=True)
        ]

    def __enter__(self) -> Self:
        """Make them, or skip the test and say why this machine does not let us."""
        one, other = (machine.name for machine in self.machines)
        if shutil.which("ip") is None:
            pytest.skip("no network of its own: `ip` is not installed (Debian package iproute2)")
        try:
            for machine in self.machines:
                _ip("netns", "add", machine.name)
            _ip(*f"link add cable netns {one} type veth peer name cable netns {other}".split())
            for machine in self.machines:
                _ip("-n", machine.name, "link", "set", "lo", "up")
                _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "cable")
                _ip("-n", machine.name, "link", "set", "cable", "up")
                # Ray asks which of its addresses leads to the world.
                _ip("-n", machine.name, "route", "add", "default", "dev", "cable")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        there = _ip("netns", "list")
        for machine in self.machines:
            if machine.name in there:
                machine.end()
                _ip("netns", "delete", machine.name)
            shutil.rmtree(machine.folder, ignore_errors=True)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return done.stdout
