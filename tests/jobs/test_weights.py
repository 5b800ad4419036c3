"""Model bundles at any URI."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.weights import load_bundle, save_bundle
from segmodel import bundle as bundles
from segmodel.bundle import Bundle, BundleError
from segmodel.initial import numbered_categories, random_bundle
from segmodel.settings import ModelSettings


@pytest.fixture(scope="module")
def small() -> Bundle:
    settings = ModelSettings(arch="small", num_classes=2, min_size=64, max_size=96)
    return random_bundle(settings, numbered_categories([(1, "bird")]), seed=0)


def assert_same(found: Bundle, expected: Bundle) -> None:
    assert found.digest == expected.digest
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor), name


def test_what_is_saved_at_s3_is_loaded(bucket: Any, small: Bundle) -> None:
    uri = f"{bucket.uri}/models/a b#1"
    save_bundle(uri, small, bucket.endpoint_url)
    assert_same(load_bundle(uri, bucket.endpoint_url), small)
    names = {info.path for info in bucket.store("models/a b#1").list_objects()}
    assert names == {bundles.WEIGHTS, bundles.DESCRIPTION, bundles.CARD}


def test_what_is_saved_in_a_folder_is_what_segmodel_loads(tmp_path: Path, small: Bundle) -> None:
    save_bundle(str(tmp_path / "new" / "bundle"), small, None)
    assert_same(bundles.load(tmp_path / "new" / "bundle"), small)
    assert_same(load_bundle(f"file://{tmp_path}/new/bundle", None), small)


def test_saving_again_replaces(tmp_path: Path, small: Bundle) -> None:
    other = replace(small, max_detections=7, digest="")
    for one in (small, other):
        save_bundle(str(tmp_path), one, None)
        assert load_bundle(str(tmp_path), None).digest == one.digest


def test_a_write_that_breaks_off_leaves_no_bundle(
    tmp_path: Path, small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever put fails: a bundle is whole or refused, a new one and one over an old one."""
    from jobs.storage import ArrowStore

    put, left = ArrowStore.put, 0

    def put_some(store: ArrowStore, path: str, data: bytes) -> Any:
        nonlocal left
        if left == 0:
            raise OSError("the network is gone")
        left -= 1
        return put(store, path, data)

    other = replace(random_bundle(small.settings, small.categories, seed=1), digest="")
    for number in range(3):
        fresh, over_old = tmp_path / f"fresh {number}", tmp_path / f"over {number}"
        save_bundle(str(over_old), small, None)
        with monkeypatch.context() as patch:
            patch.setattr(ArrowStore, "put", put_some)
            for folder in (fresh, over_old):
                left = number
                with pytest.raises(OSError, match="the network is gone"):
                    save_bundle(str(folder), other, None)
        with pytest.raises(BundleError, match="is not a model bundle"):
            load_bundle(str(fresh), None)
        if number == 0:
            assert_same(load_bundle(str(over_old), None), small)
        else:
            with pytest.raises(BundleError, match="was changed after it was written"):
                load_bundle(str(over_old), None)


@pytest.mark.parametrize("missing", [bundles.WEIGHTS, bundles.DESCRIPTION])
def test_a_missing_object_is_named(tmp_path: Path, small: Bundle, missing: str) -> None:
    save_bundle(str(tmp_path), small, None)
    (tmp_path / missing).unlink()
    with pytest.raises(BundleError) as caught:
        load_bundle(str(tmp_path), None)
    assert f"{tmp_path} is not a model bundle: " in str(caught.value)
    assert f"{missing} does not exist" in str(caught.value)
    assert "Make one: segjobs init" in str(caught.value)


def test_a_place_at_s3_without_a_bundle_is_refused(bucket: Any) -> None:
    with pytest.raises(BundleError, match=r"s3://.*/none is not a model bundle: .*does not exist"):
        load_bundle(f"{bucket.uri}/none", bucket.endpoint_url)


def test_a_file_of_weights_is_no_bundle(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(BundleError, match=r"weights\.pth is not a model bundle"):
        load_bundle(str(tmp_path / "weights.pth"), None)


def test_a_damaged_bundle_is_named_by_its_uri(tmp_path: Path, small: Bundle) -> None:
    save_bundle(str(tmp_path), small, None)
    (tmp_path / bundles.WEIGHTS).write_bytes(b"{}")
    with pytest.raises(BundleError, match=f"{tmp_path} is damaged: SafetensorError"):
        load_bundle(str(tmp_path), None)
