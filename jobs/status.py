"""`segjobs status OUTPUT`: how far a job is, while it runs, after a crash, or when it is done.

Reads the plan, one listing of the output, and a few hundred footers of what is there; asks no
cluster. How many images failed stands in each chunk's footer alone: while a job of more chunks runs,
that line is an estimate and says so, and of a finished job it is the manifest's number.
"""

import time
from collections.abc import Mapping

from jobs import plan, write
from jobs.config import StatusConfig
from jobs.console import duration, facts
from jobs.plan import PlanError
from jobs.storage import open_store
from jobs.store import Store

# The rate is that of the chunks of the last minutes, so that a crash in between does not count as
# work.
RATE_WINDOW_S = 600
# No chunk for so long, and a running job is at least worth a look.
QUIET_S = 300
# Footers that are read, one or two requests each. All of 40,000 would take about 150 s of CPU on S3, by what 4,000 took.
MOST_FOOTERS = 512


def run(config: StatusConfig) -> int:
    """Print planned, done, failed, left, rate and time left; return 0."""
    output = open_store(config.output, config.endpoint_url)
    planned = plan.load(output)
    if planned is None:
        raise PlanError(
            f"there is no plan at {config.output}: check the path; was a job ever started?"
        )
    sizes = plan.sizes(planned)
    # Asked first: a job that is going on again takes the mark away before it writes anything.
    finished = output.info(write.SUCCESS) is not None
    done = {name: when for name, when in plan.finished_chunks(output).items() if name in sizes}
    images = sum(sizes[name] for name in done)
    left = planned.num_images - images
    times = sorted((when, sizes[name]) for name, when in done.items())
    facts(
        f"Status of {output.uri}",
        [
            ("planned", f"{planned.num_images} images in {len(sizes)} chunks"),
            ("done", f"{images} images in {len(done)} chunks"),
            ("failed", _failed(output, {name: sizes[name] for name in done}, finished=finished)),
            ("left", f"{left} images in {len(sizes) - len(done)} chunks"),
            *_pace(times, left),
            ("state", _state(times, finished=finished, left=left)),
        ],
    )
    return 0


def _failed(output: Store, done: Mapping[str, int], *, finished: bool) -> str:
    """Say how many rows are in error, of finished chunks and their images."""
    if finished:
        looked_at, counts = sorted(done), write.final_counts(output)
    else:
        looked_at = _spread(sorted(done))
        counts = write.total(write.read_counts(output, looked_at).values())
    if len(looked_at) == len(done):
        return f"{counts.failed} images (done, with an error in their row)"
    about = round(counts.failed / counts.images * sum(done.values()))
    return f"about {about} images, from {len(looked_at)} of the chunks (exact when all is done)"


def _spread(names: list[str]) -> list[str]:
    """Return names, or so many of them as may be looked at, evenly spread."""
    number = min(len(names), MOST_FOOTERS)
    return [names[n * len(names) // number] for n in range(number)]


def _pace(times: list[tuple[float, int]], left: int) -> list[tuple[str, str]]:
    """Return rate and time left, from when the last chunks were written."""
    recent = [(when, images) for when, images in times if when > times[-1][0] - RATE_WINDOW_S]
    if len(recent) < 2 or recent[-1][0] == recent[0][0]:
        return []
    # The first chunk marks the start: its own images were done before.
    rate = sum(images for _, images in recent[1:]) / (recent[-1][0] - recent[0][0])
    rows = [("rate", f"{rate:.2f} images/s over the last {duration(recent[-1][0] - recent[0][0])}")]
    return [*rows, ("time left", f"about {duration(left / rate)} at that rate")] if left else rows


def _state(times: list[tuple[float, int]], *, finished: bool, left: int) -> str:
    if finished:
        return "finished: _SUCCESS is there"
    if not left:
        return "all images are done; run the same command again to write _SUCCESS"
    if not times:
        return "planned; no chunk is finished yet"
    quiet = time.time() - times[-1][0]
    if quiet > QUIET_S:
        return f"no chunk for {duration(quiet)}: if no driver runs, run the same command again to go on"
    return f"under way, the last chunk {duration(quiet)} ago"
