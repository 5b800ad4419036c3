"""`segjobs init`: bundles of random, published and own weights."""

import json
import urllib.error
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor
from torchvision.models import WeightsEnum, mobilenet_v3_large
from torchvision.models.detection import maskrcnn_resnet50_fpn

from jobs import init
from jobs.__main__ import main
from jobs.config import ConfigError, InitConfig
from segmodel import bundle as bundles
from segmodel import initial
from segmodel.bundle import Bundle
from segmodel.schema import Category
from segmodel.settings import ModelSettings

State = dict[str, Tensor]
MakeFile = Callable[[str, Any], str]

LISTED = [{"id": 7, "name": "bird"}, {"id": 3, "name": "crab"}]
CATEGORIES = initial.numbered_categories([(7, "bird"), (3, "crab")])
SETTINGS = ModelSettings(arch="small", num_classes=3, min_size=64, max_size=96)


@pytest.fixture
def listed(tmp_path: Path) -> str:
    """A file of two categories."""
    path = tmp_path / "categories.yaml"
    path.write_text(yaml.safe_dump(LISTED))
    return str(path)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A state-dict file of two categories and background."""
    path = tmp_path / "weights.pth"
    torch.save(dict(initial.random_bundle(SETTINGS, CATEGORIES, seed=8).weights), path)
    return str(path)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "made" / "bundle"


def make(output: Path, **options: Any) -> Bundle:
    """Run the verb in this process and load what it made."""
    config = InitConfig(
        **{"arch": "small", "min_size": 64, "max_size": 96, "output": str(output), **options}
    )
    assert init.run(config) == 0
    return bundles.load(output)


def refused(output: Path, **options: Any) -> str:
    """Run the verb, which fails and writes nothing, and return what it says."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers check the message
        make(output, **options)
    assert not output.exists()
    return str(caught.value)


def publish(monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    def get_state_dict(_weights: WeightsEnum, **_options: Any) -> State:
        return OrderedDict(state)

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)


def test_the_command_makes_a_bundle_and_says_what_it_is(
    output: Path, listed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["init", "--arch", "small", "--weights", "random", "--output", str(output)]
    more = ["--seed", "4", "--score-threshold", "0.4", "--max-detections", "9"]
    assert main([*arguments, "--categories", listed, *more]) == 0
    made = bundles.load(output)
    settings = ModelSettings(arch="small", num_classes=3, min_size=320, max_size=640)
    expected = replace(
        initial.random_bundle(settings, CATEGORIES, seed=4),
        score_threshold=0.4,
        max_detections=9,
        digest="",
    )
    assert made.digest == expected.digest
    assert made.settings == settings
    assert made.categories == CATEGORIES
    # Folded to the console's width, nothing of it is left out.
    said = "".join(capsys.readouterr().out.split())
    for word in (str(output), "small", "weightsrandom,seed4", made.digest[:12]):
        assert word in said


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(LISTED),
        yaml.safe_dump(LISTED),
        yaml.safe_dump({"categories": LISTED}),
        json.dumps({"images": [], "annotations": [{"id": 1}], "categories": LISTED}),
        json.dumps([{**one, "supercategory": "animal"} for one in LISTED], indent=1),
        json.dumps([{**one, "label": n} for n, one in enumerate(LISTED, 1)]),
    ],
    ids=["JSON", "YAML", "YAML of COCO", "COCO", "more keys", "labels"],
)
def test_categories_are_read_from(output: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_text(text)
    made = make(output, weights="random", categories=str(tmp_path / "names"))
    assert made.categories == CATEGORIES


def test_a_large_coco_file_is_not_read_as_yaml(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def safe_load(_data: bytes) -> None:
        raise AssertionError("YAML takes hours for this")

    monkeypatch.setattr(yaml, "safe_load", safe_load)
    (tmp_path / "coco.json").write_text(json.dumps({"categories": LISTED}))
    made = make(output, weights="random", categories=str(tmp_path / "coco.json"))
    assert made.categories == CATEGORIES


def test_labels_with_gaps_make_outputs_for_all(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(
        '[{"id": 7, "name": "bird", "label": 4}, {"id": 3, "name": "crab", "label": 1}]'
    )
    made = make(output, weights="random", categories=str(path))
    assert made.settings.num_classes == 5
    assert made.by_label() == {
        4: Category(id=7, name="bird", label=4),
        1: Category(id=3, name="crab", label=1),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {id: 1, name: no}", "the name False is no text: put it in quotes"),
        ("- {id: 1, name: 007}", "the name 7 is no text"),
        ("- {id: one, name: a}", "should be a list of {id, name}, or a COCO file: ValueError"),
        ("- {name: a}", "KeyError('id')"),
        ("- bird\n- crab", "should be a list of {id, name}"),
        ("[{id: 1, name: a, label: 1}, {id: 2, name: b}]", "KeyError('label')"),
        ('{"images": []}', "KeyError('categories')"),
        ("", "should be a list of {id, name}"),
        ("[", "should be a list of {id, name}"),
        ("!!python/object/apply:os.getcwd []", "should be a list of {id, name}"),
        ("[]", "lists none"),
        ('{"categories": []}', "lists none"),
        ("[{id: 1, name: a}, {id: 1, name: b}]", "two categories have the same id: 1"),
        ("[{id: 1, name: a}, {id: 2, name: a}]", "two categories have the same name: a"),
        ("[{id: 1, name: a, label: 0}, {id: 2, name: b, label: 1}]", "'a' has label 0"),
    ],
)
def test_categories_that_cannot_be_are_refused(
    output: Path, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "names").write_text(text)
    assert words in refused(output, weights="random", categories=str(tmp_path / "names"))


@pytest.mark.parametrize("weights", ["random", "imagenet"])
def test_new_heads_need_categories(output: Path, weights: str) -> None:
    assert refused(output, weights=weights) == f"--weights {weights} needs --categories FILE"


def test_a_missing_categories_file_is_named(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--arch", "small", "--weights", "random", "--output", str(output)]
    assert main(["init", *arguments, "--categories", str(tmp_path / "none.json")]) == 1
    assert "none.json does not exist" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"min_size": None, "max_size": None}, (320, 640)),
        ({"min_size": 400, "max_size": None}, (400, 640)),
        ({"min_size": 700, "max_size": None}, (700, 700)),
        ({"min_size": None, "max_size": 500}, (320, 500)),
        ({"min_size": 64, "max_size": 64}, (64, 64)),
    ],
)
def test_sizes(output: Path, listed: str, sizes: Any, expected: tuple[int, int]) -> None:
    settings = make(output, weights="random", categories=listed, **sizes).settings
    assert (settings.min_size, settings.max_size) == expected


def test_sizes_that_contradict_one_another_are_refused(output: Path, listed: str) -> None:
    said = refused(output, weights="random", categories=listed, min_size=64, max_size=48)
    assert said == "min_size (64) must be 32 or more, and at most max_size (48)"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"min_size": 0}, "--min-size must be 32 or more, not 0"),
        ({"max_size": 0}, "--max-size must be 32 or more, not 0"),
        ({"norm_eps": -1.0}, "--norm-eps must be 0 or more, not -1.0"),
        ({"score_threshold": 1.5}, "--score-threshold must be from 0 to 1, not 1.5"),
        ({"max_detections": 0}, "--max-detections must be 1 or more, not 0"),
    ],
)
def test_values_out_of_range_are_bad_arguments(
    option: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=words):
        InitConfig(arch="small", weights="random", output="x", **option)
    ((name, value),) = option.items()
    flag = f"--{name.replace('_', '-')}={value}"
    with pytest.raises(SystemExit) as caught:
        main(["init", "--arch", "small", "--weights", "random", "--output", "x", flag])
    assert caught.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_an_unknown_architecture_is_a_bad_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["init", "--arch", "yolo", "--weights", "random", "--output", "x"])
    assert caught.value.code == 2
    assert "maskrcnn_resnet50_fpn_v2" in capsys.readouterr().err


def test_coco_weights_come_with_their_categories(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    state = {
        name: torch.full(tensor.shape, 0.5)
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    publish(monkeypatch, state)
    made = make(output, arch="maskrcnn_resnet50_fpn", weights="coco", min_size=None, max_size=None)
    assert made.settings == ModelSettings(
        arch="maskrcnn_resnet50_fpn",
        num_classes=91,
        min_size=800,
        max_size=1333,
        norm="frozen",
        norm_eps=0.0,
    )
    assert len(made.categories) == 80
    assert made.by_label()[90].name == "toothbrush"
    assert made.score_threshold == 0.05


def test_coco_weights_are_refused_with_other_categories(output: Path, listed: str) -> None:
    said = refused(output, arch="maskrcnn_resnet50_fpn", weights="coco", categories=listed)
    assert said.startswith("--weights coco comes with COCO's categories: leave --categories out")


def test_coco_weights_of_the_small_one_do_not_exist(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--arch", "small", "--weights", "coco", "--output", str(output)]
    assert main(["init", *arguments]) == 1
    said = capsys.readouterr().err
    assert "segjobs init: torchvision publishes no COCO weights for small" in said
    assert "--arch maskrcnn_resnet50_fpn" in said
    assert not output.exists()


def test_imagenet_weights_are_the_backbone(
    output: Path, listed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        shapes = mobilenet_v3_large(weights=None).state_dict()
    publish(monkeypatch, {name: torch.full(t.shape, 0.25) for name, t in shapes.items()})
    made = make(output, weights="imagenet", categories=listed, seed=3)
    heads = initial.random_bundle(SETTINGS, CATEGORIES, seed=3).weights
    for name, tensor in made.weights.items():
        if name.startswith("backbone.body."):
            assert (tensor == 0.25).all() or name.endswith("num_batches_tracked")
        else:
            assert torch.equal(tensor, heads[name])
    assert made.settings == replace(SETTINGS, norm_eps=1e-3)
    assert made.provenance["backbone"] == "MobileNet_V3_Large_Weights.IMAGENET1K_V2"


def test_weights_of_a_file_stay_as_they_are(output: Path, listed: str, weights: str) -> None:
    made = make(output, weights=weights, categories=listed)
    expected = initial.random_bundle(SETTINGS, CATEGORIES, seed=8)
    assert made.digest == expected.digest
    assert made.provenance == {"weights": weights}


def test_weights_of_a_safetensors_file(output: Path, listed: str, tmp_path: Path) -> None:
    state = dict(initial.random_bundle(SETTINGS, CATEGORIES, seed=8).weights)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, path)
    made = make(output, weights=str(path), categories=listed)
    assert made.digest == initial.random_bundle(SETTINGS, CATEGORIES, seed=8).digest


@pytest.mark.parametrize(("frozen", "norm"), [(True, "frozen"), (False, "batch")])
def test_the_norm_of_a_file_is_recognised(
    output: Path, listed: str, tmp_path: Path, frozen: bool, norm: Any
) -> None:
    state = dict(initial.random_bundle(replace(SETTINGS, norm=norm), CATEGORIES, seed=8).weights)
    torch.save(state, tmp_path / "norm.pth")
    made = make(
        output,
        weights=str(tmp_path / "norm.pth"),
        categories=listed,
        norm_eps=0.0 if frozen else 1e-3,
    )
    assert (made.settings.norm, made.settings.norm_eps) == (norm, 0.0 if frozen else 1e-3)


def test_a_file_needs_its_categories(output: Path, weights: str) -> None:
    said = refused(output, weights=weights)
    assert said == f"--weights {weights} needs --categories FILE with 2 categories"


@pytest.mark.parametrize("names", [["bird"], ["bird", "crab", "dog"]])
def test_a_file_of_another_number_of_classes_is_refused(
    output: Path, tmp_path: Path, weights: str, names: Sequence[str]
) -> None:
    path = tmp_path / "others.json"
    path.write_text(json.dumps([{"id": n, "name": name} for n, name in enumerate(names)]))
    said = refused(output, weights=weights, categories=str(path))
    assert said.startswith(
        f"--weights {weights} has 3 outputs (background included), so it wants 2 categories, "
        f"not the {len(names)} of {path}: "
    )


def test_a_file_with_outputs_of_no_category_takes_labels(
    output: Path, tmp_path: Path, weights: str
) -> None:
    """As torchvision's COCO file of 91 outputs: the labels of 80 are COCO's ids."""
    path = tmp_path / "labels.json"
    path.write_text('[{"id": 18, "name": "dog", "label": 2}]')
    made = make(output, weights=weights, categories=str(path))
    assert made.settings.num_classes == 3
    assert made.categories == (Category(id=18, name="dog", label=2),)


def test_a_file_of_another_architecture_is_refused(output: Path, listed: str, weights: str) -> None:
    said = refused(output, arch="maskrcnn_resnet50_fpn", weights=weights, categories=listed)
    assert f"{weights} does not fit maskrcnn_resnet50_fpn with 3 classes" in said


def test_a_missing_weights_file_is_named(
    output: Path, listed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "none.pth")
    arguments = ["--arch", "small", "--weights", missing, "--output", str(output)]
    assert main(["init", *arguments, "--categories", listed]) == 1
    assert "none.pth does not exist" in capsys.readouterr().err


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_code_in_a_weights_file_is_not_run(output: Path, listed: str, tmp_path: Path) -> None:
    target = tmp_path / "was run"
    torch.save({"a": torch.zeros(1), "b": Payload(target)}, tmp_path / "evil.pth")
    said = refused(output, weights=str(tmp_path / "evil.pth"), categories=listed)
    assert "evil.pth holds more than plain tensors" in said
    assert not target.exists()


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def get_state_dict(_weights: WeightsEnum, **_options: Any) -> State:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    arguments = ["--arch", "maskrcnn_resnet50_fpn", "--weights", "coco", "--output", str(tmp_path)]
    assert main(["init", *arguments]) == 1
    error = capsys.readouterr().err
    assert "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth cannot be downloaded" in error
    assert "/checkpoints" in error
