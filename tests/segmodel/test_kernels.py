"""What numba compiles, with and without a place to keep it."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from segmodel import kernels, masks

MODULE = """
from segmodel.kernels import kernel

@kernel
def third(total):
    return total / 3

print(third(6.0), third.stats.cache_path)
"""


@pytest.mark.parametrize("writable", [True, False])
def test_a_kernel_is_kept_where_a_folder_can_be_written_and_works_where_none_can(
    tmp_path: Path, writable: bool
) -> None:
    (tmp_path / "thirds.py").write_text(MODULE)
    # Not by permissions, which do not bind root.
    blocked = tmp_path / "file"
    blocked.touch()
    (tmp_path / "__pycache__").touch()
    cache = tmp_path / "cache" if writable else blocked
    nowhere = {"HOME": str(blocked), "XDG_CACHE_HOME": str(blocked), "NUMBA_CACHE_DIR": str(cache)}
    found = subprocess.run(
        [sys.executable, str(tmp_path / "thirds.py")],
        env={**os.environ, "PYTHONPATH": str(Path(kernels.__file__).parents[1]), **nowhere},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert float(found[0]) == 2
    if writable:
        assert Path(found[1]).is_relative_to(cache)
        assert list(Path(found[1]).glob("*.nbi"))
    else:
        assert found[1] == "None"


def test_the_rounding_of_every_operation_is_kept() -> None:
    def function(a: float, b: float) -> float:
        return a / b

    exact = kernels.kernel(function)
    assert isinstance(exact, numba.core.dispatcher.Dispatcher)
    assert not exact.targetoptions.get("fastmath")
    # As in NumPy, where Python would raise.
    assert exact(1.0, 0.0) == np.inf
    assert kernels.inlined(function).targetoptions["inline"] == "always"


def test_what_is_warmed_up_serves_all_masks() -> None:
    masks.warm_up()
    for probs in (np.ones((2, 28, 28), np.float32), np.ones((28, 28, 2), np.float32).T):
        for boxes in (np.zeros((2, 4), np.float32), np.zeros((4, 2), np.float32).T):
            # What comes out of a table cannot be written.
            for array in (probs, boxes):
                array.flags.writeable = False
            masks.encode(probs, boxes, (9, 9))
    (compiled,) = masks._encode.signatures
    assert len(compiled) == 4
