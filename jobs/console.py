"""What a person sees: tables, progress, numbers with units."""

import math
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from jobs import logs


class Printer(Console):
    """A rich console; where logs are JSON, what is printed becomes the message of a line."""

    @override
    def print(self, *objects: Any, **options: Any) -> None:
        """Print, or log."""
        if not logs.as_json():
            super().print(*objects, **options)
            return
        if len(objects) == 1 and isinstance(objects[0], Table):
            title, rows = str(objects[0].title or ""), _rows(objects[0])
            logs.event("table", title, file=self.file, rows=rows)
            return
        words = " ".join(map(str, objects))
        if options.get("markup", True):
            words = Text.from_markup(words).plain
        level = "error" if self.stderr else "info"
        logs.event("message", words, level, self.file)

    @property
    @override
    def is_terminal(self) -> bool:
        """Whether bars can be drawn: not among lines of JSON."""
        return super().is_terminal and not logs.as_json()


def _rows(table: Table) -> list[dict[str, str]]:
    """Return the rows of a table: each cell by the heading of its column."""
    columns = {str(column.header): map(str, column.cells) for column in table.columns}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


console = Printer(highlight=False, soft_wrap=True)
error_console = Printer(stderr=True, highlight=False, soft_wrap=True)

# Where no person looks (a log file, a cluster's driver), one line a minute is enough.
LOG_EVERY_S = 60


def facts(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a table of names and values."""
    rows = list(rows)
    if logs.as_json():
        logs.event("facts", title, file=console.file, facts=_by_name(rows))
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    console.print(table)


def _by_name(rows: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return names and values; where a name comes again, as notes do, all of its values."""
    found: dict[str, Any] = {}
    for name, value in rows:
        name = name.strip()
        found[name] = value if name not in found else [*_as_list(found[name]), value]
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def tell(message: str, event: str = "message", **fields: Any) -> None:
    """Print a line; where logs are JSON, one with an event's name and `fields`."""
    if logs.as_json():
        logs.event(event, message, file=console.file, **fields)
    else:
        console.print(message, markup=False)
        console.file.flush()


def size(num_bytes: float) -> str:
    """Return a number of bytes as a person reads it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a time as a person reads it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} images/s")


class ImageProgress:
    """A progress bar over images with rate and time left; without a terminal, one line a minute."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._started, self._first = time.monotonic(), done
        self._logged = self._started
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
                console=console,
                # Chunks finish in bursts: a rate over less than this jumps about.
                speed_estimate_period=120,
            )
            self._task = self._bar.add_task("images", total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, images: int) -> None:
        """Say that so many more images are done."""
        self.done += images
        if self._bar:
            self._bar.advance(self._task, images)
        elif time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            rate = (self.done - self._first) / (self._logged - self._started)
            left_s = (self.total - self.done) / rate
            tell(
                f"{self.done} of {self.total} images, {rate:.1f} images/s, {duration(left_s)} left",
                "progress",
                done=self.done,
                total=self.total,
                images_per_second=round(rate, 3),
                seconds_left=round(left_s),
            )


class TrainingProgress:
    """How far a training is: a bar with losses, images/s and time left; without a terminal, lines."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._logged = -math.inf
        # Share and time of the first step, or of one that went on from further back.
        self._first = (math.inf, 0.0)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=console,
                speed_estimate_period=120,
            )
            self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, point: Mapping[str, Any]) -> None:
        """Show what the workers post: a step, an evaluation, a start, or that a node will go."""
        if "loss" in point:
            self._show_step(point)
        elif "workers" in point:
            number = point["workers"]
            words = f"{number} worker{'s' * (number > 1)} at work, from step {point['step']}"
            tell(words, "workers", **point)
        elif "notice" in point:
            words = f"A node will be taken away: there is a checkpoint of step {point['step']}"
            tell(words, "notice", **point)
        elif "box_AP" in point:
            scores = ", ".join(
                f"{name.replace('_', ' ')} {point[name]:.3f}"
                for name in ("mask_AP", "mask_AP50", "box_AP", "box_AP50")
                if name in point
            )
            tell(f"epoch {point['epoch']:.1f}: {scores}", "evaluation", **point)

    def _show_step(self, point: Mapping[str, Any]) -> None:
        parts = ", ".join(
            f"{name.removeprefix('loss_')} {value:.3f}"
            for name, value in point.items()
            if name.startswith("loss_")
        )
        words = (
            f"epoch {point['epoch']:.1f} of {self._epochs}, loss {point['loss']:.3f} ({parts}), "
            f"{point['images_per_second']:.1f} images/s"
        )
        if self._bar:
            self._bar.update(self._task, completed=point["share"], description=words)
        elif time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            told = dict(point)
            left_s = self._seconds_left(point["share"])
            if left_s is not None:
                told["seconds_left"] = round(left_s)
                words += f", {duration(left_s)} left"
            tell(f"{100 * point['share']:.0f} %, {words}", "progress", **told)

    def _seconds_left(self, share: float) -> float | None:
        """Return what the rest takes at the pace so far, evaluations included; None where there is none."""
        first, started = self._first
        if share <= first:
            self._first = (share, self._logged)
            return None
        return (1 - share) * (self._logged - started) / (share - first)
