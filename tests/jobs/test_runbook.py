"""Blocks of the runbook that need no cluster, run as they are; the others are in `test_submit_cluster.py`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import versions
from tests.conftest import Bucket
from tests.infra import runbook
from tests.infra.rules import ROOT, VALUES
from tests.jobs.labelling_place import Place, without_ray

pytestmark = pytest.mark.ray


def test_names_are_put_into_the_policies(tmp_path: Path) -> None:
    shell = runbook.Shell(tmp_path / "home", VALUES)
    shutil.copytree(ROOT / "infra/aws", shell.folder / "infra/aws")
    code, said = shell.run("Install")
    assert code == 0, said
    for name, path in (("store.json", "store-policy.json"), ("head.json", "head-policy.json")):
        text = (shell.folder / name).read_text()
        expected = (ROOT / "infra/aws" / path).read_text()
        for variable, value in VALUES.items():
            expected = expected.replace(variable, value)
        assert json.loads(text) == json.loads(expected)
        # Nothing is left in capitals that is to be filled in.
        assert not [variable for variable in VALUES if variable in text]


def test_a_label_version_is_rolled_back(
    bucket: Bucket,
    tiny_bundle: Path,
    tmp_path: Path,
    jpeg: Callable[..., bytes],
    make_tar: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "place").mkdir()
    place = Place(tmp_path / "place", tiny_bundle, jpeg, make_tar)
    with monkeypatch.context() as patch:
        without_ray(patch)
        for number in range(3):
            place.put(f"{number}.tar", {f"{number}.jpg": number})
            assert place.label() == 0
    made = Path(place.named())
    data_set = bucket.store("labels/photos")
    for path in made.rglob("*"):
        if path.is_file():
            data_set.put(path.relative_to(made).as_posix(), path.read_bytes())
    current = versions.current(data_set)
    assert current is not None
    assert current.number == 3

    shell = runbook.Shell(
        tmp_path / "home", {"BUCKET": bucket.name, "AWS_ENDPOINT_URL": bucket.endpoint_url}
    )
    code, said = shell.run("Roll back a label version")
    assert code == 0, said
    current = versions.current(data_set)
    assert current is not None
    assert current.number == 2
