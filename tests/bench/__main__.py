"""`make bench`: measure, append the rows to `results.csv` and print them. Name parts to run only those.

python -m tests.bench [masks] [cost] [memory] [training] [gpu] [stages] [whole] [equality] [precision] [decoding]
    [bookkeeping] [sizing]

`--gpu` is the same as `gpu`.
"""

import importlib
import sys

# Module and function. Imported when they run: the accelerator's part is for machines without Ray too.
PARTS = {
    "masks": "bench_masks.encoding",
    "cost": "bench_job.cost",
    "memory": "bench_job.memory",
    "training": "bench_train.training",
    "gpu": "bench_gpu.gpu",
    "stages": "bench_stages.stages",
    "whole": "bench_whole.whole",
    "equality": "bench_whole.equality",
    "precision": "bench_precision.precision",
    "decoding": "bench_precision.decoding",
    "bookkeeping": "bench_bookkeeping.bookkeeping",
    "sizing": "bench_sizing.sizing",
}

if __name__ == "__main__":
    chosen = [word.removeprefix("--") for word in sys.argv[1:]]
    if unknown := sorted(set(chosen) - set(PARTS)):
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in chosen or PARTS:
        module, _, function = PARTS[name].partition(".")
        getattr(importlib.import_module(f"tests.bench.{module}"), function)()
