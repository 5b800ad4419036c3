"""The memory that a call takes while it runs, in this process."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa


def peak_mib(call: Callable[[], object]) -> float:
    """Return by how much the process's resident memory grows at most, MiB.

    What freed memory the allocators hold back would be used again and not be seen, so they give it up first.
    """
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    # The peak begins anew: proc(5), /proc/pid/clear_refs.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    call()
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise AssertionError(name)
