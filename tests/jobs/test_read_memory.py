"""What reading a chunk of a Parquet shard takes at its peak, as the kernel counts it (Linux)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.index import MAX_CHUNK_BYTES
from jobs.read import BYTES_AT_A_TIME, ROWS_AT_A_TIME

IMAGE_BYTES = 8 * 2**20
# The chunk as it is read and as an Arrow table; rows that are decompressed, on their way, and what the
# allocator keeps of them.
BOUND = 2 * MAX_CHUNK_BYTES + 8 * BYTES_AT_A_TIME

PROGRAM = """
import json, pathlib, sys
from jobs import index, storage
from jobs.read import Source, read_chunk

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

store = storage.open_store(sys.argv[1])
chunks = index.index_parquet(store, store.info("a.parquet"), 256, None)
source = Source(store=store, lists=store, endpoint_url=None, image_column=None)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS:")
table = read_chunk(chunks[-2], source)
peak = status("VmHWM:") - before
print(json.dumps([peak, len(chunks), [len(data.as_py()) for data in table["data"]]]))
"""


def test_huge_rows_of_a_huge_row_group_are_not_held_together(tmp_path: Path) -> None:
    rows = ROWS_AT_A_TIME
    pq.write_table(
        pa.table({"image": pa.array([bytes(IMAGE_BYTES)] * rows, pa.binary())}),
        tmp_path / "a.parquet",
        compression="zstd",
        use_dictionary=False,
        # A page is decompressed whole: one for each row.
        write_batch_size=1,
    )
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        # So that what is freed is given back, and not used again unseen.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, num_chunks, sizes = json.loads(ended.stdout)
    most = (MAX_CHUNK_BYTES - 1) // IMAGE_BYTES
    assert num_chunks == -(-rows // most)
    assert sizes == [IMAGE_BYTES] * most
    assert peak < BOUND < rows * IMAGE_BYTES / 2 + 1
