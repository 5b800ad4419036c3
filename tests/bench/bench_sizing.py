"""The table of sizes in the README: the arithmetic of `predict --plan-only`, from rates that are stated here."""

from collections.abc import Iterator

from jobs.console import duration, size
from jobs.sizing import Rates, Work, estimate

# Assumed: no GPU was at hand. The first is what is aimed at for R50-FPN at 800 x 1333 on one H200, the second what a
# smaller card, larger photos or too few CPUs beside it may leave of that.
IMAGES_PER_SECOND = (450.0, 100.0)
PRICE_PER_GPU_HOUR = 2.50
DETECTIONS = 30
# Measured on the 100 labelled photos of COCO: their mean size, and a mask with its columns in a Parquet object.
PHOTO_BYTES, ROW_BYTES = 174_582, 221
# A detection on its way from the network: 28 x 28 probabilities, box, score and label.
RAW_BYTES = 28 * 28 * 4 + 16 + 4 + 8
STORE_LIMIT_BYTES = 256 * (PHOTO_BYTES + 100 * 28 * 28 * 4) * 6

IMAGES, GPUS = (10**6, 10**8), (1, 8, 64)


def rows() -> Iterator[str]:
    """Yield the table's lines as Markdown."""
    rates = " | ".join(
        f"{rate:g} images/s each: time, GPU hours, cost" for rate in IMAGES_PER_SECOND
    )
    yield f"| images | GPUs | {rates} | to read | table | through the object store |"
    yield f"| ---: | ---: | {'---: | ' * len(IMAGES_PER_SECOND)}---: | ---: | ---: |"
    for images in IMAGES:
        for gpus in GPUS:
            yield _row(images, gpus)


def _row(images: int, gpus: int) -> str:
    work = Work(
        images=images,
        input_bytes=images * PHOTO_BYTES,
        actors=gpus,
        gpus_per_actor=1,
        store_limit_bytes=STORE_LIMIT_BYTES * gpus,
    )
    cells = []
    for rate in IMAGES_PER_SECOND:
        rates = Rates(
            images_per_second=rate,
            output_bytes=DETECTIONS * ROW_BYTES,
            store_bytes=PHOTO_BYTES + DETECTIONS * RAW_BYTES,
            source="assumed",
        )
        found = estimate(work, rates, PRICE_PER_GPU_HOUR)
        assert found.seconds is not None
        cells.append(f"{duration(found.seconds)}, {found.gpu_hours:,.1f}, {found.cost:,.0f}")
    sizes = (found.input_bytes, found.output_bytes or 0, found.store_bytes or 0)
    return (
        " | ".join(
            [f"| {images // 10**6} M", f"{gpus}", *cells, *(size(number) for number in sizes)]
        )
        + " |"
    )


def sizing() -> None:
    """Print the table."""
    print("\n".join(rows()))
