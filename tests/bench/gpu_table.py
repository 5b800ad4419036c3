"""A line of the accelerator's benchmark: rows of `results.csv`, and of one table to read."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.bench_job import row

HEADER = ("network", "of", "way", "images/s", "spread", "/ plain", "busy", "MiB")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What was measured of one way.

    Attributes:
        network: Architecture and size.
        of: Photos or training.
        way: What did it.
        hardware: The accelerator, or that these are toy sizes on a CPU.
        rates: Images/s, each turn.
        against: Images/s of the plain way; None for itself.
        busy: Share of time in which the accelerator works, where that can be known.
        peak_mib: Of the accelerator's memory, at its peak.
        note: What else is to be known.
    """

    network: str
    of: str
    way: str
    hardware: str
    rates: Sequence[float]
    against: float | None
    busy: float | None
    peak_mib: float | None
    note: str

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> str:
        return f"{min(self.rates):.4g} to {max(self.rates):.4g}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows for `results.csv`."""
        case = f"{self.network}, {self.of}, {self.hardware}"
        note = f"median of {len(self.rates)} turns, {self.spread}; {self.note}"
        yield row(case, self.way, self.rate, "images/s", note)
        if self.against is not None:
            ratio = self.rate / self.against
            yield row(case, f"{self.way}, against torchvision", ratio, "ratio", self.note)
        if self.busy is not None:
            yield row(case, f"{self.way}, accelerator busy", self.busy, "share", "nvidia-smi")
        if self.peak_mib is not None:
            yield row(case, f"{self.way}, peak memory", self.peak_mib, "MiB", "of the accelerator")

    def cells(self) -> tuple[str, ...]:
        """Return what stands under `HEADER`."""
        return (
            self.network,
            self.of,
            self.way,
            f"{self.rate:.4g}",
            self.spread,
            "-" if self.against is None else f"{self.rate / self.against:.2f}",
            "-" if self.busy is None else f"{100 * self.busy:.0f} %",
            "-" if self.peak_mib is None else f"{self.peak_mib:.0f}",
        )


def table(lines: Sequence[Line]) -> str:
    """Return all lines under one another, in columns."""
    cells = [HEADER, *(line.cells() for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = 3
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < texts else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
