import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from jobs import console, logs
from jobs.__main__ import main
from jobs.console import ImageProgress, Printer, TrainingProgress, facts, tell


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal would show."""
    made = io.StringIO()
    printer = Printer(file=made, force_terminal=True, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "console", printer)
    return made


def lines(file: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_what_is_printed_is_a_line_of_json(file: io.StringIO) -> None:
    with logs.using("json", verb="predict"):
        console.console.print("[bold]three[/bold] words")
        logs.bind(run_id="7")
        console.console.print("[as it is]", markup=False)
    first, second = lines(file)
    assert (first["message"], first["verb"], first["level"]) == ("three words", "predict", "info")
    assert first["time"].endswith("+00:00")
    assert "run_id" not in first
    assert (second["message"], second["run_id"], second["event"]) == ("[as it is]", "7", "message")
    console.console.print("plain again")
    assert file.getvalue().endswith("plain again\n")


def test_tables_and_events_have_fields(file: io.StringIO) -> None:
    with logs.using("json"):
        facts("Plan", [("images", "5"), ("  empty", "1"), ("note", "a"), ("note", "b")])
        tell("chunk 3 failed", "chunk_failed", chunk_id="00000003")
        logs.event("chunk", "written", file=console.console.file, errors={"empty": 1})
    plan, failed, chunk = lines(file)
    assert plan["message"] == "Plan"
    assert plan["facts"] == {"images": "5", "empty": "1", "note": ["a", "b"]}
    assert (failed["event"], failed["chunk_id"]) == ("chunk_failed", "00000003")
    assert chunk["errors"] == {"empty": 1}


def test_a_table_has_rows(file: io.StringIO) -> None:
    table = Table(title="Categories")
    table.add_column("category")
    table.add_column("AP", justify="right")
    table.add_row(Text("[car]"), "0.5")
    table.add_row("", "-")
    with logs.using("json"):
        console.console.print(table)
    (line,) = lines(file)
    assert (line["event"], line["message"]) == ("table", "Categories")
    assert line["rows"] == [{"category": "[car]", "AP": "0.5"}, {"category": "", "AP": "-"}]


def test_a_person_is_told_no_events(file: io.StringIO) -> None:
    logs.event("chunk", "written", file=console.console.file)
    tell("[chunk 3] failed", "chunk_failed", chunk_id="00000003")
    assert file.getvalue() == "[chunk 3] failed\n"


def test_progress_is_a_line_a_minute_without_a_bar(
    file: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with logs.using("json"), ImageProgress(total=100, done=40) as progress:
        for _ in range(4):
            now += 30
            progress.advance(15)
    found = lines(file)
    assert [line["done"] for line in found] == [70, 100]
    assert found[0]["images_per_second"] == 0.5
    assert found[0]["seconds_left"] == 60
    assert found[0]["message"] == "70 of 100 images, 0.5 images/s, 1 min 00 s left"


def test_a_training_tells_its_numbers(file: io.StringIO) -> None:
    step = {"step": 3, "epoch": 1.5, "loss": 2.0, "images_per_second": 12.3, "share": 0.25}
    with logs.using("json"), TrainingProgress(epochs=4) as progress:
        progress.show({"workers": 2, "step": 0})
        progress.show(step)
        progress.show({"step": 3, "epoch": 2.0, "box_AP": 0.625})
        progress.show({"notice": True, "step": 4})
    found = lines(file)
    assert [line["event"] for line in found] == ["workers", "progress", "evaluation", "notice"]
    assert (found[1]["loss"], found[2]["box_AP"], found[3]["step"]) == (2.0, 0.625, 4)


def test_secrets_stay_out(file: io.StringIO) -> None:
    with logs.using("json"):
        tell("cannot read s3://key:hunter2@bucket/a", url="https://u:hunter2@host/x")
    assert "hunter2" not in file.getvalue()
    assert lines(file)[0]["url"] == "https://***@host/x"


def test_inner_verbs_log_as_the_outer_one(file: io.StringIO) -> None:
    with logs.using("json", verb="demo"), logs.using(None, verb="predict"):
        logs.bind(run_id="1")
        assert logs.as_json()
    with logs.using("json", verb="demo"), logs.using("text"):
        assert not logs.as_json()
    assert not logs.as_json()


@pytest.mark.parametrize(
    ("variable", "flags", "is_json"),
    [
        ("json", [], True),
        ("", [], False),
        ("json", ["--log-format", "text"], False),
        ("text", ["--log-format", "json"], True),
    ],
)
def test_flag_or_environment(
    variable: str,
    flags: list[str],
    is_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(logs.VARIABLE, variable)
    assert main(["status", str(tmp_path), *flags]) == 1
    said = capsys.readouterr().err
    assert said.startswith('{"time"') == is_json
    assert "there is no plan at" in said
    if is_json:
        line = json.loads(said)
        assert (line["level"], line["verb"]) == ("error", "status")


def test_an_unknown_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(SystemExit) as caught:
        main(["status", str(tmp_path)])
    assert caught.value.code == 2
    assert "SEGJOBS_LOG_FORMAT must be text or json, not xml" in capsys.readouterr().err
