"""Adapters: LoRA weights in peft's format, checked against the backbone they belong to, and merged into it."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.errors import AdapterError, require_extra
from ..cache.exact import exact, exact_range
from ..cache.fileio import read_whole
from ..cache.jsonfile import read_versioned
from ..cache.manifest import TRAIN
from .files import BackboneFiles, hash_files
from .rows import SplitData, hash_texts

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TUNED = "tune.json"
"""What `relish tune` writes last: a folder that has it is finished."""
CHECKPOINT = "checkpoint.safetensors"
"""What an unfinished one goes on from."""
SETUP = ("base", "texts", "data", "settings")
"""The parts of tune.json that say what an adapter depends on."""
NAMES = ("model", "revision", "task")
"""Of these, what names files and rows whose hashes are there too."""
FORMAT = "relish adapter"
VERSION = 2
_BACKBONES_OWN = (".base_layer.weight", ".base_layer.bias")


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, weights not loaded."""

    folder: Path
    config: dict[str, Any]
    """adapter_config.json."""
    sha256: str
    """Over adapter_config.json and adapter_model.safetensors: part of the identity of what is extracted with it."""
    tuned: dict[str, Any] | None
    """tune.json; None for an adapter that something else than relish made."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.folder.name

    @property
    def method(self) -> str | None:
        """lora or raft; None for an adapter that something else than relish made."""
        return self.tuned["settings"]["method"] if self.tuned is not None else None

    def refuse_other_base(self, files: BackboneFiles) -> None:
        """Check that a backbone is the one it was made on, as far as its files tell; `merge_adapter` checks shapes.

        Raises:
            AdapterError: naming both.
        """
        if self.tuned is not None:
            base, here = self.tuned["base"], files.hashes()["weights"]
            if base["weights"] != here:
                raise AdapterError(
                    f"the adapter {self.name} was tuned on {base['model']} (weights {base['weights'][:12]}…), and this "
                    f"is {files.name} (weights {here[:12]}…); give its own backbone with --model"
                    + (f" and --revision {base['revision']}" if base["revision"] else "")
                )
        elif self._names_another(files) and files.revision is not None and files.gguf_file is None:
            raise AdapterError(
                f"the adapter {self.name} was made on {self.config['base_model_name_or_path']}, and this is "
                f"{files.name}; give its own backbone with --model"
            )

    def refuse_own_rows(self, splits: Mapping[str, SplitData]) -> None:
        """Check that of no split but train it has learned every text; `notes` tells where it has learned some.

        Raises:
            AdapterError: naming the split.
        """
        for name, count in self._learned(splits).items():
            if 0 < count == len(splits[name].texts):
                raise AdapterError(
                    f"the split {name!r} holds rows that the adapter {self.name} was tuned on, and no others, so that "
                    "figures on it would be no measurement; give rows that it has not seen, or call the split train"
                )

    def refuse_other_candidates(self, label_range: tuple[float, float]) -> None:
        """Check that an LLM tuned with RAFT is asked about the scores that it was tuned on.

        Raises:
            AdapterError: naming both label ranges.
        """
        if self.tuned is None or self.method != "raft":
            return
        low, high = self.tuned["texts"]["label_range"]
        if label_range != (low, high):
            raise AdapterError(
                f"the adapter {self.name} was tuned on the scores from {exact_range((low, high))}, and the label range "
                f"here is {exact_range(label_range)}; give its own with --label-range {exact(low)},{exact(high)}"
            )

    def notes(
        self, files: BackboneFiles, texts: Mapping[str, object], splits: Mapping[str, SplitData], *, validated: bool
    ) -> list[str]:
        """What a person should know who reads these texts with it.

        Args:
            files: of the backbone.
            texts: the prompt, chat_template and label_range here.
            splits: those that are read.
            validated: whether there is a validation split.
        """
        if self.tuned is None:
            if self._names_another(files):
                made_on = self.config["base_model_name_or_path"]
                return [f"the adapter {self.name} says that it was made on {made_on}, and this is {files.name}"]
            return []
        there, rows = self.tuned["texts"], self.tuned["data"]
        here = files.hashes()
        other = [name for name in ("config", "tokenizer") if self.tuned["base"][name] != here[name]]
        found = []
        if other:
            found.append(
                f"the adapter {self.name} was tuned with another {' and '.join(other)} of {files.name} than this one, "
                "and may not fit"
            )
        found += [
            f"the adapter {self.name} was tuned with {name.replace('_', ' ')} {_shown(there[name])}, and this is "
            f"{_shown(value)}" + (", so that rows which it has learned are not known again" if name == "prompt" else "")
            for name, value in texts.items()
            if there[name] != value
        ]
        found += [
            f"{count:,} of {len(splits[name].texts):,} rows of {name} have texts that the adapter {self.name} was "
            "tuned on, and figures on them will flatter"
            for name, count in self._learned(splits).items()
            if count
        ]
        learned = TRAIN in splits and splits[TRAIN].fingerprint() == rows["train"]
        if TRAIN in splits and not learned and there["prompt"] == texts["prompt"]:
            found.append(f"the adapter {self.name} was tuned on other rows or labels than those of {TRAIN} here")
        if learned and not validated and rows["val_split"] != TRAIN:
            found.append(
                f"without a validation split relish train holds out rows of {TRAIN}, which the adapter {self.name} has "
                f"learned, and its validation figures will flatter; give the split {rows['val_split']} too"
            )
        elif learned and not validated:
            found.append(
                f"relish train holds out the tenth of {TRAIN} that the adapter {self.name} has not learned; with "
                "another --val-fraction than 0.1 its validation figures will flatter"
            )
        return found

    def _learned(self, splits: Mapping[str, SplitData]) -> dict[str, int]:
        """Of each split but train how many rows have a text (a filled prompt) that it was tuned on."""
        if self.tuned is None:
            return {}
        own = set(self.tuned["learned"].split())
        return {
            name: sum(text in own for text in hash_texts(split.texts))
            for name, split in splits.items()
            if name != TRAIN
        }

    def _names_another(self, files: BackboneFiles) -> bool:
        """Whether adapter_config.json names another backbone: the last part counts, of a path or a hub id."""
        made_on = re.split(r"[\\/]", str(self.config.get("base_model_name_or_path") or ""))[-1]
        return made_on.lower() not in ("", *re.split(r"[\\/]", files.name.lower()))


def open_adapter(folder: str | Path, files: BackboneFiles) -> Adapter:
    """Read what an adapter is, for use with a backbone.

    Raises:
        AdapterError: if the folder holds none, an unfinished or damaged one, one of another kind than LoRA, or one of
            another backbone.
    """
    adapter = read_adapter(folder)
    adapter.refuse_other_base(files)
    return adapter


def read_adapter(folder: str | Path) -> Adapter:
    """Read what an adapter is.

    Raises:
        AdapterError: if the folder holds none, an unfinished or damaged one, or one of another kind than LoRA.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.is_file():
        raise AdapterError(f"{folder} is a file, and an adapter is a folder with {CONFIG} and {WEIGHTS}")
    tuned = read_tuned(folder)
    if tuned is None and (folder / CHECKPOINT).exists():
        raise AdapterError(f"the adapter {folder} is not finished; run its relish tune command again to go on")
    try:
        config = json.loads(read_whole(folder / CONFIG))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        raise AdapterError(
            f"{folder} is no adapter: it has no {CONFIG}; make one with: relish tune {folder} --method lora …"
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read ({error}); {_way_out(folder)}") from None
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder} is no adapter that can be used: it has no {WEIGHTS}, and pickle is never read")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder} is an adapter of the type {config.get('peft_type')!r}, and LORA is what can be merged "
            f"here; make one with: relish tune ADAPTER --method lora …"
        )
    sha256 = adapter_hash(folder)
    if tuned is not None and sha256 != tuned["sha256_of_adapter"]:
        raise AdapterError(
            f"the adapter {folder} is not as relish wrote it: it was edited or damaged; {_way_out(folder)}"
        )
    return Adapter(folder, config, sha256, tuned)


def read_tuned(folder: Path) -> dict[str, Any] | None:
    """tune.json; None if there is none.

    Raises:
        AdapterError: if it is damaged, or another version wrote it.
    """
    try:
        return read_versioned(
            folder / TUNED,
            format=FORMAT,
            version=VERSION,
            again="tune again into another folder",
            error=AdapterError,
            sealed=True,
        )
    except FileNotFoundError:
        return None


def tuning_kind(tuned: dict[str, Any]) -> str:
    """A hash of all of tune.json that an adapter depends on but the seed.

    Tunings by one recipe, of one backbone and on the same rows, have it in common.
    """
    parts = {
        part: {name: value for name, value in tuned[part].items() if name not in (*NAMES, "seed")} for part in SETUP
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def adapter_hash(folder: Path) -> str:
    """sha256 over the two files that peft reads, under their names."""
    return hash_files([folder / CONFIG, folder / WEIGHTS])


def merge_adapter(adapter: Adapter, model: Any, name: str) -> Any:
    """Add an adapter's low-rank products to the weights of a causal LM.

    Args:
        adapter: the adapter.
        model: of transformers' AutoModelForCausalLM; changed in place.
        name: what messages call it.

    Returns:
        The same model, without any trace of peft.

    Raises:
        AdapterError: if the model lacks a module of the adapter or has one of another shape, or the other way round; or
            if it is of a kind that is never merged.
        MissingExtraError: if peft is not installed.
    """
    peft: Any = require_extra("peft", "tune", "Using an adapter")
    from safetensors import safe_open

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing weights, which end in an error below
            wrapped = peft.PeftModel.from_pretrained(model, str(adapter.folder), torch_device="cpu")
        with safe_open(str(adapter.folder / WEIGHTS), "pt") as file:
            there = set(file.keys())
    except Exception as error:  # peft and safetensors raise whatever they like
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(_unfit(adapter, name, reason)) from error
    wanted = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    # Of an adapter of the embeddings or the LM head peft saves the backbone's own weights of these, too.
    there = {key for key in there if key in wanted or not key.endswith(_BACKBONES_OWN)}
    for what, names in (("it lacks", wanted - there), ("nothing takes its", there - wanted)):
        if names:
            raise AdapterError(_unfit(adapter, name, f"{what} {min(names)}"))
    try:
        return wrapped.merge_and_unload()
    except (RuntimeError, ValueError) as error:  # peft's, of a variant of LoRA that it has no merging for
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"the adapter {adapter.name} cannot be merged into {name}: {reason}") from error


def _shown(value: object) -> str:
    return exact_range(value) if isinstance(value, list) else repr(value)


def _unfit(adapter: Adapter, name: str, reason: str) -> str:
    made_on = adapter.config.get("base_model_name_or_path")
    told = f", {made_on}," if made_on else ""
    return (
        f"the adapter {adapter.name} does not fit {name}: {reason}; give the backbone that it was made on{told} with "
        "--model"
    )


def _way_out(folder: Path) -> str:
    return f"restore it from a copy, or delete {folder} and tune again"
