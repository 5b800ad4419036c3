"""The demo, small."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.__main__ import main

pytestmark = pytest.mark.ray


def test_the_demo_makes_a_table_and_a_picture_and_can_be_run_again(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    assert main(["demo", "--output", str(output), "--scenes", "5"]) == 0
    said = capsys.readouterr().out
    assert "$ segjobs predict --input" in said
    page = output / "report" / "index.html"
    assert str(page) in said
    assert "scene-00004.jpg" in page.read_text()
    assert "mask AP" in " ".join(said.split())
    rows = pq.read_table(output / "table" / "predictions").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert all(row["detections"] for row in rows)
    with Image.open(output / "overlays.png") as picture:
        assert picture.size[0] > 4 * 320

    assert main(["demo", "--output", str(output), "--scenes", "5"]) == 0
    assert "nothing to do" in capsys.readouterr().out
