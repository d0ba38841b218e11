"""RELISH text regression: predict a number from a text with a frozen LLM, through a feature cache.

The public names load on first use, so that `import relish` imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.errors import RelishError as RelishError
    from .cache.reader import FeatureCache as FeatureCache
    from .cache.reader import open_cache as open_cache
    from .evaluate.predict import predict_scores as predict_scores
    from .evaluate.results import evaluate_runs as evaluate_runs
    from .extract.pipeline import extract_cache as extract_cache
    from .extract.settings import ExtractSettings as ExtractSettings
    from .extract.tune import tune_adapter as tune_adapter
    from .extract.tune_settings import TuneSettings as TuneSettings
    from .train.grid import train_heads as train_heads
    from .train.head import RelishHead as RelishHead
    from .train.run import load_head as load_head
    from .train.settings import TrainSettings as TrainSettings

from .cache.version import __version__

_HOME = {
    "ExtractSettings": ".extract.settings",
    "FeatureCache": ".cache.reader",
    "RelishError": ".cache.errors",
    "RelishHead": ".train.head",
    "TrainSettings": ".train.settings",
    "TuneSettings": ".extract.tune_settings",
    "evaluate_runs": ".evaluate.results",
    "extract_cache": ".extract.pipeline",
    "load_head": ".train.run",
    "open_cache": ".cache.reader",
    "predict_scores": ".evaluate.predict",
    "train_heads": ".train.grid",
    "tune_adapter": ".extract.tune",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'relish' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
