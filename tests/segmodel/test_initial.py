"""First weights: by seed, torchvision's, and from files of strangers."""

import pickle
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, mobilenet_v3_large, resnet50
from torchvision.models.detection import (
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)

from segmodel.bundle import Bundle, load, save
from segmodel.inference import Image, Predictor
from segmodel.initial import (
    WeightsError,
    classes_in,
    coco_bundle,
    has_frozen_norm,
    imagenet_bundle,
    numbered_categories,
    random_bundle,
    read_state,
    state_bundle,
    with_categories,
)
from segmodel.model import mask_rcnn
from segmodel.schema import Category
from segmodel.settings import ARCHITECTURES, Architecture, ModelSettings

State = dict[str, Tensor]
MakeBundle = Callable[..., Bundle]
MakeImage = Callable[..., Image]

CATEGORIES = numbered_categories([(7, "bird"), (3, "crab")])


def settings(arch: Architecture = "small", **changes: Any) -> ModelSettings:
    return ModelSettings(
        **{"arch": arch, "num_classes": 3, "min_size": 64, "max_size": 96, **changes}
    )


@pytest.fixture(scope="module")
def plain() -> State:
    return dict(random_bundle(settings(), CATEGORIES, seed=0).weights)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[WeightsEnum, State]]:
    """What torchvision "publishes": put a state here, and it is downloaded from nowhere."""
    states: dict[WeightsEnum, State] = {}

    def get_state_dict(weights: WeightsEnum, **options: Any) -> State:
        assert options.get("check_hash") is True
        return OrderedDict(states[weights])

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    return states


def noise_like(model: nn.Module, seed: int = 0) -> State:
    """Return a state of the model's shapes in which no two values are expected to be equal."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(tensor.shape, generator=generator) + 0.5
        if tensor.is_floating_point()
        else torch.tensor(9)
        for name, tensor in model.state_dict().items()
    }


def without_counters(state: Mapping[str, Tensor]) -> State:
    return {
        name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }


def old_names(state: Mapping[str, Tensor]) -> State:
    """Return a state with the names of the year in which the first COCO weights were published."""
    renamed = {}
    for name, tensor in state.items():
        old = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for n in range(4):
            old = old.replace(f"inner_blocks.{n}.0.", f"inner_blocks.{n}.")
            old = old.replace(f"layer_blocks.{n}.0.", f"layer_blocks.{n}.")
            old = old.replace(f"mask_head.{n}.0.", f"mask_head.mask_fcn{n + 1}.")
        renamed[old] = tensor
    return renamed


# By seed.


@pytest.mark.parametrize("arch", ["small", "maskrcnn_resnet50_fpn_v2"])
def test_the_seed_decides_the_weights(arch: Architecture) -> None:
    first, again, other = (
        random_bundle(settings(arch), CATEGORIES, seed=seed) for seed in (3, 3, 4)
    )
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert first.provenance == {"weights": "random", "seed": 3}


def test_global_generators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def seed_gpus(_seed: int) -> None:
        raise AssertionError("the GPUs' generators are the caller's")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_gpus)
    torch_before, python_before = torch.random.get_rng_state(), random.getstate()
    first = random_bundle(settings(), CATEGORIES, seed=3)
    torch.rand(5)
    assert random_bundle(settings(), CATEGORIES, seed=3).digest == first.digest
    torch.random.set_rng_state(torch_before)
    state_bundle(first.weights, settings(), CATEGORIES, "x")
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert random.getstate() == python_before


def test_categories_are_labelled_in_their_order() -> None:
    assert numbered_categories([(9, "a"), (2, "b")]) == (
        Category(id=9, name="a", label=1),
        Category(id=2, name="b", label=2),
    )


# torchvision's COCO weights.


def test_coco_agrees_with_the_way_torchvision_builds_it(
    published: dict[WeightsEnum, State],
    lively: MakeBundle,
    image: MakeImage,
) -> None:
    """With the names of the published file, which torchvision and `coco_bundle` both rename."""
    weights = MaskRCNN_ResNet50_FPN_Weights.COCO_V1
    state = with_91_outputs(without_counters(lively("maskrcnn_resnet50_fpn", 4, 32, 64).weights))
    published[weights] = old_names(state)
    # The real thing: FrozenBatchNorm, 91 classes, an epsilon of 0.
    theirs = maskrcnn_resnet50_fpn(
        weights=weights, progress=False, min_size=32, max_size=64, box_score_thresh=0.05
    ).eval()
    made = coco_bundle("maskrcnn_resnet50_fpn", 32, 64)
    pixels = image(64, 96)
    ours = Predictor(made, "cpu", "fp32").predict([pixels])[0]
    with torch.inference_mode():
        found = theirs([torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255)])[0]
    assert len(ours) >= 50
    assert np.array_equal(ours.boxes_xyxy, found["boxes"].numpy())
    assert np.array_equal(ours.scores, found["scores"].numpy())
    assert np.array_equal(ours.labels, found["labels"].numpy())
    assert len(set(ours.labels.tolist())) > 3


def with_91_outputs(state: State) -> State:
    """Repeat the heads' outputs until they are 91, background first."""
    repeated = dict(state)
    for name, per_class in [
        ("roi_heads.box_predictor.cls_score", 1),
        ("roi_heads.box_predictor.bbox_pred", 4),
        ("roi_heads.mask_predictor.mask_fcn_logits", 1),
    ]:
        for kind in ("weight", "bias"):
            tensor = state[f"{name}.{kind}"]
            of_class = tensor.reshape(4, per_class, *tensor.shape[1:])
            picked = of_class[[0, *(1 + n % 3 for n in range(90))]]
            # Not all classes alike: some win, the others stay below the threshold.
            if name.endswith("cls_score") and kind == "bias":
                picked = (
                    picked - torch.tensor([0.0] + [4.0 * (n % 18 != 0) for n in range(90)])[:, None]
                )
            repeated[f"{name}.{kind}"] = picked.reshape(-1, *tensor.shape[1:])
    return repeated


@pytest.mark.parametrize(
    ("arch", "weights", "build", "norm", "norm_eps"),
    [
        (
            "maskrcnn_resnet50_fpn",
            MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
            maskrcnn_resnet50_fpn,
            "frozen",
            0.0,
        ),
        (
            "maskrcnn_resnet50_fpn_v2",
            MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
            maskrcnn_resnet50_fpn_v2,
            "batch",
            1e-5,
        ),
    ],
)
def test_coco_bundles_hold_what_is_published(
    published: dict[WeightsEnum, State],
    tmp_path: Path,
    arch: Architecture,
    weights: WeightsEnum,
    build: Any,
    norm: str,
    norm_eps: float,
) -> None:
    with torch.device("meta"):
        model = build(weights=None, weights_backbone=None, num_classes=91)
    state = noise_like(model)
    published[weights] = without_counters(state) if norm == "frozen" else state
    made = coco_bundle(arch, 800, 1333)
    assert made.weights.keys() == published[weights].keys()
    assert all(torch.equal(made.weights[name], state[name]) for name in made.weights)
    assert (made.settings.norm, made.settings.norm_eps) == (norm, norm_eps)
    assert made.settings.num_classes == 91
    assert len(made.categories) == 80
    assert all(category.id == category.label for category in made.categories)
    by_label = made.by_label()
    assert (by_label[1].name, by_label[13].name, by_label[90].name) == (
        "person",
        "stop sign",
        "toothbrush",
    )
    assert {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}.isdisjoint(by_label)
    assert made.provenance["weights"] == str(weights)
    assert made.provenance["url"].startswith("https://")
    save(tmp_path, made)
    assert load(tmp_path).metrics == made.metrics != {}


def test_there_are_no_coco_weights_for_the_small_one() -> None:
    with pytest.raises(WeightsError, match=r"no COCO weights for small: use random or imagenet"):
        coco_bundle("small", 320, 640)


# torchvision's ImageNet backbones.


@pytest.mark.parametrize(
    ("arch", "counted"),
    [
        ("small", True),
        ("small", False),
        ("maskrcnn_resnet50_fpn", False),
        ("maskrcnn_resnet50_fpn_v2", True),
    ],
)
def test_imagenet_bodies_compute_what_torchvisions_classifier_computes(
    published: dict[WeightsEnum, State], arch: Architecture, counted: bool
) -> None:
    from segmodel.initial import _BACKBONE_WEIGHTS

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        classifier = (mobilenet_v3_large if arch == "small" else resnet50)(weights=None).eval()
        # Small enough for an epsilon of another size to be seen, large enough for finite results.
        low, high = (0.001, 0.1) if arch == "small" else (0.5, 2)
        for name, buffer in classifier.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(low, high)
        pixels = torch.rand(1, 3, 64, 64)
    state = dict(classifier.state_dict())
    published[_BACKBONE_WEIGHTS[arch]] = state if counted else without_counters(state)
    made = imagenet_bundle(settings(arch), CATEGORIES, seed=2)

    model = mask_rcnn(made.settings).eval()
    model.load_state_dict(dict(made.weights))
    with torch.inference_mode():
        found = list(model.backbone.body(pixels).values())
        expected = _stages(classifier, pixels)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.isfinite().all()


def _stages(classifier: nn.Module, pixels: Tensor) -> list[Tensor]:
    if hasattr(classifier, "features"):
        found = []
        for number, block in enumerate(classifier.features):
            pixels = block(pixels)
            if number in (3, 6, 12, 14):
                found.append(pixels)
        return found
    found = []
    for layer in (
        nn.Sequential(
            classifier.conv1, classifier.bn1, classifier.relu, classifier.maxpool, classifier.layer1
        ),
        classifier.layer2,
        classifier.layer3,
        classifier.layer4,
    ):
        pixels = layer(pixels)
        found.append(pixels)
    return found


def test_imagenet_heads_are_random_by_seed(published: dict[WeightsEnum, State]) -> None:
    from segmodel.initial import _BACKBONE_WEIGHTS

    published[_BACKBONE_WEIGHTS["small"]] = noise_like(mobilenet_v3_large(weights=None))
    made, again, other = (imagenet_bundle(settings(), CATEGORIES, seed=seed) for seed in (1, 1, 2))
    body = {name for name in made.weights if name.startswith("backbone.body.")}
    assert made.digest == again.digest != other.digest
    expected = random_bundle(settings(), CATEGORIES, seed=1).weights
    for name, tensor in made.weights.items():
        same_as_other = torch.equal(tensor, other.weights[name])
        assert torch.equal(tensor, expected[name]) == (name not in body), name
        assert same_as_other or name not in body
    assert made.provenance["heads"] == "random"


def test_an_imagenet_backbone_that_lacks_tensors_is_refused(
    published: dict[WeightsEnum, State],
) -> None:
    from segmodel.initial import _BACKBONE_WEIGHTS

    state = noise_like(mobilenet_v3_large(weights=None))
    del state["features.3.block.0.0.weight"]
    published[_BACKBONE_WEIGHTS["small"]] = state
    with pytest.raises(
        WeightsError, match=r"lacks 1 tensors, for example backbone\.body\.3\.block\.0\.0\.weight"
    ):
        imagenet_bundle(settings(), CATEGORIES, seed=0)


# Files.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: OrderedDict(state),
        lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}},
        lambda state: {"state_dict": state, "name": "ours"},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"module.{name}": t for name, t in state.items()}},
        lambda state: {
            name: nn.Parameter(t) if t.is_floating_point() else t for name, t in state.items()
        },
    ],
    ids=["plain", "ordered", "model", "state_dict", "nested", "module.", "both", "parameters"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoints_of_torch_are_read(
    tmp_path: Path, plain: State, wrap: Callable[[State], Any], zipped: bool
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(wrap(plain), path, _use_new_zipfile_serialization=zipped)
    state = read_state(path, "weights.pth")
    assert state_bundle(state, settings(), CATEGORIES, "x").digest == digest_of(plain)


def digest_of(state: State) -> str:
    return Bundle(settings=settings(), categories=CATEGORIES, weights=state).digest


def test_safetensors_are_read(tmp_path: Path, plain: State) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(plain, path)
    assert digest_of(read_state(path, "x")) == digest_of(plain)


def test_names_of_older_torchvisions_are_read(plain: State) -> None:
    assert old_names(plain).keys() != plain.keys()
    made = state_bundle(old_names(plain), settings(), CATEGORIES, "x")
    assert made.digest == digest_of(plain)


def test_a_state_of_half_precision_stays_so_and_runs(plain: State, image: MakeImage) -> None:
    half = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in plain.items()
    }
    made = state_bundle(half, settings(), CATEGORIES, "x")
    full = {name: t.float() if t.is_floating_point() else t for name, t in half.items()}
    expected = state_bundle(full, settings(), CATEGORIES, "x")
    assert made.digest != expected.digest
    found, reference = (
        Predictor(bundle, "cpu").predict([image(64, 64)])[0] for bundle in (made, expected)
    )
    assert np.array_equal(found.boxes_xyxy, reference.boxes_xyxy)
    assert len(found) > 0


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_code_in_a_file_is_refused_and_never_run(
    tmp_path: Path, plain: State, zipped: bool | None, name: str
) -> None:
    target, path = tmp_path / "was run", tmp_path / name
    content = {"model": dict(list(plain.items())[:2]), "extra": Payload(target)}
    if zipped is None:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError) as caught:
        read_state(path, "s3://bucket/weights")
    assert not target.exists()
    assert str(caught.value).startswith("s3://bucket/weights ")
    # torch's own message says how to run the code all the same.
    assert "weights_only" not in str(caught.value)
    pickle.loads(pickle.dumps(Payload(target)))
    assert target.exists()


def test_whole_modules_are_refused_in_words(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(
        WeightsError,
        match=r"^x holds more than plain tensors \(torch\.nn\.modules\.linear\.Linear\), and code "
        r"from a file is never run: save it by torch\.save\(model\.state_dict\(\), FILE\)$",
    ):
        read_state(tmp_path / "model.pth", "x")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_refused(tmp_path: Path, plain: State, name: str, zipped: bool) -> None:
    path = tmp_path / name
    few = dict(list(plain.items())[:5])
    if name.endswith("pth"):
        torch.save(few, path, _use_new_zipfile_serialization=zipped)
    else:
        safetensors.torch.save_file(few, path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        # The name of a function may be cut too, and is then an unknown one.
        with pytest.raises(WeightsError, match=r"^x (cannot be read as weights|holds more than)"):
            read_state(path, "x")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    """Bytes flipped at random: sometimes only a value changes, else it is a WeightsError."""
    rng = random.Random(0)
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 3)}, path)
    zipped = path.read_bytes()
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    read = refused = 0
    for number in range(800):
        data = bytearray((zipped, legacy)[number % 2])
        for _ in range(rng.choice([1, 3, 10])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_state(path, "x")
            read += 1
        except WeightsError:
            refused += 1
    assert read > 25
    assert refused > 250


@pytest.mark.parametrize(
    "data",
    [b"", b"hello world\n", b"<!DOCTYPE html>", b"PK\x03\x04", b"version https://git-lfs"],
)
def test_other_files_are_refused_without_advice_to_run_them(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(WeightsError, match=r"^x cannot be read as weights") as caught:
        read_state(tmp_path / "weights.pth", "x")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {"epoch": 1}, {"model": {"a": torch.zeros(1), "b": "text"}}]
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="x is not a state dict: it should map names to tensors"):
        read_state(tmp_path / "weights.pth", "x")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x cannot be read as weights.*No such file"):
        read_state(tmp_path / "none.pth", "x")


# States that do not fit.


def test_other_shapes_are_said_in_words(plain: State) -> None:
    state = dict(plain)
    state["rpn.head.bbox_pred.bias"] = torch.zeros(5)
    del state["rpn.head.cls_logits.bias"]
    state["head.extra"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        state_bundle(state, settings(), CATEGORIES, "weights.pth")
    assert str(caught.value) == (
        "weights.pth does not fit small with 3 classes (background included): "
        "rpn.head.cls_logits.bias is missing; head.extra is not part of this architecture; "
        "rpn.head.bbox_pred.bias has shape (5,), but (12,) is needed"
    )


def test_another_number_of_classes_is_said_in_words(plain: State) -> None:
    assert classes_in(plain) == 3
    with pytest.raises(
        WeightsError, match=r"cls_score\.weight has shape \(3, 192\), but \(5, 192\) is needed"
    ):
        state_bundle(plain, settings(num_classes=5), CATEGORIES, "x")


def test_another_architecture_is_said_in_words_and_not_at_length(plain: State) -> None:
    with pytest.raises(WeightsError, match=r"does not fit maskrcnn_resnet50_fpn .* and \d+ more$"):
        state_bundle(plain, settings("maskrcnn_resnet50_fpn"), CATEGORIES, "x")


def test_an_unknown_state_has_no_classes() -> None:
    assert classes_in({}) is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_the_norm_of_the_backbone_is_recognised_and_fits(arch: Architecture, norm: Any) -> None:
    with torch.device("meta"):
        model = mask_rcnn(settings(arch, norm=norm))
    state = noise_like(model)
    assert has_frozen_norm(state) == (norm == "frozen")
    made = state_bundle(state, settings(arch, norm=norm), CATEGORIES, "x")
    assert made.weights.keys() == state.keys()


def test_counters_have_no_place_in_a_frozen_backbone(plain: State) -> None:
    made = state_bundle(plain, settings(norm="frozen"), CATEGORIES, "x")
    assert made.weights.keys() == without_counters(plain).keys()
    assert len(made.weights) < len(plain)


def test_other_categories_keep_what_both_have_by_name() -> None:
    old = random_bundle(
        settings(num_classes=4), numbered_categories([(1, "ant"), (2, "bee"), (3, "cow")]), 0
    )
    categories = numbered_categories([(7, "cow"), (9, "dog"), (11, "ant")])
    made, kept = with_categories(old, categories, seed=1)
    assert kept == ("cow", "ant")
    assert [(c.id, c.label) for c in made.categories] == [(7, 1), (9, 2), (11, 3)]
    labels = {0: 0, 1: 3, 3: 1}  # new -> old: background, cow, ant
    for name, tensor in old.weights.items():
        layer = name.rpartition(".")[0]
        each = None
        if name.startswith("roi_heads."):
            each = {"cls_score": 1, "bbox_pred": 4, "mask_fcn_logits": 1}.get(layer.split(".")[-1])
        if each is None:
            assert torch.equal(made.weights[name], tensor), name
            continue
        for new_label, old_label in labels.items():
            new_rows = slice(each * new_label, each * (new_label + 1))
            old_rows = slice(each * old_label, each * (old_label + 1))
            assert torch.equal(made.weights[name][new_rows], tensor[old_rows]), name
        if name.endswith("weight"):
            dog = slice(2 * each, 3 * each)
            assert not torch.equal(made.weights[name][dog], tensor[dog])
    again, _ = with_categories(old, categories, seed=1)
    assert again.digest == made.digest


def test_categories_with_nothing_in_common_make_new_heads_of_their_own_size() -> None:
    old = random_bundle(settings(num_classes=2), numbered_categories([(1, "ant")]), 0)
    made, kept = with_categories(old, numbered_categories([(1, "x"), (2, "y")]), 0)
    assert kept == ()
    assert made.settings.num_classes == 3
