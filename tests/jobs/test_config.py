import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from jobs import config, demo_model
from jobs.__main__ import VERBS
from jobs.config import (
    ConfigError,
    DemoConfig,
    ExportConfig,
    InitConfig,
    PackConfig,
    PredictConfig,
)
from jobs.flags import arguments_of, from_namespace, gathered, parser_for
from jobs.label_config import LabelConfig
from jobs.submit_config import SubmitConfig
from jobs.train_config import TrainConfig

CLASSES = list(VERBS.values())


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_arguments(class_: type[Any], values: dict[str, Any]) -> list[str]:
    """What a person types for these values."""
    arguments: list[str] = []
    for field in dataclasses.fields(class_):
        if field.name not in values:
            continue
        value = values[field.name]
        # Lists of numbers are one argument, as `gathered` makes it.
        several = isinstance(value, list) and isinstance(value[0], str)
        words = value if several else [str(value)]
        if field.metadata["positional"]:
            arguments += words
        elif isinstance(value, bool):
            arguments += [flag(field.name)] * value
        else:
            arguments += [flag(field.name), *words]
    return arguments


def parsed(class_: type[Any], arguments: list[str]) -> Any:
    return from_namespace(class_, parser_for(class_).parse_args(arguments))


# Fields whose range has none of the values below.
SPECIAL = {"freeze_stages": 2, "examples": 7, "train_weights": [0.25]}
# What `label` needs, unless something else is asked for.
TO_LABEL = {"input": "in", "model": "model", "policy": "policy.yaml"}


def another_value(class_: type[Any], field: "dataclasses.Field[Any]") -> Any:
    """A value that is allowed and is not the default."""
    if field.name in SPECIAL:
        return SPECIAL[field.name]
    hint = get_type_hints(class_)[field.name]
    if get_origin(hint) is list:
        return ["some text", "more"]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    if get_args(kinds[0]):  # the choices of an optional field
        kinds = list(get_args(kinds[0]))
    if isinstance(kinds[0], str):
        return next(kind for kind in kinds if kind != field.default)
    values = {bool: True, int: 77, float: 0.25, str: "some text"}
    return values[kinds[0]]


def needed(class_: type[Any]) -> dict[str, Any]:
    """Values of the fields that have no default."""
    fields = dataclasses.fields(class_)
    values = {
        field.name: another_value(class_, field)
        for field in fields
        if field.default is dataclasses.MISSING
    }
    return {**values, **(TO_LABEL if class_ is LabelConfig else {})}


# What a field cannot do without.
COMPANIONS: dict[tuple[type[Any], str], dict[str, Any]] = {
    (PredictConfig, "calibrate"): {"plan_only": True},
    (PredictConfig, "like"): {"plan_only": True},
    (PredictConfig, "images_per_second"): {"plan_only": True},
    (PredictConfig, "price_per_gpu_hour"): {"plan_only": True},
    (PredictConfig, "estimate_output"): {"plan_only": True},
    (PackConfig, "score_threshold"): {"predictions": "some text"},
    (TrainConfig, "scale_max"): {"scale_min": 0.25},
    (ExportConfig, "subset"): {"annotations": "some text"},
    (LabelConfig, "reviewed_empty"): {"reviewed": "some text"},
    (ExportConfig, "image_prefix"): {"to": "labelstudio"},
    (ExportConfig, "images"): {"to": "yolo-seg"},
}


@pytest.mark.parametrize("class_", CLASSES)
def test_every_field_has_a_flag_and_a_help_line(
    class_: type[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        parser_for(class_).parse_args(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    words = " ".join(said.split())
    assert (class_.__doc__ or "missing") in words
    for field in dataclasses.fields(class_):
        shown = field.name if field.metadata["positional"] else flag(field.name)
        assert re.search(rf"^  {re.escape(shown)}\b", said, re.MULTILINE), shown
        assert len(field.metadata["help"]) > 5
        assert " ".join(field.metadata["help"].split()) in words


@pytest.mark.parametrize(
    ("class_", "name"),
    [(class_, field.name) for class_ in CLASSES for field in dataclasses.fields(class_)],
)
def test_every_flag_and_every_key_sets_its_field(
    class_: type[Any], name: str, tmp_path: Path
) -> None:
    field = next(field for field in dataclasses.fields(class_) if field.name == name)
    value = another_value(class_, field)
    assert value != field.default
    values = {**needed(class_), **COMPANIONS.get((class_, name), {}), name: value}
    expected = class_(**values)
    assert getattr(expected, name) == value
    assert parsed(class_, as_arguments(class_, values)) == expected
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(values))
    assert parsed(class_, ["--config", str(file)]) == expected


@pytest.mark.parametrize("class_", CLASSES)
def test_defaults_are_those_of_the_dataclass(class_: type[Any]) -> None:
    values = needed(class_)
    assert parsed(class_, as_arguments(class_, values)) == class_(**values)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("input: in\noutput: out\nmodel: m\nchunk_size: 5\nlimit: 3\nplan_only: true\n")
    for arguments in (
        ["--config", str(file), "--chunk-size", "7"],
        ["--config", str(file), "--chunk-size=7"],
    ):
        found = parsed(PredictConfig, arguments)
        assert (found.chunk_size, found.limit, found.plan_only) == (7, 3, True)


@pytest.mark.parametrize("class_", CLASSES)
def test_the_printed_configuration_is_one(
    class_: type[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        field.name: another_value(class_, field)
        for field in dataclasses.fields(class_)
        # They bound or exclude others.
        if (class_, field.name)
        not in (
            *(
                (PredictConfig, "calibrate"),
                (PredictConfig, "like"),
                (PredictConfig, "min_actors"),
                (PackConfig, "annotations"),
                (TrainConfig, "model"),
            ),
            *((ExportConfig, name) for name in ("image_prefix", "images")),
            (SubmitConfig, "stop"),
            *(
                (LabelConfig, name)
                for name in ("list", "show", "promote", "reviewed", "reviewed_empty")
            ),
        )
    }
    arguments = as_arguments(class_, values)
    with pytest.raises(SystemExit) as caught:
        parser_for(class_).parse_args([*arguments, "--print_config"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    names = {field.name for field in dataclasses.fields(class_)}
    assert set(yaml.safe_load(printed)) == {*names, "log_format"}
    file = tmp_path / "c.yaml"
    file.write_text(printed)
    assert parsed(class_, ["--config", str(file)]) == parsed(class_, arguments) == class_(**values)


def refusal(class_: type[Any], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        parsed(class_, arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().rpartition("error: ")[2]


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--chunksize=3", "--chunk-size"),
        ("--chunk_size=3", "--chunk-size"),
        ("--chunk=3", "--chunk-size"),
        ("--score-treshold=3", "--score-threshold"),
        ("--retry-error", "--retry-errors"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest(
    argument: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = as_arguments(PredictConfig, needed(PredictConfig))
    said = refusal(PredictConfig, [*whole, argument], capsys)
    assert said == f"unrecognized arguments: {argument} - did you mean {nearest}?"


def test_an_unknown_key_is_refused_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("input: in\noutput: out\nmodel: m\nchunk_sise: 5\n")
    said = refusal(PredictConfig, ["--config", str(file)], capsys)
    assert said == "Option 'chunk_sise' is not accepted - did you mean chunk_size?"
    file.write_text("input: in\noutput: out\nmodel: m\nzzz: 5\n")
    assert refusal(PredictConfig, ["--config", str(file)], capsys) == "Option 'zzz' is not accepted"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "mask"], "Got value: mask"),
        (["--format", "image"], "Got value: image"),
        (["--chunk-size", "many"], "Got value: many"),
        (["--chunk-size", "2.5"], "Got value: 2.5"),
        (["--config", "inputs"], "File does not exist"),
    ],
)
def test_a_wrong_value_is_refused_and_no_name_suggested(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = as_arguments(PredictConfig, needed(PredictConfig))
    said = refusal(PredictConfig, [*whole, *arguments], capsys)
    assert words in said
    assert "did you mean" not in said


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(PredictConfig, ["--input", "in"], capsys)
    assert "required: output, model" in said


BELOW_ONE = "must be 1 or more, not 0"


@pytest.mark.parametrize(
    ("class_", "values", "words"),
    [
        (PredictConfig, {"score_threshold": -0.1}, "--score-threshold must be from 0 to 1"),
        (PredictConfig, {"score_threshold": 1.1}, "--score-threshold must be from 0 to 1"),
        (PredictConfig, {"score_threshold": float("nan")}, "--score-threshold must be from 0 to 1"),
        (PredictConfig, {"max_detections": 0}, f"--max-detections {BELOW_ONE}"),
        (PredictConfig, {"batch_size": 0}, f"--batch-size {BELOW_ONE}"),
        (PredictConfig, {"min_actors": 0}, f"--min-actors {BELOW_ONE}"),
        (PredictConfig, {"max_actors": 0}, f"--max-actors {BELOW_ONE}"),
        (PredictConfig, {"chunk_size": 0}, f"--chunk-size {BELOW_ONE}"),
        (PredictConfig, {"limit": 0}, f"--limit {BELOW_ONE}"),
        (PredictConfig, {"max_pixels": 0}, f"--max-pixels {BELOW_ONE}"),
        (PredictConfig, {"gpus_per_actor": -1.0}, "--gpus-per-actor must be 0, a fraction of 1"),
        (PredictConfig, {"gpus_per_actor": 1.5}, "--gpus-per-actor must be 0, a fraction of 1"),
        (PredictConfig, {"gpus_per_actor": float("inf")}, "--gpus-per-actor must be"),
        (PredictConfig, {"gpus_per_actor": float("nan")}, "--gpus-per-actor must be"),
        (
            PredictConfig,
            {"min_actors": 3, "max_actors": 2},
            r"--min-actors \(3\) is more than --max-actors \(2\)",
        ),
        (InitConfig, {"score_threshold": 2.0}, "--score-threshold must be from 0 to 1, not 2"),
        (InitConfig, {"max_detections": 0}, f"--max-detections {BELOW_ONE}"),
        (InitConfig, {"min_size": 0}, "--min-size must be 32 or more, not 0"),
        (InitConfig, {"max_size": 0}, "--max-size must be 32 or more, not 0"),
        (InitConfig, {"norm_eps": -1.0}, "--norm-eps must be 0 or more, not -1"),
        (TrainConfig, {"learning_rate": float("inf")}, "--learning-rate must be a finite number"),
        (TrainConfig, {"epochs": 1, "warmup_epochs": 1.5}, r"--warmup-epochs \(1.5\) is more than"),
        (TrainConfig, {"copy_paste": 0.5, "batch_size": 1}, "--batch-size must be 2 or more"),
        (PackConfig, {"shard_size": 0}, f"--shard-size {BELOW_ONE}"),
        (PackConfig, {"predictions": "p", "annotations": "a"}, "--annotations and --predictions"),
        (
            ExportConfig,
            {"to": "yolo-seg", "image_prefix": "p"},
            "--image-prefix is of --to labelstudio",
        ),
        (ExportConfig, {"to": "labelstudio"}, "--to labelstudio needs --image-prefix"),
        (ExportConfig, {"to": "coco-results", "images": "i"}, "coco-results names no image files"),
        (
            ExportConfig,
            {"to": "yolo-seg", "annotations": "a"},
            "--annotations is of --to coco-results",
        ),
        (ExportConfig, {"to": "coco-results", "subset": True}, "--subset needs --annotations"),
        (PackConfig, {"score_threshold": 0.5}, "--score-threshold needs --predictions"),
        (
            PackConfig,
            {"predictions": "p", "score_threshold": 1.5},
            "--score-threshold must be from 0 to 1, not 1.5",
        ),
        (PredictConfig, {"plan_only": True, "calibrate": 0}, f"--calibrate {BELOW_ONE}"),
        (
            PredictConfig,
            {"plan_only": True, "price_per_gpu_hour": float("inf")},
            "--price-per-gpu-hour must be a finite number of more than 0",
        ),
        (PredictConfig, {"calibrate": 9}, "--calibrate is of --plan-only alone"),
        (PredictConfig, {"estimate_output": "e"}, "--estimate-output is of --plan-only alone"),
        (
            PredictConfig,
            {"plan_only": True, "calibrate": 9, "images_per_second": 2.0},
            "exclude one another",
        ),
        (PredictConfig, {"plan_only": True, "calibrate": 9, "like": "t"}, "exclude one another"),
        (PredictConfig, {"like": "t"}, "--like is of --plan-only alone"),
        (DemoConfig, {"scenes": 0}, f"--scenes {BELOW_ONE}"),
        (DemoConfig, {"seed": -1}, "--seed must be 0 or more, not -1"),
    ],
)
def test_what_is_out_of_range_is_refused_with_its_flag(
    class_: type[Any], values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        class_(**{**needed(class_), **values})


@pytest.mark.parametrize("url", ["http://me:hunter2@host", "https://h/b?X-Amz-Signature=hunter2"])
def test_credentials_in_the_endpoint_are_refused_unseen(url: str) -> None:
    arguments = ["--input", "a", "--output", "b", "--model", "c", "--endpoint-url", url]
    with pytest.raises(ConfigError, match="--endpoint-url holds a password") as caught:
        parsed(PredictConfig, arguments)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"gpus_per_actor": 0.0},
        {"gpus_per_actor": 0.5},
        {"gpus_per_actor": 2.0},
        {"score_threshold": 0.0},
        {"score_threshold": 1.0},
        {"min_actors": 2, "max_actors": 2},
        {"min_actors": 3},
        {"limit": 1},
    ],
)
def test_what_is_just_in_range_is_taken(values: dict[str, Any]) -> None:
    made = PredictConfig(**{**needed(PredictConfig), **values})
    assert {name: getattr(made, name) for name in values} == values


def test_a_field_must_be_declared_as_an_option() -> None:
    declared = config.option("what it is for")
    assert declared.default is dataclasses.MISSING
    assert declared.metadata == {"help": "what it is for", "positional": False}


@pytest.mark.parametrize(
    ("workers", "expected"), [(0, None), (2, (2, 2)), ("3", (3, 3)), ("1..4", (1, 4))]
)
def test_workers_are_a_number_or_a_range(workers: int | str, expected: Any) -> None:
    assert TrainConfig(train="a", output="b", workers=workers).worker_range == expected


@pytest.mark.parametrize("workers", ["4..1", "0..2", "-1", "1..", "many"])
def test_other_workers_are_refused(workers: str) -> None:
    with pytest.raises(ConfigError, match=r"N or MIN\.\.MAX"):
        TrainConfig(train="a", output="b", workers=workers)


@pytest.mark.parametrize("recipe", sorted(Path(config.__file__).parent.glob("recipes/*.yaml")))
def test_the_recipes_are_configurations_of_train(recipe: Path) -> None:
    found = parsed(TrainConfig, ["--config", str(recipe), "--train", "a", "--output", "b"])
    # The small network, or what a bundle brings that is trained on.
    assert found.arch == (
        None if recipe.name in (*demo_model.STAGES[1:], "nuclei-r50.yaml") else "small"
    )
    assert found.epochs == yaml.safe_load(recipe.read_text())["epochs"]


@pytest.mark.parametrize("name", demo_model.STAGES)
def test_the_demos_arithmetic_is_the_same_on_every_machine(name: str) -> None:
    recipe = Path(config.__file__).parent / "recipes" / name
    found = parsed(TrainConfig, ["--config", str(recipe), "--train", "a", "--output", "b"])
    assert found.precision == "fp32"


def test_several_values_of_a_flag_are_one_list(tmp_path: Path) -> None:
    def sets(*arguments: str) -> tuple[list[str], list[float] | None]:
        found = parsed(TrainConfig, gathered(TrainConfig, [*arguments, "--output", "out"]))
        return found.train_sets, found.train_weights

    assert sets("--train", "a") == (["a"], None)
    assert sets("--train", "a b", "c: d", "--epochs", "3") == (["a b", "c: d"], None)
    assert sets("--train", "a", "b", "--train-weights", "1", "0.5") == (["a", "b"], [1, 0.5])
    assert sets("--train-weights", "0.5", "--train", "a") == (["a"], [0.5])
    file = tmp_path / "c.yaml"
    for text, expected in (("train: a", ["a"]), ("train: [a, b]", ["a", "b"])):
        file.write_text(text)
        assert sets("--config", str(file)) == (expected, None)
    for weights, message in (([1.0], "has 1 numbers, and --train 2"), ([1.0, 0.0], "more than 0")):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(train=["a", "b"], output="out", train_weights=weights)


def test_the_arguments_of_a_configuration_make_it() -> None:
    made = PredictConfig(input="a b", output="o", model="m", score_threshold=0.0, frozen_plan=True)
    assert parsed(PredictConfig, arguments_of(made)) == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--input, --model, --policy must be given to label"),
        ({"dry_run": True}, "--input must be given"),
        ({"list": True, "show": 3}, "--list and --show exclude one another"),
        ({**TO_LABEL, "max_drift": 1.5}, "--max-drift must be from 0 to 1"),
        ({"promote": 0}, "--promote must be 1 or more"),
    ],
)
def test_what_label_cannot_do_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelConfig(dataset="set", **values)
