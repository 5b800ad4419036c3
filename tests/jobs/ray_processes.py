"""The processes of the tests' own Ray, to be killed; those of other Rays on the machine are left alone."""

import os

import psutil


def titled(title: str) -> list[psutil.Process]:
    """Return those that have it in the title that Ray gives them: what they are doing."""
    # The title first: a task may be over before all of a machine's processes were asked for their parents.
    found = [
        p for p in psutil.process_iter(["cmdline"]) if title in " ".join(p.info["cmdline"] or [])
    ]
    return [process for process in found if _is_ours(process)]


def _is_ours(process: psutil.Process) -> bool:
    try:
        return os.getpid() in {parent.pid for parent in process.parents()}
    except psutil.Error:
        # It ended while we looked.
        return False


def actors() -> list[psutil.Process]:
    """Return the actors of batch jobs that hold their model."""
    return [
        found
        for found in titled("MapWorker(MapBatches(Predict))")
        if "__init__" not in " ".join(found.info["cmdline"])
    ]
