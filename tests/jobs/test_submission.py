"""Commands that are to run elsewhere: refused here, named, and what travels with them."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs import shipping
from jobs.__main__ import VERBS, main
from jobs.config import ConfigError
from jobs.shipping import variables
from jobs.submission import FILES, HERE, MADE, PLACES, Submission, prepare

PREDICT = ["predict", "--input", "s3://bb/photos", "--model", "s3://bb/model"]


def prepared(*command: str) -> Submission:
    return prepare(command, VERBS)


def test_a_command_keeps_its_flags() -> None:
    command = [*PREDICT, "--output", "s3://bb/tables/a b", "--limit", "3"]
    made = prepared(*command)
    assert list(made.arguments) == command
    assert made.files == {}
    assert made.output == "s3://bb/tables/a b"


def test_the_name_is_of_verb_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    one = prepared(*PREDICT, "--output", "s3://bb/Tables/2026_11").name
    assert one.startswith("segjobs-predict-tables-2026-11-")
    # However it is spelled, and whatever else is asked for.
    assert prepared(*PREDICT, "--output=s3://bb/Tables/2026_11/", "--limit", "3").name == one
    names = {
        one,
        prepared(*PREDICT, "--output", "s3://bb/tables/2026_11").name,
        prepared(*PREDICT, "--output", "s3://cc/Tables/2026_11").name,
        prepared(*PREDICT, "--output", "s3://bb/Tables/2026_11", "--endpoint-url", "http://x").name,
        prepared("pack", "--images", "s3://bb/i", "--output", "s3://bb/Tables/2026_11").name,
        prepared(*PREDICT, "--output", "s3://bb").name,
        prepared(*PREDICT, "--output", "/mnt/all/tables").name,
    }
    assert len(names) == 7
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://x")
    assert prepared(*PREDICT, "--output", "s3://bb/Tables/2026_11").name in names - {one}
    assert prepared(*PREDICT, "--output", "/mnt/all/tables").name in names


@pytest.mark.parametrize("given", [["--config", "{}"], ["--config={}"]])
def test_configuration_files_travel(given: list[str], tmp_path: Path) -> None:
    file = tmp_path / "my settings.yaml"
    file.write_text("chunk_size: 3\n")
    arguments = [argument.format(file) for argument in given]
    made = prepared(*PREDICT, *arguments, "--output", "s3://bb/t")
    ((name, content),) = made.files.items()
    assert content == b"chunk_size: 3\n"
    assert name.endswith("-my_settings.yaml")
    assert str(file) not in " ".join(made.arguments)
    assert name in " ".join(made.arguments)
    # Another content is another command.
    file.write_text("chunk_size: 4\n")
    assert prepared(*PREDICT, *arguments, "--output", "s3://bb/t").arguments != made.arguments


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["pridict"], "'pridict' is nothing to submit. What is: predict, init, pack"),
        (["demo"], "it is for one machine"),
        (["status", "s3://bb/t"], "it reads the output alone"),
        (["submit", "--", "predict"], "one submit is enough"),
        ([*PREDICT, "--output", "s3://bb/t", "--address", "auto"], "--address within the command"),
        ([*PREDICT, "--output", "t"], "--output t is a path in this folder"),
        (
            [*PREDICT[:3], "--model", "m", "--output", "s3://bb/t"],
            "--model m is a path in this folder",
        ),
        ([*PREDICT, "--output", "s3://bb/t", "--limit", "0"], "--limit must be 1 or more"),
        (
            [*PREDICT, "--output", "s3://bb/t", "--image-column", "http://u:pw@host"],
            "a password or a signature",
        ),
        (
            [*PREDICT, "--output", "s3://bb/t", "--image-column=https://pw@host/x"],
            "a password or a signature",
        ),
        (
            [*PREDICT, "--output", "s3://bb/t", "--image-column=https://host/x?X-Amz-Signature=pw"],
            "a password or a signature",
        ),
    ],
)
def test_what_cannot_run_elsewhere_is_refused(command: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(*command)
    assert words in str(caught.value)
    assert "pw" not in str(caught.value).replace("password", "")


def test_a_relative_place_in_a_file_is_refused_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: tables/x\n")
    with pytest.raises(ConfigError, match="--output tables/x is a path in this folder"):
        prepared(*PREDICT, "--config", str(file))


def test_several_values_of_a_flag_travel_as_they_were_typed() -> None:
    typed = ["train", "--train", "s3://bb/a", "s3://bb/c", "--output", "s3://bb/out"]
    assert prepare(typed, VERBS).arguments == tuple(typed)
    with pytest.raises(ConfigError, match="--train here is a path"):
        prepare([*typed[:3], "here", *typed[4:]], VERBS)


def test_wrong_flags_end_as_the_verb_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["submit", "--", *PREDICT, "--output", "s3://bb/t", "--chunk-sise", "3"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "did you mean --chunk-size?" in said
    assert "segjobs predict --help" in said


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - HERE.keys()))
def test_every_other_verb_says_what_it_makes(verb: str) -> None:
    fields = VERBS[verb].__dataclass_fields__
    assert [name for name in MADE if name in fields], f"{verb} has none of {MADE}: it needs a name"
    # What is neither a place, nor a file, nor a value must not travel as a path.
    said = {
        name
        for name, field in fields.items()
        if "URI" in field.metadata["help"] or "FILE" in field.metadata["help"]
    }
    assert said <= {*PLACES, *FILES}


def test_the_package_is_what_runs(tmp_path: Path) -> None:
    shipping.fill(tmp_path, {"a.yaml": b"x: 1"}, code=True)
    files = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert {
        "a.yaml",
        "jobs/__main__.py",
        "jobs/recipes/nuclei.yaml",
        "jobs/report_page/page.html",
    } <= files
    assert "segmodel/masks.py" in files
    assert f"segjobs-{version('segjobs')}.dist-info/METADATA" in files
    assert not [name for name in files if name.endswith((".pyc", ".safetensors"))]
    assert sum((tmp_path / name).stat().st_size for name in files) < 2 * 2**20


def test_without_code_only_files_travel(tmp_path: Path) -> None:
    shipping.fill(tmp_path, {"a.yaml": b"x: 1"}, code=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "DB_PASSWORD",
        "API_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_SAS",
        "GH_PAT",
        "PAT_OF_CI",
        "MYSTORE_AUTH",
        "AUTH_HEADER",
        "HTTP_AUTHORIZATION",
    ],
)
def test_credentials_do_not_travel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "planted")
    with pytest.raises(ConfigError, match=f"--env {name}: it holds a credential") as caught:
        variables([name])
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "http://me:planted@proxy",
        "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=planted==",
        "Endpoint=sb://me/;SharedAccessKey=planted",
        "sv=2024-11-04&ss=b&sig=planted%3D",
        '{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\\nplanted"}',
        "-----BEGIN OPENSSH PRIVATE KEY-----\nplanted",
        "machine host login me password planted",
        "host=db user=me password=planted",
        '{"user": "me", "password": "planted"}',
    ],
)
def test_values_with_credentials_are_credentials(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SETTING", value)
    with pytest.raises(ConfigError, match="SETTING: it holds a credential") as caught:
        variables(["SETTING"])
    assert "planted" not in str(caught.value)


def test_names_of_profiles_and_files_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "AWS_PROFILE",
        "AWS_REGION",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        # Nor these, of which parts are called so.
        "PYTHONPATH",
        "PATTERN",
        "RAY_AUTH_MODE",
        "SASSY",
        "AUTHOR",
        "NETRC",
    ]
    for name in names:
        monkeypatch.setenv(name, "/run/secrets/password")
    assert variables(names) == dict.fromkeys(names, "/run/secrets/password")


def test_a_variable_that_is_not_set_is_named() -> None:
    assert "NOT_SET_AT_ALL" not in os.environ
    with pytest.raises(ConfigError, match="--env NOT_SET_AT_ALL: it is not set here"):
        variables(["NOT_SET_AT_ALL"])
