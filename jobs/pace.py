"""How fast Ray Data's scheduler runs round its loop."""

import time
from typing import Any

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from typing_extensions import override

# Chunks and micro-batches take from a tenth of a second up, so fifty looks a second are enough.
STEP_S = 0.02


class Unhurried(ExecutionCallback):
    """Pauses in each round of the loop.

    While a task has output that may not be taken yet, since what comes behind it is full, Ray's loop
    waits for nothing and goes round as fast as it can: a full core, seen on two CPUs.
    """

    @override
    def on_execution_step(self, executor: Any) -> None:
        """Sleep; other threads of the process run on."""
        time.sleep(STEP_S)


def slow_down(context: DataContext) -> None:
    """Let the data sets of a context be scheduled without haste."""
    if Unhurried not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Unhurried)
