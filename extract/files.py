"""Where a backbone's files are, and their hashes: the part of the identity that needs no model in memory."""

import hashlib
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..cache.errors import BackboneError, require_extra

_CONFIG = ("config.json", "adapter_config.json", "*.py")
# No wider: tables may lie beside the LLM's files, and are none of them.
_TOKENIZER = (
    "tokenizer*.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "vocab-*.json",
    "merges.txt",
    "encoder.json",
    "bpe.codes",
    "dict.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.model",
    "*.model.v*",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
)
# transformers' own names: a repository may hold the same weights once more under others (consolidated, fp16).
_SAFE_WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
_OLD_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class BackboneFiles:
    """The files of one backbone on this machine."""

    folder: Path
    gguf_file: str | None
    name: str
    """Hub id, or the local folder's or GGUF file's name."""
    revision: str | None
    """Commit of the hub repository, None for local files."""

    def hashes(self) -> dict[str, str]:
        """sha256 over the weights, configuration and tokenizer files, under these three names."""
        return dict(self._hashes)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        if self.gguf_file is not None:
            whole = hash_files([self.folder / self.gguf_file])
            return {"weights": whole, "config": whole, "tokenizer": hash_files(self._matching(_TOKENIZER), whole)}
        weights = self._matching(_SAFE_WEIGHTS) or self._matching(_OLD_WEIGHTS)
        if not weights:
            raise BackboneError(
                f"{self.folder} holds no weights: expected model*.safetensors or pytorch_model*.bin"
                + (
                    f", and for a GGUF name the file: {', '.join(found)}"
                    if (found := sorted(path.name for path in self.folder.glob("*.gguf")))
                    else ""
                )
            )
        return {
            "weights": hash_files(weights),
            "config": hash_files(self._matching(_CONFIG)),
            "tokenizer": hash_files(self._matching(_TOKENIZER)),
        }

    def _matching(self, patterns: tuple[str, ...]) -> list[Path]:
        names = [path for path in sorted(self.folder.iterdir()) if path.is_file()]
        return [path for path in names if any(fnmatch(path.name, pattern) for pattern in patterns)]


def find_backbone(model: str | Path, *, gguf_file: str | None, revision: str | None) -> BackboneFiles:
    """Find a backbone's files: a local folder, a local GGUF file, or a hub repository, which is fetched if need be.

    The hub's offline modes (HF_HUB_OFFLINE) hold.

    Raises:
        BackboneError: if there is no such model.
        MissingExtraError: for a GGUF, if the packages that read it are not installed.
    """
    local = Path(model).expanduser().absolute()  # so that a later chdir does not move it
    if local.is_file() and local.suffix == ".gguf" and gguf_file is None:
        local, gguf_file = local.parent, local.name
    if gguf_file is not None:
        for package in ("gguf", "accelerate"):
            require_extra(package, "extract", "Reading a GGUF file")
    if local.is_dir():
        if revision is not None:
            raise BackboneError(f"--revision is for models of the hub, and {model} is a folder on this machine")
        if gguf_file is not None and not (local / gguf_file).is_file():
            raise BackboneError(f"{local} holds no file {gguf_file!r}")
        if gguf_file is None and not (local / "config.json").is_file():
            raise BackboneError(
                f"{local} is not a model: it has no config.json. For a GGUF file, give the file itself as the model"
            )
        return BackboneFiles(local, gguf_file, local.resolve().name if gguf_file is None else gguf_file, None)
    return _from_hub(str(model), gguf_file, revision)


def _from_hub(model: str, gguf_file: str | None, revision: str | None) -> BackboneFiles:
    hub: Any = require_extra("huggingface_hub", "extract", "Fetching a model")
    looks_like_a_path = model.endswith(".gguf") or model.startswith((".", "~", "/"))
    if looks_like_a_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise BackboneError(f"no such model: {model!r} is no folder or GGUF file on this machine, and no hub id")
    weights = (gguf_file,) if gguf_file else _SAFE_WEIGHTS
    try:
        get = partial(hub.snapshot_download, model, revision=revision, ignore_patterns=["*/*"])
        folder = get(allow_patterns=[*_CONFIG, *_TOKENIZER, *weights])
        if gguf_file is None and not list(Path(folder).glob("model*.safetensors")):
            folder = get(allow_patterns=list(_OLD_WEIGHTS))
    except (OSError, ValueError, RuntimeError, hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"no such model: {model!r} is no folder or GGUF file on this machine, and the hub did not give it: {reason}"
        ) from None
    name = model if gguf_file is None else f"{model}/{gguf_file}"
    return BackboneFiles(Path(folder), gguf_file, name, Path(folder).name)


def hash_files(paths: list[Path], *more: str) -> str:
    """sha256 over the content of a single file, or over names and contents of several, and more text."""
    if len(paths) == 1 and not more:  # its name does not matter: a renamed GGUF is the same backbone
        return _hash_file(paths[0])
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name}\0{_hash_file(path)}\0".encode())
    for text in more:
        total.update(text.encode())
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    # In the hub's cache a large file is a link to a blob that is named by its sha256: no need to read it again.
    blob = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
