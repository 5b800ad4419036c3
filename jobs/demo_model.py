"""`make demo-model`: the model bundle of the demo, trained from nothing on synthetic scenes.

python -m jobs.demo_model FOLDER: draws scenes that the demo never shows, packs them, trains by
`segjobs train` with `recipes/demo.yaml`, then at a higher resolution with `demo-fine.yaml` and
`demo-last.yaml`, and puts the bundle in place of the shipped one. The same seeds give the same
scenes, order and draws; run again with the same folder to go on.
"""

import shlex
import shutil
import sys
from pathlib import Path

from jobs import scene_shards
from jobs.__main__ import main
from jobs.console import console
from jobs.demo import MODEL

RECIPES = Path(__file__).with_name("recipes")
# Each goes on from the bundle of the one before.
STAGES = ("demo.yaml", "demo-fine.yaml", "demo-last.yaml")
# The demo's own scenes have the seeds from 0 on.
TRAIN_SEEDS = range(1_000_000, 1_003_000)
VAL_SEEDS = range(2_000_000, 2_000_100)
SCENES_PER_SHARD = 500


def make(folder: Path) -> int:
    """Do all of it; return the exit code."""
    for name, seeds in (("train", TRAIN_SEEDS), ("val", VAL_SEEDS)):
        made = folder / f"{name}-scenes"
        if not (made / scene_shards.TRUTH).exists():
            scene_shards.make(made, seeds, SCENES_PER_SHARD)
        code = _segjobs(
            *("pack", "--images", f"{made / scene_shards.SHARDS}"),
            *("--annotations", f"{made / scene_shards.TRUTH}", "--output", f"{folder / name}"),
        )
        if code:
            return code
    sets = ("--train", f"{folder / 'train'}", "--val", f"{folder / 'val'}")
    start: tuple[str, ...] = ()
    for recipe in STAGES:
        output = folder / recipe.removesuffix(".yaml")
        code = _segjobs(
            *("train", "--config", f"{RECIPES / recipe}", *start, *sets, "--output", f"{output}")
        )
        if code:
            return code
        start = ("--model", f"{output / 'bundle'}")
    shutil.copytree(output / "bundle", MODEL, dirs_exist_ok=True)
    console.print(f"The demo's model is now {MODEL}.")
    return 0


def _segjobs(*arguments: str) -> int:
    console.print(f"$ segjobs {shlex.join(arguments)}", style="bold cyan", markup=False)
    return main(arguments)


if __name__ == "__main__":
    sys.exit(make(Path(sys.argv[1])))
