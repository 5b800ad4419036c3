"""The processes of the tests' own Ray, to be killed; those of other Rays on the machine are left alone."""

import psutil


def titled(title: str) -> list[psutil.Process]:
    """Return those that have it in the title that Ray gives them: what they are doing."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            # It ended while we looked.
            continue
    return found


def actors() -> list[psutil.Process]:
    """Return the actors of batch jobs that hold their model."""
    return [
        found
        for found in titled("MapWorker(MapBatches(Predict))")
        if "__init__" not in " ".join(found.cmdline())
    ]
