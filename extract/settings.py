"""Everything `relish extract` can be told, of which `relish tune` shares the backbone and the texts."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache.dtypes import storage_dtype
from ..cache.errors import SettingsError, refuse_scalars
from ..cache.readouts import KINDS, REGRESSION

Source = str | Path | Iterable[Mapping[str, Any]]
"""A CSV, TSV, JSONL or Parquet file, or the rows themselves as dicts."""

COMPUTE_DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Which backbone is to read which texts."""

    model: str | Path
    """Hub id, local folder, or GGUF file of a causal LM or an encoder."""
    gguf_file: str | None = None
    """File name of the GGUF inside that folder or hub repository."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository; its commit becomes part of the cache's identity."""
    trust_remote_code: bool = False
    """Whether to run Python code that the model's repository ships."""

    task: str | None = None
    """A preset: stsb, sick, wmt-en-zh, wmt-ru-en or wmt-si-en."""
    data: Mapping[str, Source] = field(default_factory=dict)
    """Split name to its rows."""
    hub: str | None = None
    """Hub id of a data set; a preset has one of its own."""
    hub_config: str | None = None
    """Configuration of that data set, where it has several."""
    hub_revision: str | None = None
    """Branch, tag or commit of its repository."""
    hub_splits: tuple[str, ...] = ()
    """Splits to take of it; () for all."""
    prompt: str | None = None
    """Template over column names, "{title}: {text}". Default: the preset's, or the text column alone."""
    chat_template: bool = False
    """Put the prompt through the tokenizer's chat template as a user turn."""
    target_column: str | None = None
    """Column of the gold score; guessed from the usual names if None."""
    id_column: str | None = None
    """Column of the rows' ids; guessed if None, and the row number if there is none."""
    label_range: tuple[float, float] | None = None
    """Smallest and largest possible score. Default: the preset's, or what the training split spans."""

    compute_dtype: str = "auto"
    """Type the backbone runs in; auto is the checkpoint's own on cuda and float32 elsewhere."""
    device: str = "auto"
    """cuda, mps, cpu, or auto for the first of these that is there."""
    max_length: int | None = None
    """Longest row in tokens; None for the backbone's context."""
    truncate: bool = False
    """Cut longer rows to max_length instead of refusing them."""

    def __post_init__(self) -> None:
        one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        at_least_1(self, "max_length")
        refuse_scalars(self, "hub_splits")
        if self.label_range is not None:
            low, high = self.label_range
            object.__setattr__(self, "label_range", (low, high))  # a list is as good
            if not -math.inf < low < high < math.inf:
                raise SettingsError(
                    f"the label range must go from a smaller to a larger number, not from {low} to {high}"
                )
        for split in self.data:
            if not isinstance(split, str):
                raise SettingsError(f"a split's name is text, not {split!r}")
        if self.data and self.hub:
            raise SettingsError("rows come either from files (data) or from the hub, not from both")
        if not self.data and not self.hub and not self.task:
            raise SettingsError("no rows to read: give --data SPLIT=FILE, --hub ID, or a --task preset")


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(TextSettings):
    """What to extract, from which rows, with which backbone."""

    adapter: str | Path | None = None
    """Folder of an adapter, such as `relish tune` makes, that is merged into the backbone."""
    layers: tuple[int | float, ...] = ()
    """Hidden states to keep: int an index (0 the embeddings), float a fraction of the depth; () the last."""
    dtype: str = "bfloat16"
    """Storage type: bfloat16, float16 or float32."""
    batch_tokens: int | None = None
    """Token slots per forward pass, padding included; None for 16,384 on a GPU, and 512 per thread, up to 4,096, on the
    CPU. Of a row that goes on from what all rows begin with its own tokens count, or half of all where these are more
    (extract/start.py). Readouts take no more than 4,096 and 1,024 by themselves, or as many as all prompts begin with
    where these are more; there a row's own tokens and its answer's count."""
    shard_rows: int = 4096
    """Most rows in a shard. A shard is also the most work that an interruption can cost."""
    on_nonfinite: str = "error"
    """What to do about a row whose hidden states cannot be stored (NaN, infinity, or beyond the storage type): error,
    or skip, which leaves it out of the split and names it."""

    readouts: tuple[str, ...] = ()
    """What to write of the LLM's own answers to each split but train: greedy, samples, candidates, or regression, what
    the adapter's own head predicts; () for nothing."""
    shots: tuple[int, ...] = (0,)
    """With how many solved examples in the prompt, taken from the split train: each number gives its own readouts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_scalars(self, "layers", "readouts", "shots")
        storage_dtype(self.dtype)
        one_of("on_nonfinite", self.on_nonfinite, ("error", "skip"))
        at_least_1(self, "batch_tokens", "shard_rows")
        for kind in self.readouts:
            one_of("a readout", kind, KINDS)
        if not self.shots or min(self.shots) < 0:
            raise SettingsError(f"shots must be numbers from 0 on, not {self.shots}")
        if REGRESSION in self.readouts and self.adapter is None:
            raise SettingsError(
                "the readout regression is what the head of a tuned adapter predicts; give its folder with --adapter"
            )
        if tuple(self.shots) != (0,) and not set(self.readouts) - {REGRESSION}:
            raise SettingsError(
                "shots are the examples of readouts; say which with --readouts greedy,samples,candidates"
            )
        for layer in self.layers:
            if not 0 <= layer <= (1 if isinstance(layer, float) else math.inf):
                raise SettingsError(f"a layer is an index from 0 on or a fraction of the depth up to 1.0, not {layer}")


def parse_layers(text: str) -> tuple[int | float, ...]:
    """Read `last`, `15`, `0.5` or a comma-separated list of these.

    Raises:
        SettingsError: for anything else.
    """
    layers: list[int | float] = []
    for part in text.split(","):
        word = part.strip()
        try:
            layers.append(1.0 if word == "last" else float(word) if "." in word else int(word))
        except ValueError:
            raise SettingsError(f"--layers takes 'last', indices or fractions such as 12,0.5; not {word!r}") from None
    return tuple(layers)


def parse_label_range(text: str) -> tuple[float, float]:
    """Read `0,5`.

    Raises:
        SettingsError: for anything else.
    """
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--label-range takes two numbers such as 0,5; not {text!r}") from None
    return low, high


def parse_readouts(text: str) -> tuple[str, ...]:
    """Read `greedy`, or several separated by commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def parse_shots(text: str) -> tuple[int, ...]:
    """Read `0`, or several numbers separated by commas, each once.

    Raises:
        SettingsError: for anything else.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise SettingsError(f"--shots takes numbers such as 0,128; not {text!r}") from None


def parse_data(pairs: list[str]) -> dict[str, str]:
    """Read `SPLIT=PATH` pairs.

    Raises:
        SettingsError: for a pair without =, or a split named twice.
    """
    data: dict[str, str] = {}
    for pair in pairs:
        split, equals, path = pair.partition("=")
        if not equals or not split or not path:
            raise SettingsError(f"--data takes SPLIT=FILE such as train=train.csv; not {pair!r}")
        if split in data:
            raise SettingsError(f"--data names the split {split!r} twice")
        data[split] = path
    return data


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check a setting that is one of a few words.

    Raises:
        SettingsError: naming the setting and the words.
    """
    if value not in allowed:
        raise SettingsError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def at_least_1(settings: object, *names: str) -> None:
    """Check settings that count something; None stands for a default.

    Raises:
        SettingsError: naming the setting.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SettingsError(f"{name} must be at least 1, not {value}")
