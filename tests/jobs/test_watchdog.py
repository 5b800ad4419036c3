"""A real process that hangs, in Python and in code that never gives the GIL back."""

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from jobs.watchdog import Watchdog

LIMIT_S = 1.0


def run(body: str) -> "subprocess.CompletedProcess[str]":
    code = (
        "import threading, time\n"
        "from jobs.watchdog import Watchdog\n"
        f"dog = Watchdog({LIMIT_S})\n"
        f"{body}\n"
        "print('alive')"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize(
    "hang",
    ["time.sleep(1000)", "sum(range(10**15))"],
    ids=["sleeps", "holds the GIL"],
)
def test_a_process_that_hangs_is_ended_and_says_where(hang: str) -> None:
    done = run(f"with dog.watch(): {hang}")
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert 'File "<string>", line 4' in done.stderr
    assert done.stdout == ""


def test_one_of_two_hangs_while_the_other_comes_further() -> None:
    body = (
        "def hang():\n"
        "    with dog.watch(): time.sleep(1000)\n"
        "threading.Thread(target=hang, daemon=True).start()\n"
        "with dog.watch() as progress:\n"
        "    for _ in range(1000): time.sleep(0.1); progress()"
    )
    assert run(body).returncode == 1


def test_slow_work_that_comes_further_lives_and_so_does_what_comes_after() -> None:
    body = (
        "with dog.watch() as progress:\n"
        "    for _ in range(25): time.sleep(0.1); progress()\n"
        "time.sleep(1.5)"
    )
    done = run(body)
    assert (done.returncode, done.stdout) == (0, "alive\n")


class Alarm:
    """`faulthandler`'s alarm, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now, self.at, self.times_set = 100.0, 0.0, 0

    def set(self, timeout: float, *, exit: bool, file: int) -> None:  # noqa: A002
        assert exit
        self.at, self.times_set = self.now + timeout, self.times_set + 1

    def cancel(self) -> None:
        self.at = 0.0


@pytest.fixture
def alarm(monkeypatch: pytest.MonkeyPatch) -> Alarm:
    made = Alarm()
    monkeypatch.setattr("faulthandler.dump_traceback_later", made.set)
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", made.cancel)
    monkeypatch.setattr("time.monotonic", lambda: made.now)
    return made


def test_the_alarm_never_comes_before_the_limit_and_soon_after(alarm: Alarm) -> None:
    with Watchdog(50).watch() as progress:
        for _ in range(2000):
            assert alarm.now + 50 <= alarm.at <= alarm.now + 50 * 1.01 + 1e-9
            alarm.now += 0.1
            progress()
        # Not for every image: setting it starts a thread.
        assert alarm.times_set < 500
    assert alarm.at == 0


def test_the_first_deadline_counts_and_is_forgotten_with_its_work(alarm: Alarm) -> None:
    dog = Watchdog(50)
    entered, leave = threading.Event(), threading.Event()

    def other(wait: Callable[[], bool]) -> None:
        with dog.watch():
            entered.set()
            wait()

    thread = threading.Thread(target=other, args=(leave.wait,))
    thread.start()
    entered.wait()
    alarm.now += 30
    with dog.watch() as progress:
        progress()
        assert alarm.at <= 150.5
        leave.set()
        thread.join()
        assert alarm.at >= 180
    assert alarm.at == 0
