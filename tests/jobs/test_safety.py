"""Nothing that comes from data, weights, configurations or names is run as code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import jobs
import segmodel
from jobs.__main__ import main

SOURCES = sorted(
    path
    for package in (jobs, segmodel)
    for folder in package.__path__
    for path in Path(folder).rglob("*.py")
)
# What runs code, or may: a shell, or a format that says what is to be called.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader"),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
    *("tarfile.TarFile.extract", "tarfile.TarFile.extractall", "shutil.unpack_archive"),
}
# What this program's own workers hand one another within one run, and never write: Ray pickles too.
ALLOWED = {
    ("train_worker.py", "cloudpickle.loads"),
    ("envelope.py", "cloudpickle.loads"),
    ("encode.py", "cloudpickle.loads"),
}


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the dotted name that it has."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def offences(name: str, source: str) -> list[str]:
    found = []
    for called, node in calls(source):
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        bad = called in FORBIDDEN and (name, called) not in ALLOWED
        bad |= keywords.get("shell", "False") != "False"
        bad |= keywords.get("allow_pickle", "False") != "False"
        bad |= called.endswith((".extract", ".extractall"))
        bad |= called == "torch.load" and keywords.get("weights_only") != "True"
        if bad:
            found.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    return found


def test_no_source_runs_what_it_reads() -> None:
    assert len(SOURCES) > 60
    assert [line for path in SOURCES for line in offences(path.name, path.read_text())] == []


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run(f'cp {name}', shell=True)",
        "os.system(name)",
        "eval(name)",
        "pickle.loads(data)",
        "cloudpickle.loads(data)",
        "yaml.load(data, Loader=yaml.FullLoader)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "archive.extractall(folder)",
    ],
)
def test_such_a_line_would_be_found(line: str) -> None:
    assert len(offences("a.py", f"def f():\n    return {line}\n")) == 1


PLANTED = '!!python/object/apply:os.mkdir ["{}"]'


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """What the planted code makes when it is run; here it is run once, so that it is known to work."""
    made = tmp_path / "was run"
    yaml.unsafe_load(PLANTED.format(made))
    assert made.exists()
    made.rmdir()
    return made


@pytest.mark.parametrize("verb", ["predict", "status", "init", "pack", "train", "evaluate"])
def test_code_in_a_configuration_is_not_run(
    verb: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    for planted in (f"input: {PLANTED}", f"{PLANTED}", f"? {PLANTED}\n: 1"):
        config.write_text(planted.format(target))
        try:
            code = main([verb, "--config", str(config)])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        assert capsys.readouterr().err
        assert not target.exists()


def test_code_in_a_list_of_categories_is_not_run(target: Path, tmp_path: Path) -> None:
    listed = tmp_path / "categories.yaml"
    listed.write_text("- id: 1\n  name: " + PLANTED.format(target))
    arguments = ["--arch", "small", "--weights", "random", "--categories", str(listed)]
    assert main(["init", *arguments, "--output", str(tmp_path / "bundle")]) == 2
    assert not target.exists()
    assert not (tmp_path / "bundle").exists()
