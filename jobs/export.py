"""`segjobs export --predictions URI --to FORMAT --output PATH`: a table for other tools.

Input: a table of the one schema. Output: for `coco-results`, `coco-instances` and `labelstudio` one
JSON file; for `yolo-seg` and `semantic-png` a folder with a file for each image, `_export.json`,
which says whose it is, and `names.csv` where an image's file needs another name than the image. With
`--images` the images too, at `images/` there or beside the JSON file; exit code 3 where some cannot
be read. Rows in error are left out, and counted. Rows are read 64 at a time and written as they come,
so that memory does not grow with the table, but for 24 bytes an image where images become files, 24
where a version says what they held, and for the names of all images with `--annotations`. One JSON file
waits in a local temporary file until it is whole, then is put at once (in parts of 64 MiB on S3).
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jobs import documents, image_files, join, json_files, tables, versions
from jobs.config import ConfigError, ExportConfig
from jobs.console import ImageProgress, facts, size
from jobs.contents import Contents
from jobs.detect import Input, objects_of
from jobs.exported import Row, Survey, Tally, path_of, rows, suffix_of, survey
from jobs.image_files import IMAGES
from jobs.pairing import NONE, pair
from jobs.pictures import open_images
from jobs.reference import open_truth
from jobs.renamed import NAMES, Renamed
from jobs.safe_names import below_images, safe_path
from jobs.storage import lies_within, open_store, open_uri
from jobs.store import Store
from jobs.tables import open_tables

MARK = "_export.json"
FOLDERS = ("yolo-seg", "semantic-png")
# Done, but for images that were to be written.
UNWRITTEN = 3


class ExportError(ValueError):
    """The output cannot be used as it is; the message says what to change."""


def run(config: ExportConfig) -> int:
    """Look, export, say what was left out; return the exit code."""
    if config.images and lies_within(config.output, config.images, config.endpoint_url):
        raise ConfigError(f"--output {config.output} lies within --images: choose a place outside")
    table = join.look_at(config.predictions, config.endpoint_url)
    if config.to in FOLDERS:
        tally, url = _to_folder(config, table)
    else:
        tally, url = _to_file(config, table)
    _show(config, table, tally, url)
    return UNWRITTEN if tally.unwritten else 0


def _to_file(config: ExportConfig, table: Input) -> tuple[Tally, str]:
    store, name = open_uri(config.output, config.endpoint_url)
    _refuse_file(config, store, name)
    found = survey(table, names=False)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.json"
        renamed = Renamed(Path(folder) / NAMES, lambda row: safe_path(path_of(row)))
        with path.open("w", encoding="utf-8") as file:
            _count(_written(config, table, found, tally, file, renamed), found, tally)
        if config.images is not None:
            output = open_store(store.url(IMAGES), config.endpoint_url)
            _write_images(config, table, found, tally, output, lambda row, _: renamed.file_of(row))
            tally.renamed = renamed.put(output)
        store.put_file(name, path)
    return tally, store.url(name)


def _to_folder(config: ExportConfig, table: Input) -> tuple[Tally, str]:
    output = open_store(config.output, config.endpoint_url)
    mark = {
        "to": config.to,
        "table": table.store.uri,
        "listing_sha256": table.digest(),
        "score_threshold": config.score_threshold,
        "images": config.images,
    }
    _claim(output, mark, overwrite=config.overwrite)
    found = survey(table, names=True)
    tally = Tally()
    is_yolo = config.to == "yolo-seg"
    write = image_files.write_labels if is_yolo else image_files.write_class_maps

    def name(row: Mapping[str, Any]) -> str:
        return below_images(found.name(row)) if is_yolo else found.name(row)

    with tempfile.TemporaryDirectory() as folder:
        renamed = Renamed(Path(folder) / NAMES, lambda row: name(row) + suffix_of(row))
        some = (row for _, row in rows(table, config.score_threshold, tally, masks=True))
        _count(write(renamed.watch(some), name, found.categories, output), found, tally)
        tally.renamed = renamed.put(output)
    if config.images is not None:
        beside = open_store(output.url(IMAGES), config.endpoint_url)
        suffix = image_files.image_suffix
        _write_images(
            config, table, found, tally, beside, lambda row, data: name(row) + suffix(row, data)
        )
    output.put(MARK, documents.dump({**mark, "finished": True, "counts": _counts(tally)}))
    return tally, output.uri


def _write_images(
    config: ExportConfig,
    table: Input,
    found: Survey,
    tally: Tally,
    output: Store,
    file_of: Callable[[Mapping[str, Any], bytes], str],
) -> None:
    """Write the images of all rows that are exported; see `image_files.write_images`."""
    assert config.images is not None
    images = open_images(config.images, table.store, config.endpoint_url)
    with ImageProgress(found.num_rows, 0) as progress:
        for why in image_files.write_images(table, images, file_of, output):
            if why is not None:
                tally.unwritten += 1
                tally.why = tally.why or why
            progress.advance(1)


def _written(
    config: ExportConfig,
    table: Input,
    found: Survey,
    tally: Tally,
    file: IO[str],
    renamed: Renamed,
) -> Iterator[int]:
    """Write rows to a file, and yield the number of detections of each image."""
    masks = config.to == "labelstudio"
    numbered = rows(table, config.score_threshold, tally, masks=masks)
    if config.to == "coco-results":
        with_ids = (
            _by_annotations(config, numbered, tally)
            if config.annotations
            else ((number, row) for number, (_, row) in enumerate(numbered, start=1))
        )
        return json_files.write_results(with_ids, file)
    some = renamed.watch(_with_contents(config, (row for _, row in numbered)))
    if config.to == "coco-instances":
        return json_files.write_instances(some, found.categories, file)
    assert config.image_prefix is not None
    model = tables.model(table.store, objects_of(table.objects)[0])
    version = f"segjobs {model[:12]}".strip()
    return json_files.write_tasks(some, config.image_prefix, version, file)


def _with_contents(config: ExportConfig, some: Iterator[Row]) -> Iterator[Row]:
    """Yield rows with the digests of their images, where the table is one of a version, which knows them."""
    found = versions.find(config.predictions, config.endpoint_url)
    return some if found is None else map(Contents(found[0]).noted, some)


def _by_annotations(
    config: ExportConfig, numbered: Iterator[tuple[int, Row]], tally: Tally
) -> Iterator[tuple[int, Row]]:
    """Yield rows with the ids that their images have in a COCO file, paired as `evaluate` does."""
    assert config.annotations is not None
    truth = open_truth(config.annotations, config.endpoint_url)
    if truth.image_order is None:
        raise ConfigError(
            f"--annotations {config.annotations} is a table, which has no COCO ids: name a COCO "
            "instances file, or leave it out"
        )
    names = open_tables(config.predictions, config.endpoint_url).names
    places = pair(truth.names, names, truth.ways, subset=config.subset).places
    # Names and ids are both in the order of the truth's images.
    ids = list(truth.image_order.values())
    for number, row in numbered:
        if places[number] == NONE:
            tally.others += 1
            tally.handed -= len(row["detections"])
        else:
            yield ids[places[number]], row


def _count(written: Iterator[int], found: Survey, tally: Tally) -> None:
    with ImageProgress(found.num_rows, 0) as progress:
        for detections in written:
            tally.images += 1
            tally.detections += detections
            progress.advance(1)


def _refuse_file(config: ExportConfig, store: Store, name: str) -> None:
    """Refuse to write over a file or images, or in the place of a folder.

    Raises:
        ExportError: There is one.
    """
    if not name or _holds_any(config.output, config):
        place = open_store(config.output, config.endpoint_url)
        raise ExportError(
            f"--output {config.output} is a folder, and --to {config.to} makes one file: name it, such "
            f"as {place.url('export.json')}"
        )
    there = store.url(name) if store.info(name) is not None else None
    if there is None and config.images and _holds_any(store.url(IMAGES), config):
        there = store.url(IMAGES)
    if there is not None and not config.overwrite:
        raise ExportError(
            f"{there} is there already: choose another --output, or replace it by --overwrite"
        )


def _holds_any(uri: str, config: ExportConfig) -> bool:
    return next(iter(open_store(uri, config.endpoint_url).list_objects()), None) is not None


def _claim(output: Store, mark: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make a folder this export's own, before anything is written there.

    The same export may be run again, after a crash or not. `--overwrite` removes the files of another
    export; what no export wrote is never removed, at most replaced.

    Raises:
        ExportError: There is something else.
    """
    found = None
    if output.info(MARK) is not None:
        found = documents.read(output, MARK, made_by_us=False)
    is_same = found is not None and all(found.get(name) == mark[name] for name in mark)
    anything = next(iter(output.list_objects()), None)
    if anything is not None and not is_same and not overwrite:
        what = "another export" if found is not None else f"{anything.path}, which is no export"
        raise ExportError(
            f"{output.uri} holds {what}: choose another --output, or write there by --overwrite"
        )
    if found is not None and not is_same:
        # Images that a person put there are not ours.
        own = (IMAGES,) if found.get("images") else ()
        for folder in (image_files.LABELS, image_files.MASKS, *own):
            for info in output.list_objects(folder):
                output.delete(info.path)
        for name in (*image_files.HEADS, NAMES):
            output.delete(name)
    output.put(MARK, documents.dump({**mark, "finished": False}))


def _counts(tally: Tally) -> dict[str, int]:
    return {
        "images": tally.images,
        "detections": tally.detections,
        "in_error": tally.failed,
        "below_threshold": tally.below,
        "empty": tally.empty,
        "images_unwritten": tally.unwritten,
    }


def _show(config: ExportConfig, table: Input, tally: Tally, url: str) -> None:
    notes = {
        "rows are left out: they are in error": tally.failed,
        "images are left out: the annotations have not them": tally.others,
        f"detections are left out: they score below {config.score_threshold}": tally.below,
        "detections are left out: their masks are empty": tally.empty,
        f"images need files of another name, as {NAMES} has them": tally.renamed,
        f"images are not written: {tally.why}": tally.unwritten,
    }
    if config.images is None and config.to != "coco-results":
        notes[
            "images lie inside of tars or Parquet, where other tools cannot read them: --images writes them"
        ] = tally.inside
    facts(
        "Exported",
        [
            ("table", f"{size(sum(table.objects['size'].to_pylist()))}: {table.store.uri}"),
            ("images", f"{tally.images}"),
            ("detections", f"{tally.detections}"),
            *(("note", f"{number} {words}") for words, number in notes.items() if number),
            *(("note", words) for words in _advice(config)),
            (config.to, url),
        ],
    )


def _advice(config: ExportConfig) -> Iterator[str]:
    if config.to == "labelstudio":
        yield (
            f'the project needs <Image name="{json_files.TO_NAME}" value="$image"/> and '
            f'<BrushLabels name="{json_files.FROM_NAME}" toName="{json_files.TO_NAME}">'
        )
    if config.to == "yolo-seg":
        yield "holes are filled and pieces joined"
        if config.images is None:
            yield "put the images beside labels/, at images/, or have them written by --images"
    if config.to == "coco-results" and config.annotations is None:
        yield "images are numbered as in coco-instances of this table; --annotations takes other ids"
