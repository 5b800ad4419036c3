"""The stages between reading and the output, called in this process."""

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs import encode
from jobs.actor import DECODED_AHEAD, Model, Pool, Predict
from jobs.envelope import Envelope, seal, unseal
from jobs.read import IMAGES
from jobs.storage import open_store
from segmodel import bundle, masks
from segmodel.images import MAX_PIXELS, Picture, decode, decode_reduced
from segmodel.inference import Predictor
from segmodel.schema import PREDICTIONS, Category, Detections

pytestmark = pytest.mark.ray

CATEGORIES = {1: Category(id=1, name="person", label=1), 2: Category(id=3, name="car", label=2)}


@pytest.fixture(scope="module")
def model(ray_local: None, tiny_bundle: Path) -> Model:
    return Model(
        bundle=ray.put(bundle.load(tiny_bundle)),
        categories=CATEGORIES,
        precision="fp32",
        score_threshold=0,
        max_detections=3,
        masks=True,
        max_pixels=MAX_PIXELS,
    )


@pytest.fixture(scope="module")
def actor(model: Model) -> Predict:
    pool = Pool(
        min_actors=1, max_actors=1, initial_actors=1, gpus_per_actor=0, threads=2, batch_size=None
    )
    return Predict(model, pool)


def block_of(contents: list[bytes | None], chunk_id: str = "00000007") -> pa.Table:
    keys = [f"{number}.jpg" for number in range(len(contents))]
    columns = [
        [f"s#{key}" for key in keys],
        ["s"] * len(keys),
        keys,
        contents,
        [None if data is not None else "missing: it is gone" for data in contents],
    ]
    table = pa.table(columns, schema=IMAGES)
    return seal(Envelope(chunk_id=chunk_id, seconds={"read": 1.5}, table=table))


def test_threads_are_the_share_of_the_node(model: Model) -> None:
    pool = Pool(
        min_actors=1,
        max_actors=1,
        initial_actors=1,
        gpus_per_actor=0,
        threads=None,
        batch_size=None,
    )
    # The tests' Ray has two CPUs.
    assert Predict(model, pool).window == 2 * DECODED_AHEAD


def test_detections_are_those_of_the_bare_predictor(
    actor: Predict, tiny_bundle: Path, jpeg: Callable[..., bytes]
) -> None:
    contents = [jpeg(number, (40 + 8 * number, 60)) for number in range(9)]
    found = unseal(actor(block_of(contents)))
    assert found.chunk_id == "00000007"
    assert found.seconds.keys() == {"read", "decode", "network", "predict"}
    assert 0 < found.seconds["network"] <= found.seconds["predict"]
    assert found.table.schema.equals(encode.RAW)
    bare = Predictor(bundle.load(tiny_bundle), "cpu", "fp32", score_threshold=0, max_detections=3)
    expected = bare.predict([decode(data) for data in contents])
    assert sum(len(one) for one in expected) == 27
    for row, one in zip(found.table.to_pylist(), expected, strict=True):
        assert (row["height"], row["width"]) == one.size_hw
        assert row["boxes_xyxy"] == one.boxes_xyxy.tobytes()
        assert row["mask_probs"] == one.mask_probs.tobytes()


def test_a_model_on_a_cpu_is_loaded_when_it_has_run(
    model: Model, actor: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    whole = Predictor._predict_batch

    def run(self: Predictor, images: list[Picture], **options: Any) -> list[Detections]:
        seen.append(len(images))
        return whole(self, images, **options)

    monkeypatch.setattr(Predictor, "_predict_batch", run)
    fresh = Predict(model, actor.pool)
    assert seen == []
    # That picture is none of the job's.
    assert fresh.predictor.on_batch is not None
    assert seen == [1]
    assert fresh.predictor is fresh.predictor
    assert seen == [1]


def test_large_jpegs_may_be_decoded_at_a_lower_resolution(
    model: Model, actor: Predict, jpeg: Callable[..., bytes]
) -> None:
    reducing = Predict(replace(model, decode="reduced"), actor.pool)
    small, large = jpeg(1, (100, 120)), jpeg(2, (300, 420))
    contents = [small, large, b"text"]
    rows, plain = (unseal(one(block_of(contents))).table.to_pylist() for one in (reducing, actor))
    assert rows[0] == plain[0]
    assert rows[2] == plain[2]
    assert rows[1] == {**plain[1], **reducing.one(large)}
    assert (rows[1]["height"], rows[1]["width"]) == (300, 420)
    # The network takes 64 x 89 pixels.
    quarter = decode_reduced(large, MAX_PIXELS, lambda _: (64, 89))
    assert quarter.pixels.shape == (75, 105, 3)
    (expected,) = reducing.predictor.predict([quarter])
    assert rows[1]["boxes_xyxy"] == expected.boxes_xyxy.tobytes()
    assert rows[1]["boxes_xyxy"] != plain[1]["boxes_xyxy"]


def test_images_that_cannot_be_decoded_keep_their_place(
    actor: Predict, jpeg: Callable[..., bytes]
) -> None:
    contents = [b"", jpeg(1), None, jpeg(2)[:-200], jpeg(3), b"text"]
    rows = unseal(actor(block_of(contents))).table.to_pylist()
    assert [row["key"] for row in rows] == [f"{number}.jpg" for number in range(6)]
    kinds = [row["error"] and row["error"].partition(":")[0] for row in rows]
    assert kinds == ["empty", None, "missing", "truncated", None, "unknown_format"]


def test_two_chunks_at_once_give_what_each_gives_alone(
    actor: Predict, jpeg: Callable[..., bytes]
) -> None:
    blocks = [
        block_of([jpeg(10 * chunk + number, (50, 40)) for number in range(6)], f"{chunk:08d}")
        for chunk in range(4)
    ]
    alone = [unseal(actor(block)).table for block in blocks]
    with ThreadPoolExecutor(2) as pool:
        together = [unseal(found).table for found in pool.map(actor, blocks)]
    assert all(a.equals(b) for a, b in zip(alone, together, strict=True))


def raw_block(positions: tuple[int, ...] | None, found: list[Detections | None]) -> pa.Table:
    rows = [
        {"image_id": f"s#{n}", "shard": "s", "key": f"{n}"}
        | encode.raw_row(one, None if one else "corrupt: bad")
        for n, one in zip(positions or range(len(found)), found, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema=encode.RAW)
    return seal(Envelope(chunk_id="00000000", positions=positions, table=table))


def detections(num: int, *, with_masks: bool = True) -> Detections:
    rng = np.random.default_rng(num)
    corner = rng.uniform(0, 30, (num, 2)).astype(np.float32)
    return Detections(
        boxes_xyxy=np.concatenate([corner, corner + 20], axis=1),
        scores=np.linspace(0.9, 0.1, num, dtype=np.float32),
        labels=np.arange(num, dtype=np.int64) % 3 + 1,
        mask_probs=rng.random((num, 28, 28), dtype=np.float32) if with_masks else None,
        size_hw=(50, 60),
    )


def test_rows_carry_rles_and_leave_labels_without_category_out(tmp_path: Path) -> None:
    found = detections(6)
    output = open_store(str(tmp_path))
    block = raw_block(None, [found, None, detections(0), detections(2, with_masks=False)])
    receipt = encode.encode_and_write(block, output, CATEGORIES, {"run_id": "r"})
    (one,) = encode.receipts(receipt)
    assert (one.chunk_id, one.rows, one.counts.errors) == ("00000000", 4, {"corrupt": 1})
    rows = read(tmp_path)
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok"]
    assert [d["category_id"] for d in rows[0]["detections"]] == [1, 3, 1, 3]
    rles = masks.encode(found.mask_probs, found.boxes_xyxy, found.size_hw)
    assert [d["segmentation"] for d in rows[0]["detections"]] == [rles[i] for i in (0, 1, 3, 4)]
    assert rows[2]["detections"] == []
    assert [d["segmentation"] for d in rows[3]["detections"]] == [None, None]


def test_warming_up_does_not_count_as_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[int] = []

    def warm_up() -> None:
        warmed.append(1)
        time.sleep(1)

    monkeypatch.setattr(masks, "warm_up", warm_up)
    masks.encode(np.ones((1, 28, 28), np.float32), np.zeros((1, 4), np.float32), (9, 9))
    output = open_store(str(tmp_path / "masks"))
    receipt = encode.encode_and_write(
        raw_block(None, [None, detections(1)]), output, CATEGORIES, {}
    )
    (one,) = encode.receipts(receipt)
    assert warmed == [1]
    assert one.seconds["encode"] + one.seconds["write"] < 1
    # Boxes alone need no kernels.
    output = open_store(str(tmp_path / "boxes"))
    found = [None, detections(1, with_masks=False)]
    encode.encode_and_write(raw_block(None, found), output, CATEGORIES, {})
    assert warmed == [1]


def test_a_retry_replaces_only_its_rows(tmp_path: Path) -> None:
    output = open_store(str(tmp_path))
    first = [detections(1), None, detections(2), None]
    encode.encode_and_write(raw_block(None, first), output, CATEGORIES, {})
    before = read(tmp_path)
    retried = raw_block((1, 3), [detections(2), None])
    (one,) = encode.receipts(encode.encode_and_write(retried, output, CATEGORIES, {}))
    after = read(tmp_path)
    assert (one.rows, one.counts.images, one.counts.errors) == (2, 4, {"corrupt": 1})
    assert [row["status"] for row in after] == ["ok", "ok", "ok", "error"]
    assert [after[n] for n in (0, 2)] == [before[n] for n in (0, 2)]
    assert len(after[1]["detections"]) == 2


def read(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "predictions").iterdir()
    table = pq.read_table(io.BytesIO(path.read_bytes()), page_checksum_verification=True)
    assert table.schema.equals(PREDICTIONS)
    return table.to_pylist()
