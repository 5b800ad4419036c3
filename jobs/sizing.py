"""How long a job takes and what it costs, from the rate of one actor: arithmetic, and its table."""

from dataclasses import dataclass, replace

from jobs.console import duration, size

# Of what its actors could do alone, a whole job does so much: 0.82 was measured on two cores that driver, readers
# and writers share with the actors. Where they have cores of their own it should be nearer to 1; unmeasured.
JOB_SHARE = 0.8
# Ray, imports, the model: 45 s were measured on two cores. Nodes that have to be started come on top.
START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured or is assumed of one actor.

    Attributes:
        images_per_second: Of one actor that never waits.
        output_bytes: Of the table, for an image; None where it was not measured.
        store_bytes: That go through Ray's object store, for an image; None where not measured.
        encode_seconds: Of a CPU, to encode the masks of an image; None where not measured.
        source: Where the numbers come from, for people.
    """

    images_per_second: float
    output_bytes: float | None = None
    store_bytes: float | None = None
    encode_seconds: float | None = None
    source: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to do, with what.

    Attributes:
        images: To do.
        input_bytes: Of these images.
        actors: Copies of the model.
        gpus_per_actor: 0 on CPUs.
        store_limit_bytes: What the job may hold in Ray's object store at once.
    """

    images: int
    input_bytes: int
    actors: int
    gpus_per_actor: float
    store_limit_bytes: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job takes; `None` where nothing is known to tell it from.

    Attributes:
        images: To do.
        actors: Copies of the model.
        gpus: That they hold.
        images_per_second: Of the whole job.
        seconds: Start-up included.
        gpu_hours: 0 on CPUs.
        cost: In the price's currency.
        input_bytes: To read.
        output_bytes: Of the table.
        store_bytes: That go through Ray's object store, all in all.
        store_limit_bytes: That are in it at once, at most.
        encode_cpus: CPUs that encoding the masks keeps busy, besides the actors.
        source: Where the rates come from.
    """

    images: int
    actors: int
    gpus: float
    images_per_second: float | None = None
    seconds: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    input_bytes: int
    output_bytes: float | None = None
    store_bytes: float | None = None
    store_limit_bytes: int
    encode_cpus: float | None = None
    source: str


def estimate(work: Work, rates: Rates | None, price_per_gpu_hour: float | None) -> Estimate:
    """Estimate a job.

    Args:
        work: What there is to do.
        rates: Of one actor; where None, only sizes that need none are told.
        price_per_gpu_hour: In any currency.
    """
    gpus = work.actors * work.gpus_per_actor
    known = Estimate(
        images=work.images,
        actors=work.actors,
        gpus=gpus,
        input_bytes=work.input_bytes,
        store_limit_bytes=work.store_limit_bytes,
        source="no rate: give --calibrate N, --like OUTPUT or --images-per-second R",
    )
    if rates is None:
        return known
    rate = rates.images_per_second * work.actors * JOB_SHARE
    seconds = START_S + work.images / rate if work.images else 0.0
    gpu_hours = gpus * seconds / 3600
    return replace(
        known,
        images_per_second=rate,
        seconds=seconds,
        gpu_hours=gpu_hours,
        cost=None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour,
        output_bytes=_times(rates.output_bytes, work.images),
        store_bytes=_times(rates.store_bytes, work.images),
        encode_cpus=_times(rates.encode_seconds, rate),
        source=rates.source,
    )


def _times(each: float | None, number: float) -> float | None:
    return None if each is None else each * number


def in_rows(found: Estimate) -> list[tuple[str, str]]:
    """Return an estimate as names and values for a person."""
    rows = [("from", found.source)]
    if found.images_per_second is not None and found.seconds is not None:
        rows += [
            ("throughput", f"{found.images_per_second:.2f} images/s by {found.actors} actors"),
            ("time", f"about {duration(found.seconds)}"),
        ]
    if found.gpu_hours is not None and found.gpus:
        rows.append(("GPU hours", f"{found.gpu_hours:,.1f} of {found.gpus:g} GPUs"))
        if found.cost is not None:
            rows.append(("cost of GPUs", f"{found.cost:,.2f}"))
    rows.append(("to read", size(found.input_bytes)))
    if found.output_bytes is not None:
        rows.append(("table", size(found.output_bytes)))
    if found.store_bytes is not None:
        rows.append(("through Ray's object store", size(found.store_bytes)))
    rows.append(("in it at once", f"at most {size(found.store_limit_bytes)}"))
    if found.encode_cpus is not None:
        rows.append(("CPUs for masks", f"{found.encode_cpus:.2f}, besides those of the actors"))
    return rows
