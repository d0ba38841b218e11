from pathlib import Path

import pytest

from relish.train.grid import train_heads
from relish.train.settings import TrainSettings

from ..train.conftest import write_cache

SMALL = {"latent_size": 32, "num_heads": 4, "epochs": 2, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("evaluate") / "cache")


@pytest.fixture(scope="session")
def runs(cache: Path) -> Path:
    out = cache.parent / "runs"
    train_heads(cache, out, TrainSettings(heads=("relish", "ridge"), depths=(1, 2), seeds=(0, 1), **SMALL))
    return out
