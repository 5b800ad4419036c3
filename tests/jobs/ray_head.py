"""Heads of Ray with their dashboard, in processes of their own, as `ray start --head` makes them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil
import requests

from jobs import cluster

DEADLINE_S = 180
# As the runbook has it; tests add ports and folders of their own.
COMMAND = ["ray", "start", "--head", "--num-cpus", "2"]
STORE_BYTES = 100 * 2**20
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
)


class Head:
    """A head node of two CPUs; leaving the context ends all that it started."""

    def __init__(self, environment: Mapping[str, str], dashboard_port: int = 0) -> None:
        """Take ports and a folder; `dashboard_port` is that of a head that was lost."""
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        ports["dashboard-port"] = dashboard_port or ports["dashboard-port"]
        self.ports = ports
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        # Its sockets are below this, and their paths may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            # What `python` is on the nodes.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            # The dashboard is ten processes, each with its imports: on a busy machine a minute is not enough.
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(DEADLINE_S),
            "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": str(DEADLINE_S),
            **environment,
        }
        # Of this checkout no process of the cluster is to know but by what is uploaded.
        self._environment.pop("PYTHONPATH", None)

    def __enter__(self) -> Self:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", *COMMAND[1:], "--block"),
            *("--num-gpus", "0", "--object-store-memory", str(STORE_BYTES)),
            *("--system-config", json.dumps(cluster.LOCAL["_system_config"])),
            *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1"),
            *("--temp-dir", str(self.folder), "--min-worker-port", "0", "--max-worker-port", "0"),
            *(part for name, port in self.ports.items() for part in (f"--{name}", str(port))),
        ]
        log = self.folder / "start.log"
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, env=self._environment, stdout=file, stderr=file, cwd=self.folder
            )
        deadline = time.monotonic() + DEADLINE_S
        while not self._answers():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """End all processes at once, as a machine that goes does; drivers are among them."""
        try:
            ours = psutil.Process(self._process.pid)
            processes = [ours, *ours.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=10)
        self._process.wait()

    def logs(self) -> str:
        """Return all that was logged on this node, as one text."""
        files = [
            path for path in self.folder.rglob("*") if path.is_file() and "/logs/" in str(path)
        ]
        return "\n".join(path.read_text(errors="replace") for path in files)

    def _answers(self) -> bool:
        token = self._environment.get("RAY_AUTH_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        agent = f"http://127.0.0.1:{self.ports['dashboard-agent-listen-port']}/api/healthz"
        try:
            answers = [
                requests.get(url, headers=headers, timeout=5).status_code
                for url in (f"{self.address}/api/version", agent)
            ]
        except requests.RequestException:
            return False
        # The agent's own port is asked whether it listens; what it says does not matter.
        return answers[0] == 200


def free_ports(number: int) -> list[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
