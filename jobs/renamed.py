"""`names.csv` of an export: the images whose files need another name than the images have."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from jobs.exported import path_of
from jobs.store import Store

Row: TypeAlias = Mapping[str, Any]

NAMES = "names.csv"
COLUMNS = ("image_id", "shard", "key", "file")


class Renamed:
    """A list in a local file, written as rows come by; `number` of them are in it."""

    def __init__(self, path: Path, file_of: Callable[[Row], str]) -> None:
        self.path = path
        self.number = 0
        self.file_of = file_of

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield rows, and write down those whose file is not called as the image."""
        with self.path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for row in rows:
                name = self.file_of(row)
                if name != path_of(row):
                    self.number += 1
                    table.writerow([row["image_id"], row["shard"], row["key"], name])
                yield row

    def put(self, output: Store) -> int:
        """Write the list to a folder, if there is anything in it; return the number of its images."""
        if self.number:
            output.put_file(NAMES, self.path)
        return self.number
