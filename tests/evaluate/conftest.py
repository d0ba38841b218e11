from pathlib import Path

import pytest

from relish.evaluate.compare import compare_reports
from relish.evaluate.compare_load import parse_source
from relish.train.grid import train_heads
from relish.train.settings import TrainSettings

from ..train.conftest import write_cache
from .reports import grid, write_report

SMALL = {"latent_size": 32, "num_heads": 4, "epochs": 2, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("evaluate") / "cache")


@pytest.fixture(scope="session")
def runs(cache: Path) -> Path:
    out = cache.parent / "runs"
    train_heads(cache, out, TrainSettings(heads=("relish", "ridge"), depths=(1, 2), seeds=(0, 1), **SMALL))
    return out


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Two report folders, of stsb and of sick."""
    home = tmp_path_factory.mktemp("reports")
    cells = {**grid(ridge=1.5, mlp=1.2, relish1=0.9, relish2=0.5), ("greedy-0shot", 0, 0): 1.8}
    notes = {("greedy-0shot", 0): {"note": "3 answers were no number", "train_seconds": None}}
    write_report(home / "stsb", cells, extras=notes)
    write_report(home / "sick", grid(ridge=0.2, relish1=0.9, relish2=1.1), task="sick", data=1)
    return [home / "stsb", home / "sick"]


@pytest.fixture(scope="module")
def comparison(reports):
    return compare_reports([parse_source(str(report)) for report in reports], resamples=200)
