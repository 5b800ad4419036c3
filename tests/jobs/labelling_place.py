"""An input of pictures, a data set, and `label` between them; with or without Ray and a network."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pycocotools import mask as mask_api

from jobs import label, labelling, novelty, plan, read, sorting, tasks, versions, write
from jobs.__main__ import VERBS, main
from jobs.detect import here
from jobs.flags import from_namespace, gathered, parser_for
from jobs.storage import open_store
from segmodel.schema import PREDICTIONS

POLICY = """
score_threshold: 0.0
min_area: 1
duplicate_iou: 0.9
max_per_image: 5
audit_share: 0.5
"""
SIZE_HW = (24, 32)
NAMES = {1: "person", 3: "car"}


class Place:
    """An input of tars, a data set, and the command between them."""

    def __init__(self, root: Path, model: Path, jpeg: Callable[..., bytes], make_tar: Any) -> None:
        self.root, self.model, self.jpeg, self.make_tar = root, model, jpeg, make_tar
        (root / "in").mkdir()
        self.policy(POLICY)

    def policy(self, text: str) -> None:
        (self.root / "policy.yaml").write_text(text)

    def put(self, shard: str, images: dict[str, int]) -> None:
        """Write a tar of pictures made of these seeds."""
        members = [(name, self.jpeg(seed)) for name, seed in images.items()]
        (self.root / "in" / shard).write_bytes(self.make_tar(members))

    def label(self, *more: str) -> int:
        return main(
            [
                *("label", "--input", str(self.root / "in"), "--dataset", self.named()),
                *("--model", str(self.model), "--policy", str(self.root / "policy.yaml")),
                *("--chunk-size", "4", *more),
            ]
        )

    def named(self, *parts: str) -> str:
        return str(self.root.joinpath("set", *parts))

    def manifest(self, number: int) -> dict[str, Any]:
        path = Path(self.named("versions", str(number), "manifest.json"))
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def rows(self, number: int, table: str = "accepted") -> dict[str, dict[str, Any]]:
        """Rows of a version by image id, each once."""
        listed = versions.load(open_store(self.named()), number).table(table).objects.to_pylist()
        read_ = (pq.read_table(self.named(one["path"])).to_pylist() for one in listed)
        rows = [row for some in read_ for row in some]
        assert len({row["image_id"] for row in rows}) == len(rows)
        return {row["image_id"]: row for row in rows}


def words(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said, however its lines were broken."""
    return " ".join(capsys.readouterr().out.split())


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tasks in this process, and let `predict` find what the bytes of an image decide."""

    def in_order(function: Any, calls: Any, rescue: Any = None) -> Iterator[Any]:
        return (function(*call) for call in calls)

    for module in (plan, novelty, sorting):
        monkeypatch.setattr(module, "in_order", in_order)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(tasks, "aside", here)
    monkeypatch.setattr(label, "connect", lambda _: False)
    monkeypatch.setattr(labelling, "main", _predict)


def found_in(data: bytes) -> list[dict[str, Any]]:
    """Three detections side by side, whose categories and scores the bytes decide."""
    digest = hashlib.sha256(data).digest()
    detections = []
    for number, (score, category) in enumerate(zip(digest[:3], digest[3:6], strict=True)):
        mask = np.zeros(SIZE_HW, np.uint8, order="F")
        mask[4:12, 10 * number : 10 * number + 8] = 1
        rle = mask_api.encode(mask)
        category_id = (1, 3)[category % 2]
        detections.append(
            {
                "category_id": category_id,
                "category": NAMES[category_id],
                "score": 0.3 + 0.6 * score / 255,
                "bbox": [10 * number, 4, 8, 8],
                "area": 64,
                "iscrowd": 0,
                "segmentation": {"size": list(SIZE_HW), "counts": rle["counts"].decode()},
            }
        )
    return sorted(detections, key=lambda one: -one["score"])


def _predict(arguments: list[str]) -> int:
    verb, *rest = arguments
    values = parser_for(VERBS[verb]).parse_args(gathered(VERBS[verb], rest))
    config = from_namespace(VERBS[verb], values)
    output = open_store(config.output, config.endpoint_url)
    planned = plan.load(output)
    assert planned is not None
    source = read.Source(
        store=open_store(planned.folder, config.endpoint_url),
        lists=output,
        endpoint_url=config.endpoint_url,
        image_column=config.image_column,
    )
    for chunk in plan.left(planned, plan.finished_chunks(output)):
        rows = [predicted(image) for image in read.read_chunk(chunk, source).to_pylist()]
        table = pa.Table.from_pylist(rows, schema=PREDICTIONS)
        write.put_chunk(output, chunk.chunk_id, table, {})
    write.put_marks(output, {"counts": {}})
    return 0


def predicted(image: dict[str, Any]) -> dict[str, Any]:
    """A row as `predict` writes it."""
    data, error = image["data"], image["error"]
    if error is None and not data.startswith(b"\xff\xd8"):
        error = "unknown_format: no JPEG"
    names = {name: image[name] for name in ("image_id", "shard", "key")}
    size = dict(zip(("height", "width"), (None, None) if error else SIZE_HW, strict=True))
    status = {"status": "error" if error else "ok", "error": error}
    return {**names, **size, **status, "detections": [] if error else found_in(data)}
