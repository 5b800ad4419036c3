"""Synthetic scenes as a user's data would come: WebDataset shards of JPEGs, and a COCO file of their truth."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from segmodel import scenes
from segmodel.scenes import Scene

SHARDS, TRUTH = "shards", "truth.json"


def names(num_scenes: int) -> list[str]:
    """Return the file names of so many scenes."""
    return [f"scene-{number:05d}.jpg" for number in range(num_scenes)]


def make(folder: Path, seeds: range, scenes_per_shard: int) -> list[Scene]:
    """Draw a scene for each seed, and write `shards/*.tar` and `truth.json` into `folder`.

    The same call gives the same bytes. Shards that are there and the same are not touched: a plan
    knows a local shard by its time of change.
    """
    made = [scenes.scene(seed) for seed in seeds]
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    file_names = names(len(made))
    for start in range(0, len(made), scenes_per_shard):
        path = folder / SHARDS / f"scenes-{start // scenes_per_shard:03d}.tar"
        data = _tar(made[start : start + scenes_per_shard], file_names[start:])
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    (folder / TRUTH).write_text(json.dumps(scenes.coco(made, file_names)))
    return made


def _tar(made: Sequence[Scene], file_names: Sequence[str]) -> bytes:
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for one, name in zip(made, file_names, strict=False):
            encoded = io.BytesIO()
            Image.fromarray(one.image).save(encoded, "JPEG", quality=92)
            member = tarfile.TarInfo(name)
            member.size = encoded.tell()
            encoded.seek(0)
            archive.addfile(member, encoded)
    return shard.getvalue()
