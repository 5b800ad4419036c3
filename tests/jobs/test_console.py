import io
import json
import time

import pytest
from rich.console import Console

from jobs import console, logs
from jobs.console import ImageProgress, TrainingProgress, duration, facts, size


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a log file would hold."""
    file = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=file, highlight=False, soft_wrap=True))
    return file


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (2.5 * 2**40, "2.5 TiB"),
        (2**51, "2048.0 TiB"),
    ],
)
def test_size(num_bytes: float, words: str) -> None:
    assert size(num_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (3.21, "3.2 s"),
        (59.4, "59.4 s"),
        (59.7, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_facts(said: io.StringIO) -> None:
    facts("Plan [1]", [("images", "5"), ("path", "s3://bucket/[a]/b")])
    lines = [line.split() for line in said.getvalue().splitlines()]
    assert lines == [["Plan", "[1]"], ["images", "5"], ["path", "s3://bucket/[a]/b"]]


def test_a_log_gets_a_line_a_minute(said: io.StringIO, clock: Clock) -> None:
    with ImageProgress(total=1000, done=400) as progress:
        for _ in range(7):
            clock.now += 20
            progress.advance(20)
    # Three chunks a minute, and what was done before does not count as work.
    assert said.getvalue().splitlines() == [
        "460 of 1000 images, 1.0 images/s, 9 min 00 s left",
        "520 of 1000 images, 1.0 images/s, 8 min 00 s left",
    ]
    assert progress.done == 540


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=100)
    monkeypatch.setattr(console, "console", terminal)
    with ImageProgress(total=10, done=4) as progress:
        progress.advance(6)
    assert progress.done == 10
    drawn = file.getvalue()
    assert "10/10" in drawn
    assert "images/s" in drawn


def step(share: float) -> dict[str, float]:
    return {
        "step": 3,
        "epoch": 1.5,
        "loss": 2.0,
        "loss_mask": 0.75,
        "images_per_second": 12.3,
        "share": share,
    }


def test_a_log_has_a_training_step_a_minute_and_every_evaluation(
    said: io.StringIO, clock: Clock
) -> None:
    with TrainingProgress(epochs=4) as progress:
        for number in range(5):
            progress.show(step(number / 10))
            clock.now += 25
        progress.show({"step": 3, "epoch": 2.0, "mask_AP": 0.5, "mask_AP50": 0.75, "box_AP": 0.625})
        progress.show({"step": 3, "saved": True})
    lines = said.getvalue().splitlines()
    assert [line.split(" %")[0] for line in lines[:2]] == ["0", "30"]
    assert lines[0].endswith("epoch 1.5 of 4, loss 2.000 (mask 0.750), 12.3 images/s")
    # 30 % took 75 s.
    assert lines[1].endswith("12.3 images/s, 2 min 55 s left")
    assert lines[2:] == ["epoch 2.0: mask AP 0.500, mask AP50 0.750, box AP 0.625"]


def test_the_time_left_of_a_training_is_a_number_for_machines(
    said: io.StringIO, clock: Clock
) -> None:
    with logs.using("json"), TrainingProgress(epochs=4) as progress:
        # It goes on at 40 %, and once more from there.
        for share in (0.4, 0.6, 0.4, 0.5):
            progress.show(step(share))
            clock.now += 100
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [line.get("seconds_left") for line in lines] == [None, 200, None, 500]
    assert [line["share"] for line in lines] == [0.4, 0.6, 0.4, 0.5]


def test_a_terminal_gets_a_bar_for_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=150, highlight=False)
    monkeypatch.setattr(console, "console", terminal)
    with TrainingProgress(epochs=4) as progress:
        progress.show(step(0.25))
        progress.show({"step": 3, "epoch": 2.0, "box_AP": 0.625})
    assert "25%" in file.getvalue()
    assert "loss 2.000" in file.getvalue()
    assert "box AP 0.625" in file.getvalue()
