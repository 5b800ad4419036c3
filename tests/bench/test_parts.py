"""The benchmark's parts can be called by their names, and the accelerator's one on a machine without Ray."""

import importlib
import subprocess
import sys

import pytest

from tests.bench.__main__ import PARTS

WITHOUT_RAY = "import sys; sys.modules['ray'] = None; import tests.bench.__main__, tests.bench.{}"


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_a_function_of_its_module(name: str) -> None:
    module, _, function = PARTS[name].partition(".")
    assert callable(getattr(importlib.import_module(f"tests.bench.{module}"), function))


def test_the_accelerator_is_measured_without_ray() -> None:
    module, _, _ = PARTS["gpu"].partition(".")
    subprocess.run([sys.executable, "-c", WITHOUT_RAY.format(module)], check=True)
