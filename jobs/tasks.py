"""Calls as Ray tasks: many under way at once, or one alone that may be the end of its process."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from jobs import retries
from jobs.cluster import (
    MEMORY_WAITS_S,
    lacked_memory,
    lost_node,
    plain_errors,
    reason,
)

# Tasks under way: enough to fill a cluster, few enough to stop early.
TASKS_UNDER_WAY = 256
# They wait for storage more than they compute.
TASK_CPUS = 0.25
# Processes that a call may end.
TRIES = 3

Result = TypeVar("Result")


class LostCallError(Exception):
    """A call ended each process that made it; the message says how."""


def in_order(
    function: Callable[..., list[Result]],
    calls: Iterator[tuple[Any, ...]],
    rescue: Callable[..., list[Result]] | None = None,
) -> Iterator[list[Result]]:
    """Run calls as Ray tasks, a bounded number at a time, and yield their results in order.

    Args:
        function: What is called.
        calls: With which arguments.
        rescue: Gives the result of a call that ended its process, from the same arguments. Where None, Ray
            tries again.

    Raises:
        ClusterError: A process died again and again.
        Exception: What a call raised.
    """
    # Ray's own tries have no end, on some clusters, where it is memory that lacks.
    again = {} if rescue is None else {"max_retries": 0}
    task = ray.remote(num_cpus=TASK_CPUS, **again)(_with_retries)
    under_way = deque((task.remote(function, *c), c) for c in islice(calls, TASKS_UNDER_WAY))
    while under_way:
        result, call = under_way.popleft()
        with plain_errors():
            try:
                done, asked_again = ray.get(result)
            except RayError as error:
                if rescue is None or isinstance(error, RayTaskError):
                    raise
                done, asked_again = rescue(*call), {}
        retries.add(asked_again)
        yield done
        under_way.extend((task.remote(function, *c), c) for c in islice(calls, 1))


def alone(function: Callable[..., Result], *call: Any) -> Result:
    """Make a call in a process of its own.

    Raises:
        LostCallError: It ended each of `TRIES` processes.
        ClusterError: Nodes were lost.
        Exception: What the call raised.
    """
    task = ray.remote(num_cpus=TASK_CPUS, max_retries=0)(_with_retries)
    why = ""
    for number in range(TRIES):
        with plain_errors():
            try:
                done, again = ray.get(task.remote(function, *call))
            except RayError as error:
                if isinstance(error, RayTaskError) or (lost_node(error) and number + 1 == TRIES):
                    raise
                why = reason(error)
                if lacked_memory(error):
                    time.sleep(MEMORY_WAITS_S[number])
            else:
                retries.add(again)
                found: Result = done
                return found
    raise LostCallError(f"{why}, {TRIES} times")


def aside(function: Callable[..., bool], *call: Any) -> bool:
    """Ask a question in a process of its own; the answer is no where that is its end."""
    try:
        return alone(function, *call)
    except LostCallError:
        return False


def _with_retries(function: Callable[..., Result], *call: Any) -> tuple[Result, Mapping[str, int]]:
    with retries.counted() as again:
        done = function(*call)
    return done, again
