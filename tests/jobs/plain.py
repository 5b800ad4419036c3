"""What a loop over the images finds, to hold a job's rows against."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from jobs.encode import RAW, prediction, raw_row
from segmodel import bundle
from segmodel.images import decode
from segmodel.inference import Predictor
from segmodel.schema import PREDICTIONS


def expected(photos: Path, model: Path, threads: int) -> list[dict[str, Any]]:
    """Return the rows of loose images without a job and without Ray, at most four detections in each.

    The last bits of a float depend on how many threads add up: it has to be as many as an actor has.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    loaded = bundle.load(model)
    predictor = Predictor(loaded, "cpu", score_threshold=0, max_detections=4)
    images = [decode(path.read_bytes()) for path in sorted(photos.iterdir())]
    predictions = predictor.predict(images)
    torch.set_num_threads(before)
    rows = []
    for path, found in zip(sorted(photos.iterdir()), predictions, strict=True):
        names = {"image_id": f"#{path.name}", "shard": "", "key": path.name}
        raw = dict.fromkeys(RAW.names) | raw_row(found, None) | names
        rows.append(prediction(raw, loaded.by_label()))
    return pa.Table.from_pylist(rows, schema=PREDICTIONS).to_pylist()
