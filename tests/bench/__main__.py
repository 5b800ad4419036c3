"""`make bench`: measure, append the rows to `results.csv` and print them. Name parts to run only those.

python -m tests.bench [masks] [cost] [memory] [training] [gpu] [stages] [whole] [precision] [decoding] [bookkeeping] [sizing]
"""

import sys

from tests.bench import (
    bench_bookkeeping,
    bench_gpu,
    bench_job,
    bench_masks,
    bench_precision,
    bench_sizing,
    bench_stages,
    bench_train,
    bench_whole,
    results,
)


def _masks() -> None:
    for found in bench_masks.rows():
        case = f"{found['case']}, {found['num_masks']} masks, one thread"
        equal = f"{found['num_equal']} of {found['num_masks']} masks equal to the byte"
        results.add(
            "mask encoding",
            [
                bench_job.row(
                    case, "paste, threshold, pycocotools", found["plain_ms"], "ms", equal
                ),
                bench_job.row(case, "segmodel.masks.encode", found["direct_ms"], "ms", equal),
                bench_job.row(case, "ratio", found["ratio"], "ratio", equal),
            ],
        )


PARTS = {
    "masks": _masks,
    "cost": bench_job.cost,
    "memory": bench_job.memory,
    "training": bench_train.training,
    "gpu": bench_gpu.gpu,
    "stages": bench_stages.stages,
    "whole": bench_whole.whole,
    "equality": bench_whole.equality,
    "precision": bench_precision.precision,
    "decoding": bench_precision.decoding,
    "bookkeeping": bench_bookkeeping.bookkeeping,
    "sizing": bench_sizing.sizing,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
