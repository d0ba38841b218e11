"""The backbones that benchmarks run, as plain folders that every library can load."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

WORDS = ("warm", "clever", "bright", "moving", "fresh", "dull", "clumsy", "bleak", "noisy", "stale", "film", "play")

# Read when transformers is imported, here and in the processes that are started.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in float32, written once from the GGUF file that `relish demo` fetches.

    The weights are a link to a file named by its hash, as in the hub's cache: nobody has to hash them again.
    """
    from relish.evaluate.assets import assets_folder

    target = assets_folder() / "SmolLM2-135M-Instruct"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=assets_folder()) as scratch:
            _dequantise(Path(scratch) / "model")
            (Path(scratch) / "model").rename(target)
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


def _dequantise(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from relish.evaluate.assets import smollm2

    file = smollm2()
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
