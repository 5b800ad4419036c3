"""Small models for the verbs' tests."""

from pathlib import Path

import pytest

from segmodel import bundle, initial
from segmodel.settings import ModelSettings


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small architecture with random weights, an input of 64 pixels, and a gap in its ids."""
    return _random_bundle(tmp_path_factory.mktemp("tiny"), seed=7)


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same kind."""
    return _random_bundle(tmp_path_factory.mktemp("other"), seed=8)


def _random_bundle(folder: Path, seed: int) -> Path:
    settings = ModelSettings(arch="small", num_classes=3, min_size=64, max_size=128)
    categories = initial.numbered_categories([(1, "person"), (3, "car")])
    bundle.save(folder, initial.random_bundle(settings, categories, seed))
    return folder
