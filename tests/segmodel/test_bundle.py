"""Model bundles: what is written is what is read, and nothing else is taken for a bundle."""

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from segmodel.bundle import CARD, DESCRIPTION, WEIGHTS, Bundle, BundleError, load, parse, save
from segmodel.initial import numbered_categories, random_bundle
from segmodel.schema import Category
from segmodel.settings import ARCHITECTURES, Architecture, ModelSettings

Folder = Path
CATEGORIES = numbered_categories([(7, "bird"), (3, "ängstliche crab")])
SETTINGS = ModelSettings(arch="small", num_classes=3, min_size=64, max_size=96)


@pytest.fixture(scope="module")
def small() -> Bundle:
    return replace(
        random_bundle(SETTINGS, CATEGORIES, seed=0),
        score_threshold=0.3,
        max_detections=20,
        provenance={"weights": "random", "seed": 0},
        metrics={"val": {"box AP": 0.25, "box APl": -1.0}},
        digest="",
    )


@pytest.fixture
def folder(tmp_path: Path, small: Bundle) -> Folder:
    save(tmp_path / "made" / "bundle", small)
    return tmp_path / "made" / "bundle"


def assert_same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def change_description(folder: Folder, change: Callable[[Any], object]) -> None:
    fields = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    change(fields)
    (folder / DESCRIPTION).write_text(json.dumps(fields), encoding="utf-8")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_saved_is_loaded(tmp_path: Path, arch: Architecture) -> None:
    made = random_bundle(replace(SETTINGS, arch=arch, norm="frozen"), CATEGORIES, seed=1)
    save(tmp_path, made)
    read = load(tmp_path)
    assert_same_weights(read.weights, made.weights)
    for name in ("settings", "categories", "score_threshold", "max_detections", "digest"):
        assert getattr(read, name) == getattr(made, name)


def test_free_text_and_numbers_are_loaded_too(folder: Folder, small: Bundle) -> None:
    read = load(str(folder))
    assert read.provenance == small.provenance
    assert read.metrics == small.metrics
    assert read.by_label() == {1: CATEGORIES[0], 2: CATEGORIES[1]}


def test_saving_again_replaces_all(folder: Folder, small: Bundle) -> None:
    other = random_bundle(SETTINGS, CATEGORIES[:1], seed=5)
    save(folder, other)
    read = load(folder)
    assert read.digest == other.digest != small.digest
    assert read.metrics == {}
    assert "box AP" not in (folder / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize("num_categories", [1, 90])
def test_a_small_bundle_has_16_megabytes_at_most(tmp_path: Path, num_categories: int) -> None:
    categories = numbered_categories([(n, f"category {n}") for n in range(num_categories)])
    settings = replace(SETTINGS, num_classes=num_categories + 1)
    save(tmp_path, random_bundle(settings, categories, seed=0))
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 14e6 < size <= 16e6


@pytest.mark.parametrize(
    "weights",
    [
        {"half": torch.tensor([1.5, -2.5], dtype=torch.bfloat16)},
        {"none": torch.tensor(7)},
        {"empty": torch.zeros(0, 3)},
        {"flag": torch.tensor([True, False])},
        {"turned": torch.arange(6.0).reshape(2, 3).T},
        {"part": torch.arange(100.0)[10:20]},
    ],
    ids=lambda weights: next(iter(weights)),
)
def test_tensors_of_every_kind_survive(tmp_path: Path, small: Bundle, weights: Any) -> None:
    made = replace(small, weights=weights, digest="")
    save(tmp_path, made)
    read = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert_same_weights(read, weights)
    assert replace(made, weights=read, digest="").digest == made.digest


def test_the_digest_is_of_all_that_results_depend_on(small: Bundle) -> None:
    """Spelled out once: a digest written by one version is checked by the next."""
    head = {
        "settings": {
            "arch": "small",
            "num_classes": 3,
            "min_size": 64,
            "max_size": 96,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "norm": "batch",
            "norm_eps": 1e-5,
        },
        "categories": [
            {"id": 7, "name": "bird", "label": 1},
            {"id": 3, "name": "ängstliche crab", "label": 2},
        ],
        "score_threshold": 0.3,
        "max_detections": 20,
    }
    expected = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    expected.update(b"w torch.float32 (2, 1)" + bytes.fromhex("0000803f00000040"))
    bundle = replace(small, weights={"w": torch.tensor([[1.0], [2.0]])}, digest="")
    assert bundle.digest == expected.hexdigest()


def test_the_digest_changes_with_every_tensor(small: Bundle) -> None:
    weights = {name: tensor[:3].clone() for name, tensor in small.weights.items() if tensor.dim()}
    few = replace(small, weights=weights, digest="")
    digests = {few.digest}
    for name, tensor in weights.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        digests.add(replace(few, weights={**weights, name: changed}, digest="").digest)
    digests.add(replace(few, weights=dict(list(weights.items())[1:]), digest="").digest)
    first, second, *_ = weights
    renamed = {("other" if name == first else name): t for name, t in weights.items()}
    digests.add(replace(few, weights=renamed, digest="").digest)
    assert len(digests) == 3 + len(weights)
    assert second in weights
    reordered = dict(reversed(weights.items()))
    assert replace(few, weights=reordered, digest="").digest == few.digest


@pytest.mark.parametrize(
    "change",
    [
        {"score_threshold": 0.31},
        {"max_detections": 21},
        {"categories": (CATEGORIES[0], replace(CATEGORIES[1], name="crab"))},
        {"categories": (CATEGORIES[0], replace(CATEGORIES[1], id=4))},
        {"categories": CATEGORIES[:1]},
        {"settings": replace(SETTINGS, min_size=65)},
        {"settings": replace(SETTINGS, norm_eps=0.0)},
        {"settings": replace(SETTINGS, norm="frozen")},
        {"settings": replace(SETTINGS, image_mean=(0.5, 0.456, 0.406))},
    ],
)
def test_the_digest_changes_with(small: Bundle, change: dict[str, Any]) -> None:
    assert replace(small, **change, digest="").digest != small.digest


def test_the_digest_stays_with_metrics_and_provenance(small: Bundle) -> None:
    other = replace(small, metrics={"AP": 1}, provenance={"by": "us"}, digest="")
    assert other.digest == small.digest


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS])
def test_a_missing_file_is_named(folder: Folder, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(
        BundleError, match=f"is not a model bundle: it has no {name}. Make one with"
    ):
        load(folder)


def test_no_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere is not a model bundle: it has no model\.json"):
        load(tmp_path / "nowhere")


def test_the_model_card_is_not_needed(folder: Folder, small: Bundle) -> None:
    (folder / CARD).unlink()
    assert load(folder).digest == small.digest


def test_one_flipped_bit_of_the_weights_is_found(folder: Folder) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1000] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(
        BundleError, match=r"bundle was changed after it was written: its digest is \w{12}, model"
    ):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(score_threshold=0.5),
        lambda fields: fields["categories"][0].update(name="dog"),
        lambda fields: fields["settings"].update(norm_eps=0.0),
        lambda fields: fields.update(digest="0" * 64),
        lambda fields: fields.pop("digest"),
    ],
)
def test_a_changed_description_is_found(folder: Folder, change: Callable[[Any], object]) -> None:
    change_description(folder, change)
    with pytest.raises(BundleError, match="was changed after it was written"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.pop("settings"), "is damaged: KeyError: 'settings'"),
        (lambda fields: fields.update(settings=[]), "is damaged: TypeError"),
        (lambda fields: fields["settings"].update(colour=1), "is damaged: TypeError: .*'colour'"),
        (
            lambda fields: fields["settings"].update(arch="x"),
            "ValueError: unknown architecture 'x'",
        ),
        (lambda fields: fields["settings"].pop("image_std"), "KeyError: 'image_std'"),
        (lambda fields: fields.update(categories=[1]), "is damaged: TypeError"),
        (lambda fields: fields.update(categories=[]), "a model needs at least one category"),
        (lambda fields: fields["categories"][0].update(label="1"), "is damaged: TypeError"),
    ],
)
def test_a_damaged_description_is_refused_in_words(
    folder: Folder, change: Callable[[Any], object], message: str
) -> None:
    change_description(folder, change)
    with pytest.raises(BundleError, match=message):
        load(folder)


@pytest.mark.parametrize("description", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"text"'])
def test_what_is_no_description_is_refused(description: bytes) -> None:
    with pytest.raises(BundleError, match=r"^the bundle is damaged: "):
        parse(description, b"")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_weights_are_refused(folder: Folder, length: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    with pytest.raises(BundleError, match="is damaged: SafetensorError"):
        load(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused_before_the_weights_are_read(
    folder: Folder, version: Any
) -> None:
    change_description(folder, lambda fields: fields.update(format_version=version))
    (folder / WEIGHTS).write_bytes(b"what a later version writes")
    with pytest.raises(
        BundleError, match=f"has format version {version}, this program reads 1: use a segjobs"
    ):
        load(folder)


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
@pytest.mark.parametrize("dump", ["pickle", "torch"])
def test_a_pickle_is_refused_and_never_run(folder: Folder, name: str, dump: str) -> None:
    target = folder / "was run"
    if dump == "pickle":
        (folder / name).write_bytes(pickle.dumps(_Payload(target)))
    else:
        torch.save({"w": _Payload(target)}, folder / name)
    with pytest.raises(BundleError, match="is damaged"):
        load(folder)
    assert not target.exists()
    # The payload is real: unpickled, it makes the file.
    pickle.loads(pickle.dumps(_Payload(target)))
    assert target.exists()


def test_weights_of_another_network_are_refused_in_words(tmp_path: Path, small: Bundle) -> None:
    weights = dict(small.weights)
    weights["rpn.head.cls_logits.bias"] = torch.zeros(5)
    del weights["rpn.head.bbox_pred.bias"]
    save(tmp_path, replace(small, weights=weights, digest=""))
    with pytest.raises(
        BundleError,
        match=r"weights and architecture do not fit: rpn\.head\.bbox_pred\.bias is missing; "
        r"rpn\.head\.cls_logits\.bias has shape \(5,\), but \(3,\) is needed",
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ((), "a model needs at least one category"),
        (((1, "a", 1), (1, "b", 2)), "two categories have the same id: 1"),
        (((1, "a", 1), (2, "a", 2)), "two categories have the same name: a"),
        (((1, "a", 1), (2, "b", 1)), "two categories have the same label: 1"),
        (((1, "a", 0),), "category 'a' has label 0, but the network has the labels 1 to 2"),
        (((1, "a", 3),), "category 'a' has label 3, but the network has the labels 1 to 2"),
        (((2**31, "a", 1),), "category 'a' has id 2147483648, which does not fit into 32 bits"),
    ],
)
def test_categories_that_cannot_be_are_refused(
    small: Bundle, categories: tuple[tuple[int, str, int], ...], message: str
) -> None:
    given = tuple(Category(id=id_, name=name, label=label) for id_, name, label in categories)
    with pytest.raises(BundleError, match=message):
        replace(small, categories=given, digest="")


def test_labels_and_ids_may_have_gaps(small: Bundle) -> None:
    given = (Category(id=2**31 - 1, name="a", label=2),)
    assert replace(small, categories=given, digest="").by_label() == {2: given[0]}


def test_loading_draws_no_random_number(folder: Folder) -> None:
    before = torch.random.get_rng_state()
    load(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_model_card_says_what_it_is(folder: Folder, small: Bundle) -> None:
    card = (folder / CARD).read_text(encoding="utf-8")
    lines = card.splitlines()
    assert lines[0] == "# small: instance segmentation of 2 categories"
    assert f"- Mask R-CNN, 3.8 million weights, digest `{small.digest[:12]}`" in lines
    assert "- Input: shorter side 64 pixels, longer side at most 96" in lines
    assert "- Score threshold 0.3, at most 20 detections" in lines
    assert "- Categories: bird, ängstliche crab" in lines
    assert "- seed: 0" in lines
    at = lines.index("- val:")
    assert lines[at + 1 : at + 3] == [
        "  - box AP: 0.25",
        "  - box APl: there is no truth of that kind",
    ]
    save(folder, replace(small, metrics={}))
    assert "None measured yet." in (folder / CARD).read_text(encoding="utf-8")
