"""Three days of scheduled labelling on an S3 server, and the training that reads what came out.

Day 1 has 60 scenes in tars. Day 2 has 40 more, and 5 of the old ones are replaced; two schedulers fire at once,
and one is killed. On day 3 nothing happens. What manifests say of drift, and what `evaluate` says of old and
new, is worked out again from the rows.
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jobs import demo, plan, versions
from jobs.__main__ import main
from jobs.contents import content_digest
from jobs.storage import open_store
from jobs.versions import ACCEPTED, CONTENTS, REJECTED, REVIEW
from segmodel import bundle, scenes
from tests.conftest import Bucket

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SIZE_HW = (256, 320)
# The demo's model looks at twice the size and sees little more; this one takes a fifth of the time.
MIN_SIZE, MAX_SIZE = 320, 640
PER_SHARD = 20
DAY_1, DAY_2, REPLACED = range(60), range(60, 100), (3, 17, 21, 40, 59)
# The seed of the scene that a name has after it was replaced.
LATER = 10_000
POLICY = """
score_threshold: 0.5
review_from: 0.45
duplicate_iou: 0.8
min_area: 20
audit_share: 0.1
categories:
  star: {score_threshold: 0.55}
"""
DEADLINE_S = 600


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(scenes.scene(seed, SIZE_HW).image).save(file, "JPEG", quality=92)
    return file.getvalue()


class Story:
    """A bucket with an input and a data set, and the photos as they are now, by image id."""

    def __init__(self, bucket: Bucket, root: Path, make_tar: Any) -> None:
        self.bucket, self.root, self.make_tar = bucket, root, make_tar
        self.store = bucket.store("set")
        self.photos: dict[str, bytes] = {}
        (root / "policy.yaml").write_text(POLICY)
        shipped = bundle.load(demo.MODEL)
        settings = replace(shipped.settings, min_size=MIN_SIZE, max_size=MAX_SIZE)
        self.model = str(root / "model")
        bundle.save(self.model, replace(shipped, settings=settings, digest=""))

    def put(self, numbers: range, replaced: tuple[int, ...] = ()) -> None:
        """Write the tars of some photos, of 20 each."""
        for start in range(numbers.start, numbers.stop, PER_SHARD):
            shard = f"day/{start:03d}.tar"
            names = range(start, start + PER_SHARD)
            members = [(f"{n:03d}.jpg", jpeg(n + LATER if n in replaced else n)) for n in names]
            self.bucket.store("in").put(shard, self.make_tar(members))
            self.photos |= {f"{shard}#{name}": data for name, data in members}

    def arguments(self) -> list[str]:
        return [
            *("label", "--input", f"{self.bucket.uri}/in", "--dataset", f"{self.bucket.uri}/set"),
            *("--model", self.model, "--policy", str(self.root / "policy.yaml")),
            # One actor each, so that two at once leave room on two CPUs to read and write.
            *("--chunk-size", "5", "--max-actors", "1"),
            *("--endpoint-url", self.bucket.endpoint_url),
        ]

    def start(self, name: str) -> "subprocess.Popen[bytes]":
        """Start a scheduler's command in a process of its own, on the tests' Ray."""
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "jobs", *self.arguments(), "--address", address]
        with (self.root / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def rows(self, number: int, table: str) -> list[dict[str, Any]]:
        listed = versions.load(self.store, number).table(table).objects.to_pylist()
        read = (pq.read_table(io.BytesIO(self.store.read(one["path"]))) for one in listed)
        return [row for some in read for row in some.to_pylist()]

    def images(self, number: int) -> dict[str, dict[str, Any]]:
        """The row of each image that is accepted or waits, by its id."""
        rows = [*self.rows(number, ACCEPTED), *self.rows(number, REVIEW)]
        return {row["image_id"]: row for row in rows if row.get("reason") != "audit"}

    def labelled(self, number: int) -> list[str]:
        """Ids of the images that were predicted for a version, as often as its table has them."""
        place = f"work/{number - 1}-{versions.load(self.store, number).manifest['work'][:16]}"
        work = self.bucket.store(f"set/{place}")
        planned = plan.load(work)
        assert planned is not None
        paths = [info.path for info in work.list_objects("predictions")]
        assert len(paths) == planned.chunks.num_rows
        tables = [pq.read_table(io.BytesIO(work.read(path))) for path in paths]
        return [name for table in tables for name in table["image_id"].to_pylist()]

    def check(self, number: int) -> None:
        """Every photo that there is has one row, of the content that it has now."""
        accepted, review, rejected = (self.rows(number, t) for t in (ACCEPTED, REVIEW, REJECTED))
        waiting = [row for row in review if row["reason"] != "audit"]
        refused = [row for row in rejected if row["reason"] is not None]
        of_images = [*accepted, *waiting, *refused]
        assert len(of_images) == len({row["image_id"] for row in of_images})
        assert {row["image_id"]: row["image"]["bytes"] for row in of_images} == self.photos
        contents = self.rows(number, CONTENTS)
        assert len(contents) == len(self.photos)
        assert {row["image_id"]: row["digest"] for row in contents} == {
            name: content_digest(data) for name, data in self.photos.items()
        }
        audited = {row["image_id"] for row in review} - {row["image_id"] for row in waiting}
        assert audited <= {row["image_id"] for row in accepted}


def wait_for_predictions(story: Story, process: "subprocess.Popen[bytes]", name: str) -> None:
    """Wait until some of the second day is predicted."""
    deadline = time.monotonic() + DEADLINE_S
    while not any(
        "/predictions/" in info.path and info.path.startswith("work/1-")
        for info in story.store.list_objects("work")
    ):
        assert process.poll() is None, story.log(name)
        assert time.monotonic() < deadline, story.log(name)
        time.sleep(0.05)


def histograms(rows: Iterable[Mapping[str, Any]]) -> dict[str, Counter[Any]]:
    """What drift is measured of, as the README says it."""
    found: dict[str, Counter[Any]] = {
        name: Counter() for name in ("class_mix", "scores", "sizes", "empty_share", "error_share")
    }
    for row in rows:
        found["error_share"][row["status"]] += 1
        found["empty_share"][not row["detections"]] += 1
        for one in row["detections"]:
            found["class_mix"][one["category"]] += 1
            found["scores"][min(math.floor(one["score"] * 20), 19)] += 1
            found["sizes"][math.floor(math.log2(one["area"]))] += 1
    return found


def jensen_shannon(before: Counter[Any], now: Counter[Any]) -> float:
    """The square root of the divergence in bits: by entropies, as its paper has it."""

    def entropy(shares: Iterable[float]) -> float:
        return -sum(share * math.log2(share) for share in shares if share)

    keys = before | now
    p, q = ([of[key] / of.total() for key in keys] for of in (before, now))
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return math.sqrt(max(0.0, entropy(middle) - (entropy(p) + entropy(q)) / 2))


def test_three_days_of_labels_become_a_model(
    ray_local: None, bucket: Bucket, tmp_path: Path, make_tar: Any, capsys: Any
) -> None:
    story = Story(bucket, tmp_path, make_tar)
    story.put(DAY_1)
    assert main(story.arguments()) == 0
    story.check(1)
    first = story.rows(1, ACCEPTED)
    assert len(first) > 20
    assert len(story.rows(1, REVIEW)) > 5
    assert sorted(story.labelled(1)) == sorted(story.photos)

    before = dict(story.photos)
    story.put(DAY_1, REPLACED)
    story.put(DAY_2)
    schedulers = {name: story.start(name) for name in ("one", "other")}
    wait_for_predictions(story, schedulers["one"], "one")
    os.killpg(schedulers["one"].pid, signal.SIGKILL)
    assert schedulers["other"].wait(DEADLINE_S) == 0, story.log("other")
    assert schedulers["one"].wait() == -signal.SIGKILL
    assert versions.latest(story.store) == 2
    story.check(2)

    manifests = [versions.load(story.store, number).manifest for number in (1, 2)]
    # Every image is labelled once for each content: 60, and then 40 and 5, of the 15 others beside those none.
    new = [manifest["counts"]["new"] for manifest in manifests]
    assert [counts["images"] for counts in new] == [60, 45]
    assert [counts["replaced"] for counts in new] == [0, 5]
    is_new = {name for name, data in story.photos.items() if before.get(name) != data}
    assert sorted(story.labelled(2)) == sorted(is_new)
    assert manifests[1]["parent"] == 1
    assert manifests[1]["profile"]["all"]["images"] == 100

    old, now = story.images(1), story.images(2)
    assert {name: now[name] for name in before if name not in is_new} == {
        name: old[name] for name in before if name not in is_new
    }
    of_new = histograms(now[name] for name in is_new)
    drift = manifests[1]["drift"]
    assert {name: one["distance"] for name, one in drift.items()} == pytest.approx(
        {
            name: jensen_shannon(of_old, of_new[name])
            for name, of_old in histograms(old.values()).items()
        },
        abs=1e-4,
    )
    # Both days' scenes are drawn alike.
    assert all(0 <= one["distance"] <= max(0.3, one["chance"]) for one in drift.values())
    assert manifests[0]["drift"] == {}
    assert [manifest["status"] for manifest in manifests] == ["published", "published"]
    # The first version is as it was.
    assert story.rows(1, ACCEPTED) == first

    capsys.readouterr()
    assert main(story.arguments()) == 0
    assert "Nothing is new" in capsys.readouterr().out
    assert versions.latest(story.store) == 2

    learn(story, tmp_path, capsys)


def coco_ap(root: Path, name: str) -> float:
    """Mask AP of a table of the fresh scenes, by COCO's own code."""
    truth = COCO(str(root / "fresh.json"))
    ids = {image["file_name"]: number for number, image in truth.imgs.items()}
    found = [
        {
            "image_id": ids[row["key"]],
            **{key: one[key] for key in ("category_id", "score", "segmentation")},
        }
        for row in pq.read_table(root / name / "predictions").to_pylist()
        for one in row["detections"]
    ]
    scores = COCOeval(truth, truth.loadRes(found), "segm")
    for step in (scores.evaluate, scores.accumulate, scores.summarize):
        step()
    return float(scores.stats[0])


def learn(story: Story, root: Path, capsys: Any) -> None:
    """Train on version 2 mixed with a little truth, and hold the new model against the old one."""
    endpoint = ("--endpoint-url", story.bucket.endpoint_url)
    seeds = range(20_000, 20_008)
    made = [scenes.scene(seed, SIZE_HW) for seed in seeds]
    names = [f"{seed}.png" for seed in seeds]
    (root / "fresh").mkdir()
    for scene, name in zip(made, names, strict=True):
        Image.fromarray(scene.image).save(root / "fresh" / name)
    (root / "fresh.json").write_text(json.dumps(scenes.coco(made, names)))
    fresh = ("--images", str(root / "fresh"), "--annotations", str(root / "fresh.json"))
    truth, trained = f"{story.bucket.uri}/truth", f"{story.bucket.uri}/trained"
    version = f"{story.bucket.uri}/set/versions/2"
    assert main(["pack", *fresh, "--output", truth, *endpoint]) == 0
    assert (
        main(
            [
                *("train", "--train", version, truth, "--train-weights", "0.25", "1"),
                *(
                    "--model",
                    story.model,
                    "--output",
                    trained,
                    "--epochs",
                    "1",
                    "--batch-size",
                    "4",
                ),
                *("--workers", "1", "--learning-rate", "0.0002", "--optimizer", "adamw"),
                *("--proposals-per-image", "32", *endpoint),
            ]
        )
        == 0
    )
    for name, model in (("old", story.model), ("new", f"{trained}/bundle")):
        arguments = ["--input", str(root / "fresh"), "--output", str(root / name)]
        assert main(["predict", *arguments, "--model", model, *endpoint]) == 0
    capsys.readouterr()
    assert (
        main(
            [
                *("evaluate", "--predictions", str(root / "new"), "--against", str(root / "old")),
                *("--annotations", str(root / "fresh.json"), "--output", str(root / "scores")),
            ]
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    found = json.loads((root / "scores" / "metrics.json").read_text())
    new, old = (coco_ap(root, name) for name in ("new", "old"))
    assert found["mask"]["AP"] == pytest.approx(new, abs=1e-6)
    assert found["against"]["mask"]["AP"] == pytest.approx(old, abs=1e-6)
    # A short training on its own labels and some truth: another model, that has forgotten little.
    assert new != old
    assert old > 0.5
    assert new > 0.9 * old
    better = "predictions" if new > old else "against"
    assert found["against"]["better"]["better"] == better
    assert f"Better by {abs(new - old):.4f} mask AP" in said
    assert f"(--{better})" in said
    accepted = len(story.rows(2, ACCEPTED))
    card = open_store(trained, story.bucket.endpoint_url).read("bundle/README.md").decode()
    assert f"{version}, {truth}: {accepted + len(seeds)} images" in card
