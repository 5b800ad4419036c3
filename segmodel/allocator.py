"""glibc's allocator, told to keep what is freed: the next image needs as much again."""

import ctypes
import os

# `mallopt`'s parameters, malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_TRIM_BYTES, _MMAP_BYTES = 2**31 - 1, 2**30
# By what a user tells it already.
_TOLD_BY = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
# For the environment of processes with several threads: only the first of an allocator's arenas can hold more than
# 64 MiB in one piece, and threads get others. Read when a process starts.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


def keep_freed_memory() -> bool:
    """Have this process keep blocks below 1 GiB that it frees, 2 GiB together, for those that it will want.

    By itself glibc maps each block above 32 MiB anew and gives it back when it is freed, and the kernel then clears
    every page of every feature map of every image. Numbers stay the same. The process holds what it held at its peak
    until it ends. It is for processes that work on images all their life, whose threads share `ONE_ARENA`.

    Returns:
        Whether it was done: not where the C library is another one, nor where the environment says how
        to allocate.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _TOLD_BY):
        return False
    told = [mallopt(_MMAP_THRESHOLD, _MMAP_BYTES), mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)]
    return all(told)
