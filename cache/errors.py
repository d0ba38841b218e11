"""The errors that a person meets: one or two sentences on what was wrong, what was expected, and what to do next."""

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class RelishError(Exception):
    """Base of every error this package raises on purpose. The command line prints it and exits with code 2."""


class DataError(RelishError):
    """The user's rows: a missing column, an empty text, a target that is no number or lies outside the range."""


class CacheError(RelishError):
    """The cache on disk: absent, incomplete, damaged, of another version, or made by something else."""


class DamagedCacheError(CacheError):
    """The manifest itself is damaged or lost; `relish cache verify` reports it as it does a bad shard."""


class BackboneError(RelishError):
    """The LLM: not found, of an unsupported kind, or not the one that was asked for."""


class AdapterError(RelishError):
    """A tuned adapter: absent, unfinished, damaged, of another backbone, or begun with other settings."""


class RunError(RelishError):
    """A run folder: empty, unfinished, damaged, or holding cells of another training."""


class SettingsError(RelishError, ValueError):
    """A setting outside what it may be, or two settings that contradict each other."""


class MissingExtraError(RelishError, ImportError):
    """An optional dependency is not installed; the message names the pip command."""


def refuse_scalars(settings: object, *names: str) -> None:
    """Refuse a single value where settings take several: a string would be taken for its letters.

    Raises:
        SettingsError: naming the setting.
    """
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise SettingsError(f"{name} takes several values; got {value!r}: give ({value!r},) for one")


def require_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: the module to import, such as "transformers".
        extra: the extra of relish-llm that brings it, such as "extract".
        purpose: what needs it, to start the sentence: "Running a backbone".

    Raises:
        MissingExtraError: if the module is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {module!r}, which is not installed; run: pip install 'relish-llm[{extra}]'"
        ) from None
