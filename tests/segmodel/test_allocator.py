"""Freed memory that is kept: seen in the page faults of processes of their own, glibc's allocator only."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping

import pytest

from segmodel.allocator import ONE_ARENA, keep_freed_memory

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)

# Above the 64 MiB that arenas of threads can hold in one piece.
PAGES = 100 * 2**20 // 4096
ROUNDS = 20
SCRIPT = f"""
import resource, sys, threading
from segmodel.allocator import keep_freed_memory

def work():
    b"1" * ({PAGES} * 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        b"1" * ({PAGES} * 4096)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "keep":
    print(keep_freed_memory())
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def run(keep: str, more: Mapping[str, str]) -> list[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC", "GLIBC"))
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, keep],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, **more},
    )
    return done.stdout.split()


def test_what_was_freed_is_used_again_in_threads_too() -> None:
    said, faults = run("keep", ONE_ARENA)
    assert said == "True"
    assert int(faults) < PAGES
    (mapped,) = run("as ever", ONE_ARENA)
    # Each page is cleared again.
    assert int(mapped) > ROUNDS * PAGES / 2


def test_what_the_environment_says_holds() -> None:
    said, faults = run("keep", {**ONE_ARENA, "MALLOC_MMAP_THRESHOLD_": "100000"})
    assert said == "False"
    assert int(faults) > PAGES


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segmodel.allocator.ctypes.CDLL", lambda _: object())
    assert not keep_freed_memory()
