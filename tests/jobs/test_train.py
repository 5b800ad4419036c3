"""`segjobs train` on real Ray: a bundle that predict runs, going on after kills, refusals in words."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import checkpoints, train_task
from jobs import train as verb
from jobs.__main__ import main
from jobs.config import ConfigError
from jobs.storage import open_store
from jobs.train_config import TrainConfig
from segmodel import bundle, initial, scenes
from segmodel.settings import ModelSettings
from tests.conftest import Bucket
from tests.jobs import ray_processes

pytestmark = pytest.mark.ray

SIZE_HW = (64, 96)
TRAIN_SEEDS, VAL_SEEDS = range(12), range(100, 105)
# Small and quick; a step takes a fraction of a second.
SETTINGS = (
    *("--workers", "1", "--batch-size", "2", "--min-size", "64", "--max-size", "96"),
    *("--optimizer", "adamw", "--learning-rate", "0.004", "--warmup-epochs", "0.2"),
    *("--proposals-per-image", "64", "--checkpoint-every", "3"),
)
DEADLINE_S = 240


@pytest.fixture(scope="module")
def packed(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packed sets of scenes, `train` and `val`."""
    root = tmp_path_factory.mktemp("packed")
    for name, seeds in (("train", TRAIN_SEEDS), ("val", VAL_SEEDS)):
        images = root / f"{name}-images"
        images.mkdir()
        made = [scenes.scene(seed, SIZE_HW) for seed in seeds]
        names = [f"{seed}.png" for seed in seeds]
        for scene, file_name in zip(made, names, strict=True):
            Image.fromarray(scene.image).save(images / file_name)
        (root / f"{name}.json").write_text(json.dumps(scenes.coco(made, names)))
        arguments = ["--images", images, "--annotations", root / f"{name}.json"]
        assert run("pack", *arguments, "--output", root / name) == 0
    return root


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def train(packed: Path, output: Any, *more: str) -> int:
    arguments = ["--train", packed / "train", "--val", packed / "val", "--output", output]
    return run("train", *arguments, *SETTINGS, *more)


def start(packed: Path, output: Path, *more: str) -> "subprocess.Popen[bytes]":
    """Start the command line in a process of its own, on the tests' Ray."""
    arguments = [
        *(sys.executable, "-m", "jobs", "train", "--train", packed / "train", "--output", output),
        *(*SETTINGS, *more, "--address", ray.get_runtime_context().gcs_address),
    ]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [str(argument) for argument in arguments],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait(process: "subprocess.Popen[bytes]", output: Path) -> None:
    code = process.wait(DEADLINE_S)
    assert code == 0, output.with_suffix(".log").read_text()


def wait_for_checkpoint(process: "subprocess.Popen[bytes]", output: Path, steps: int) -> int:
    """Wait until a checkpoint of that many steps is there; return its step."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        newest = checkpoints.last(open_store(str(output)))
        found = 0 if newest is None else int(newest.split("-")[-1].split(".")[0])
        if found >= steps:
            return found
        assert process.poll() is None, output.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def losses(output: Path) -> dict[int, dict[str, float]]:
    """The loss and its parts by step; what a clock had a part in is left out."""
    history = json.loads((output / "history.json").read_text())
    return {
        point["step"]: {n: v for n, v in point.items() if n.startswith("loss") or n == "images"}
        for point in history
        if "loss" in point
    }


def test_a_training_from_s3_gives_a_bundle_that_predict_runs(
    packed: Path, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = bucket.store("sets")
    for file in sorted(packed.rglob("*")):
        if file.is_file() and file.relative_to(packed).parts[0] in ("train", "val"):
            store.put(str(file.relative_to(packed)), file.read_bytes())
    sets, output = f"{bucket.uri}/sets", f"{bucket.uri}/trained"
    arguments = [
        *("train", "--train", f"{sets}/train", "--val", f"{sets}/val", "--output", output),
        *(
            *SETTINGS,
            "--epochs",
            "3",
            "--eval-every",
            "2",
            "--copy-paste",
            "0.5",
            "--colour",
            "0.2",
        ),
        *("--endpoint-url", bucket.endpoint_url),
    ]
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "epoch 2.0: mask AP" in said
    assert "epoch 3.0: mask AP" in said

    trained = bucket.store("trained")
    names = {found.path for found in trained.list_objects()}
    assert {"_SUCCESS", "_manifest.json", "_train.json", "curves.png", "history.json"} <= names
    assert not [name for name in names if name.startswith("_ray/")]
    history = json.loads(trained.read("history.json"))
    assert [p["step"] for p in history if "loss" in p] == list(range(1, 19))
    evaluated = [point for point in history if "mask_AP" in point]
    assert [point["step"] for point in evaluated] == [12, 18]

    (events,) = (name for name in names if name.startswith("tensorboard/"))
    (tmp_path / Path(events).name).write_bytes(trained.read(events))
    board = EventAccumulator(str(tmp_path / Path(events).name)).Reload()
    drawn = {tag: [one.value for one in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert drawn["training/loss"] == pytest.approx([p["loss"] for p in history if "loss" in p])
    assert drawn["validation/mask_AP"] == pytest.approx([p["mask_AP"] for p in evaluated])

    manifest = json.loads(trained.read("_manifest.json"))
    best = max(evaluated, key=lambda point: point["mask_AP"])
    assert manifest["bundle_of_step"] == best["step"]
    card = trained.read("bundle/README.md").decode()
    assert "training set" in card
    assert "mask_AP" in card
    assert "learning_rate: 0.004" in card
    assert "workers: 1 (2 images in a step)" in card
    local = tmp_path / "bundle"
    local.mkdir()
    for name in (bundle.DESCRIPTION, bundle.WEIGHTS, bundle.CARD):
        (local / name).write_bytes(trained.read(f"bundle/{name}"))
    loaded = bundle.load(local)
    assert [(c.id, c.name) for c in loaded.categories] == [
        (c.id, c.name) for c in scenes.CATEGORIES
    ]
    assert loaded.metrics["validation"]["mask_AP"] == pytest.approx(best["mask_AP"], abs=1e-4)

    assert mask_ap(packed, local, tmp_path) == pytest.approx(best["mask_AP"], abs=1e-6)


def mask_ap(packed: Path, model: Path, folder: Path) -> float:
    """The AP on `val` of the table that predict makes with a bundle."""
    table, scores = folder / "table", folder / "scores"
    arguments = ["--input", packed / "val-images", "--model", model, "--output", table]
    assert run("predict", *arguments) == 0
    arguments = ["--predictions", table, "--annotations", packed / "val.json", "--output", scores]
    assert run("evaluate", *arguments) == 0
    measured = json.loads((scores / "metrics.json").read_text())
    return float(_find(measured, "mask")["AP"])


def _find(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The first dictionary of that name, however deep."""
    if isinstance(tree.get(name), dict) and "AP" in tree[name]:
        return tree[name]
    found = (_find(value, name) for value in tree.values() if isinstance(value, dict))
    return next((one for one in found if one), {})


# 15 steps of two workers.
SURVIVING = ("--workers", "2", "--epochs", "5")


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    process = start(packed, output, *SURVIVING)
    wait(process, output)
    return output


def same_training(one: Path, other: Path) -> None:
    """The same losses at every step, and the same weights at the end, to the bit."""
    assert losses(one) == losses(other)
    first, second = bundle.load(one / "bundle"), bundle.load(other / "bundle")
    assert first.digest == second.digest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_and_one_of_two_workers_cost_nothing_but_the_steps_since_the_checkpoint(
    packed: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(packed, output, *SURVIVING)
    wait_for_checkpoint(process, output, 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "_SUCCESS").exists()
    # Workers of the driver that was killed may be there still.
    old = {worker.pid for worker in ray_processes.titled("ray::RayTrainWorker")}
    process = start(packed, output, *SURVIVING)
    wait_for_checkpoint(process, output, 6)
    one, _ = [w for w in ray_processes.titled("ray::RayTrainWorker") if w.pid not in old]
    one.kill()
    wait(process, output)
    assert (output / "_SUCCESS").exists()
    assert list(losses(output)) == list(range(1, 16))
    assert {step["images"] for step in losses(output).values()} == {4.0}
    same_training(output, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_train_and_evaluate_together(packed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train(packed, output, "--epochs", "2", "--workers", "1..2", "--accumulate", "1") == 0
    history = json.loads((output / "history.json").read_text())
    assert [p["images"] for p in history if "loss" in p] == [4.0] * 6
    evaluated = [point for point in history if "mask_AP" in point]
    assert [point["step"] for point in evaluated] == [3, 6]
    # Two and three images each; all in one process give the same.
    best = max(point["mask_AP"] for point in evaluated)
    assert mask_ap(packed, output / "bundle", tmp_path) == pytest.approx(best, abs=1e-6)
    first, last = (p["loss"] for p in (history[0], [p for p in history if "loss" in p][-1]))
    assert last < first


def test_workers_for_which_there_is_no_room_are_started_only_where_nodes_may_come(
    ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(train="sets/train", output="trained", workers="1..7")
    assert verb._lay_out(config, may_grow=False) == ((1, 2), False)
    assert verb._lay_out(config, may_grow=True) == ((1, 7), False)
    verb._say_what_it_waits_for(5, 125, gpus=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing from the workers for 2 min 05 s: the cluster has room for 4 of the 5" in said


def test_a_finished_training_is_not_done_again_and_another_is_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert train(packed, output, "--epochs", "1") == 0
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert train(packed, output, "--epochs", "1") == 0
    assert "finished: nothing to do" in capsys.readouterr().out
    assert written == {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
    assert train(packed, output, "--epochs", "2", "--seed", "1") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "epochs was 1 and is now 2" in message
    assert "seed was 0 and is now 1" in message


def test_a_loss_that_is_not_finite_stops_with_the_images(
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.__main__.error_console", Console(stderr=True, width=1000))
    more = ("--epochs", "3", "--learning-rate", "1e30", "--optimizer", "sgd", "--clip-norm", "0")
    assert train(packed, tmp_path / "out", *more) == 1
    message = capsys.readouterr().err
    assert "is not finite" in message
    assert ".png" in message
    assert "--learning-rate" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_an_image_that_does_not_fit_its_annotations_is_named(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken" / "shards"
    broken.mkdir(parents=True)
    (shard,) = (packed / "train" / "shards").glob("*.parquet")
    table = pq.read_table(shard)
    rows = table.to_pylist()
    victim = next(row for row in rows if row["detections"])
    victim["detections"][0]["segmentation"] = None
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), broken / shard.name)
    manifest = packed / "train" / "_manifest.json"
    (tmp_path / "broken" / manifest.name).write_text(manifest.read_text())
    arguments = ["--train", tmp_path / "broken", "--output", tmp_path / "out"]
    assert run("train", *arguments, *SETTINGS, "--epochs", "1") == 1
    message = " ".join(capsys.readouterr().err.split())
    assert victim["image_id"] in message
    assert "no mask" in message


def test_other_categories_keep_the_rest_of_the_model(
    packed: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, model = tmp_path / "out", tmp_path / "model"
    known = replace(bundle.load(tiny_bundle), provenance={"trained by": "somebody"})
    bundle.save(model, known)
    assert train(packed, output, "--epochs", "1", "--model", str(model)) == 0
    assert "0 of 4 categories are kept" in " ".join(capsys.readouterr().out.split())
    before, after = bundle.load(tiny_bundle), bundle.load(output / "bundle")
    assert after.settings.num_classes == 5
    assert after.provenance["what was known of them"]["trained by"] == "somebody"
    # Fine-tuning keeps the normalisation as it came.
    name = "backbone.body.0.1.running_mean"
    assert (before.weights[name] == after.weights[name]).all()
    assert not (
        before.weights["roi_heads.mask_head.0.0.weight"]
        == after.weights["roi_heads.mask_head.0.0.weight"]
    ).all()


def test_what_helps_a_loss_that_is_not_finite_may_change_and_nothing_else(
    packed: Path, tmp_path: Path
) -> None:
    output = open_store(str(tmp_path / "out"))
    asked = TrainConfig(train=str(packed / "train"), output=output.uri)
    config = train_task.settled(asked, output, gpus=False)
    task = train_task.make(config, gpus=False)
    train_task.freeze(output, config, task)
    other = replace(config, learning_rate=0.001, warmup_epochs=2.0, clip_norm=1.0, workers=2)
    train_task.freeze(output, other, task)
    train_task.freeze(output, replace(config, train=f"{packed}/./train/"), task)
    with pytest.raises(ConfigError, match=r"momentum was 0\.9 and is now 0\.5"):
        train_task.freeze(output, replace(other, momentum=0.5), task)


@pytest.mark.parametrize(("has_bf16", "wanted"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_the_precision_of_the_processor_and_then_that_of_the_training(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool, wanted: str
) -> None:
    monkeypatch.setattr(train_task, "cpu_has_bf16", lambda: has_bf16)
    output = open_store(str(tmp_path / "out"))
    asked = TrainConfig(train=str(packed / "train"), output=output.uri)
    config = train_task.settled(asked, output, gpus=False)
    assert config.precision == wanted
    train_task.freeze(output, config, train_task.make(config, gpus=False))
    # It goes on elsewhere.
    monkeypatch.setattr(train_task, "cpu_has_bf16", lambda: not has_bf16)
    assert train_task.settled(asked, output, gpus=False) == config
    other = replace(asked, precision="fp16")
    assert train_task.settled(other, output, gpus=False) == other


def test_statistics_are_frozen_where_they_have_seen_data(
    packed: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    known = replace(bundle.load(tiny_bundle), provenance={"trained by": "segjobs train"})
    bundle.save(tmp_path / "known", known)
    found = {
        model: train_task.make(
            TrainConfig(
                train=str(packed / "train"),
                output=str(tmp_path / "out"),
                model=model and str(model),
                precision="fp32",
            ),
            gpus=False,
        ).recipe.norm
        for model in (None, tiny_bundle, tmp_path / "known")
    }
    assert list(found.values()) == ["train", "train", "frozen"]


@pytest.mark.parametrize("norm", ["train", "sync"])
def test_normalisation_that_is_constants_cannot_be_trained(
    packed: Path, tmp_path: Path, norm: Literal["train", "sync"]
) -> None:
    settings = ModelSettings(
        arch="maskrcnn_resnet50_fpn", num_classes=5, min_size=64, max_size=96, norm="frozen"
    )
    categories = initial.numbered_categories([(n, f"c{n}") for n in range(1, 5)])
    bundle.save(tmp_path / "model", initial.random_bundle(settings, categories, 0))
    config = TrainConfig(
        train=str(packed / "train"),
        output=str(tmp_path / "out"),
        model=str(tmp_path / "model"),
        norm=norm,
        precision="fp32",
    )
    with pytest.raises(ConfigError, match="is constants"):
        train_task.make(config, gpus=True)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--workers", "7"], "do not fit"),
        (["--workers", "two"], "N or MIN..MAX"),
        (["--model", "x", "--arch", "small"], "leave --arch out"),
        (["--norm", "sync"], "needs GPUs"),
        (["--device", "gpu"], "this Ray has no GPU"),
        (["--batch-size", "4", "--accumulate", "20", "--epochs", "2"], "make no step of 1 workers"),
        (["--scale-min", "2", "--scale-max", "1"], "--scale-min"),
    ],
)
def test_what_cannot_be_is_refused_with_advice(
    packed: Path,
    tmp_path: Path,
    arguments: list[str],
    advice: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code = train(packed, tmp_path / "out", *arguments)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    assert code == 2
    assert advice in " ".join(capsys.readouterr().err.split())
