"""Small models and packed sets for the verbs' tests."""

import io
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as mask_api

from jobs.store import Store
from segmodel import bundle, initial
from segmodel.schema import TRAINING
from segmodel.settings import ModelSettings
from tests.jobs import labelling_place
from tests.jobs.labelling_place import Place


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small architecture with random weights, an input of 64 pixels, and a gap in its ids."""
    return _random_bundle(tmp_path_factory.mktemp("tiny"), seed=7)


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same kind."""
    return _random_bundle(tmp_path_factory.mktemp("other"), seed=8)


def _random_bundle(folder: Path, seed: int) -> Path:
    settings = ModelSettings(arch="small", num_classes=3, min_size=64, max_size=128)
    categories = initial.numbered_categories([(1, "person"), (3, "car")])
    bundle.save(folder, initial.random_bundle(settings, categories, seed))
    return folder


@pytest.fixture
def place(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_bundle: Path,
    jpeg: Callable[..., bytes],
    make_tar: Any,
) -> Place:
    """An input, a data set, and `label` between them, without Ray."""
    labelling_place.without_ray(monkeypatch)
    return Place(tmp_path, tiny_bundle, jpeg, make_tar)


@pytest.fixture
def put_photos(tmp_path: Path, jpeg: Callable[..., bytes]) -> Callable[[int], Path]:
    """`put_photos(number)`: a folder with so many small pictures, named in their order."""

    def put(number: int) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir()
        for one in range(number):
            (folder / f"{one:03d}.jpg").write_bytes(jpeg(one, (60, 80)))
        return folder

    return put


@pytest.fixture(scope="session")
def put_packed(jpeg: Callable[..., bytes]) -> Callable[..., list[dict[str, Any]]]:
    """`put_packed(store, num_rows)`: a packed set of small pictures; returns its rows.

    Row n is `n.jpg`, every third one upright, with one instance, whose box starts at pixel n % 7.
    The files of the rows in `cut` break off.
    """

    def put(
        store: Store,
        num_rows: int,
        shard_rows: int = 20,
        group_rows: int = 5,
        cut: Collection[int] = (),
    ) -> list[dict[str, Any]]:
        rows = [training_row(number, jpeg) for number in range(num_rows)]
        for number in cut:
            rows[number]["image"]["bytes"] = rows[number]["image"]["bytes"][:-100]
        for start in range(0, num_rows, shard_rows):
            put_shard(store, f"{start:08d}", rows[start : start + shard_rows], group_rows)
        categories = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
        shards = len(range(0, num_rows, shard_rows))
        manifest = {"categories": categories, "shards": shards, "counts": {"images": num_rows}}
        store.put("_manifest.json", json.dumps(manifest).encode())
        return rows

    return put


def training_row(number: int, jpeg: Callable[..., bytes]) -> dict[str, Any]:
    size_hw = (32, 24) if number % 3 == 0 else (24, 32)
    mask = np.zeros(size_hw, np.uint8, order="F")
    mask[2:9, number % 7 : number % 7 + 5] = 1
    rle = mask_api.encode(mask)
    return {
        "image_id": f"all#{number}.jpg",
        "shard": "all",
        "key": f"{number}.jpg",
        "height": size_hw[0],
        "width": size_hw[1],
        "status": "ok",
        "error": None,
        "detections": [
            {
                "category_id": 3,
                "category": "car",
                "score": None,
                "bbox": [number % 7, 2, 5, 7],
                "area": 35,
                "iscrowd": 0,
                "segmentation": {"size": list(size_hw), "counts": rle["counts"].decode()},
            }
        ],
        "image": {"bytes": jpeg(number, size_hw), "path": f"{number}.jpg"},
    }


def put_shard(store: Store, name: str, rows: list[dict[str, Any]], group_rows: int) -> None:
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows, TRAINING),
        sink,
        row_group_size=group_rows,
        compression="zstd",
        write_page_checksum=True,
    )
    store.put(f"shards/{name}.parquet", sink.getvalue())
