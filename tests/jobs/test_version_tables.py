"""The tables of a version in other hands: exported, shown on a page, opened as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.__main__ import main
from tests.jobs import labelling_place
from tests.jobs.labelling_place import Place


@pytest.fixture
def place(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_bundle: Path,
    jpeg: Callable[..., bytes],
    make_tar: Any,
) -> Place:
    labelling_place.without_ray(monkeypatch)
    return Place(tmp_path, tiny_bundle, jpeg, make_tar)


def export(table: str, to: str, output: Path, *more: str) -> int:
    return main(["export", "--predictions", table, "--to", to, "--output", str(output), *more])


@pytest.mark.parametrize("table", ["accepted", "review", "rejected"])
def test_classes_are_those_of_the_version(place: Place, tmp_path: Path, table: str) -> None:
    """Numbers of classes stay, whichever of them occur in a table."""
    # Of persons, 1 in the data set, no table has any.
    place.policy(
        "score_threshold: 0.6\nreview_from: 0.4\naudit_share: 1\nother_categories: false\n"
        "categories: {car: {}}\n"
    )
    place.put("a.tar", {f"{n}.jpg": n for n in range(12)})
    assert place.label() == 0
    uri = place.named("versions", "1", table)
    rows = place.rows(1, table).values()
    if table != "rejected":
        assert {one["category_id"] for row in rows for one in row["detections"]} == {3}
    assert export(uri, "yolo-seg", tmp_path / "yolo") == 0
    names = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["names"]
    assert names == {0: "person", 1: "car"}
    assert export(uri, "semantic-png", tmp_path / "maps") == 0
    legend = json.loads((tmp_path / "maps/legend.json").read_text())["classes"]
    assert [(one["value"], one["category_id"]) for one in legend] == [(1, 1), (2, 3)]
