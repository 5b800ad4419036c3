import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobs.__main__ import VERBS, main
from jobs.config import ConfigError, PredictConfig, StatusConfig


def exit_code(arguments: list[str]) -> int:
    """What the process would end with, whether `main` returns or exits."""
    with pytest.raises(SystemExit) as caught:
        sys.exit(main(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A `status` that does what the test says, in the place of the real one."""
    module = ModuleType("jobs.status")
    monkeypatch.setitem(sys.modules, "jobs.status", module)
    return module


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, class_ in VERBS.items():
        assert f"{name} {class_.__doc__}" in said


@pytest.mark.parametrize("name", VERBS)
def test_help_of_every_verb(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"segjobs [options] {name}" in said
    assert "--config" in said


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_module_that_runs_it(name: str) -> None:
    # Not imported: torch and Ray take seconds.
    file = Path(sys.modules["jobs"].__path__[0]) / f"{name}.py"
    assert f"def run(config: {VERBS[name].__name__}) -> int:" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "verb"),
        (["pridict"], "invalid choice: 'pridict'"),
        (["status"], "required: status.output"),
        (["predict", "--input", "a"], "predict.output, predict.model"),
        (["status", "out", "--nope"], "unrecognized arguments: --nope"),
        (["status", "out", "more"], "unrecognized arguments: more"),
        (["status", "--endpoint", "x", "out"], "did you mean --endpoint-url?"),
        (
            ["predict", "--input=a", "--output=b", "--model=c", "--limit=0"],
            "--limit must be 1 or more, not 0",
        ),
    ],
)
def test_bad_arguments_are_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""


def test_an_unknown_key_names_the_nearest_of_its_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("input: a\noutput: b\nmodel: c\nchunk_sise: 3\n")
    assert exit_code(["predict", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert "does not accept option 'chunk_sise' - did you mean chunk_size?" in said
    assert "segjobs predict --help" in said


def test_a_verb_gets_its_configuration(
    verb: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    verb.run = lambda config: seen.append(config) or 0  # type: ignore[attr-defined]
    assert exit_code(["status", "s3://b/out", "--endpoint-url", "http://x"]) == 0
    assert exit_code(["status", "--print_config", "s3://b/out"]) == 0
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    assert exit_code(["status", "--config", str(file)]) == 0
    assert seen == [
        StatusConfig(output="s3://b/out", endpoint_url="http://x"),
        StatusConfig(output="s3://b/out"),
    ]


@pytest.mark.parametrize(
    ("happens", "code", "words"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (ValueError("the [plan] is old"), 1, "segjobs status: the [plan] is old"),
        (
            FileNotFoundError("s3://b/x does not exist"),
            1,
            "segjobs status: s3://b/x does not exist",
        ),
        (RuntimeError("rows are missing"), 1, "segjobs status: rows are missing"),
        (ConfigError("--output lies within --input"), 2, "segjobs status: --output lies within"),
        (KeyboardInterrupt(), 130, "Stopped. Run the same command again to go on."),
        (
            KeyboardInterrupt("5 of 9 images are done"),
            130,
            "Stopped: 5 of 9 images are done. Run the same command again to go on.",
        ),
    ],
)
def test_how_a_verb_ends(
    verb: ModuleType,
    happens: int | BaseException,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(config: StatusConfig) -> int:
        if isinstance(happens, BaseException):
            raise happens
        return happens

    verb.run = run  # type: ignore[attr-defined]
    assert exit_code(["status", "out"]) == code
    assert words in " ".join(capsys.readouterr().err.split())


def test_what_is_our_mistake_keeps_its_traceback(verb: ModuleType) -> None:
    def run(config: StatusConfig) -> int:
        raise KeyError("oops")

    verb.run = run  # type: ignore[attr-defined]
    with pytest.raises(KeyError, match="oops"):
        main(["status", "out"])


def test_the_command_line_imports_no_torch_and_no_ray() -> None:
    code = (
        "import sys, jobs.__main__ as m\n"
        "try: m.main(['predict', '--help'])\n"
        "finally: print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.endswith("[]\n")
    assert "--chunk-size" in done.stdout


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs", "status", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no plan at" in done.stderr


def test_predict_refuses_before_it_starts_anything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        PredictConfig(input="a", output="b", model="c", chunk_size=-1)
    assert exit_code(["predict", "--input=a", "--output=b", "--model=c", "--chunk-size=-1"]) == 2
    assert "--chunk-size must be 1 or more, not -1" in capsys.readouterr().err
