import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

# A busy machine takes longer for an example than it did for the one before, which is no failure.
settings.register_profile("relish", deadline=None)
settings.load_profile("relish")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes of tests, each of which starts more: threads of all of these would only wait for cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

GOOD = ("warm", "clever", "bright", "moving", "fresh")
BAD = ("dull", "clumsy", "bleak", "noisy", "stale")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: one that begins last leaves the other process with nothing to do for minutes."""
    items.sort(key=lambda item: item.path.name != "test_benchmarks.py")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the published data sets, which are kept beside the repository and not in it."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        reason = "the published data sets are not at ../shared/data"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model("llama")` is the folder of a small random model with its tokenizer; made once, the same every time.

    Architectures: llama (left padding, chat template), qwen3, gemma3, gpt2 (no pad token), bert (an encoder).
    """
    made: dict[str, Path] = {}
    home = tmp_path_factory.mktemp("models")

    def model(arch: str) -> Path:
        if arch not in made:
            made[arch] = _save_tiny_model(arch, home / f"tiny-{arch}")
        return made[arch]

    return model


@pytest.fixture(scope="session")
def tiny_rows() -> Callable[..., list[dict[str, Any]]]:
    """`tiny_rows(60, seed=0)` gives rows {"id", "text", "score"}: the score is 5 times the share of kind words."""

    def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
        draw = Random(seed)
        found = []
        for number in range(count):
            words = [draw.choice(GOOD if draw.random() < number / (count - 1) else BAD) for _ in range(4 + number % 7)]
            score = 5 * sum(word in GOOD for word in words) / len(words)
            found.append({"id": f"{seed}-{number}", "text": f"a film so {' '.join(words)}", "score": score})
        draw.shuffle(found)
        return found

    return rows


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_rows: Any) -> Path:
    """A cache of the tiny llama's last layer: train (60 rows), dev (20), test (20), labels from 0 to 5."""
    from relish.extract.pipeline import extract_cache
    from relish.extract.settings import ExtractSettings

    folder = tmp_path_factory.mktemp("tiny") / "tiny-cache"
    data = {
        name: tiny_rows(count, seed) for seed, (name, count) in enumerate({"train": 60, "dev": 20, "test": 20}.items())
    }
    extract_cache(
        folder,
        ExtractSettings(model=tiny_model("llama"), data=data, prompt="{text}", label_range=(0.0, 5.0), device="cpu"),
    )
    return folder


@pytest.fixture(scope="session")
def tune_settings(tiny_model: Any, tiny_rows: Any) -> Callable[..., Any]:
    """`tune_settings("raft", lr=0.1)`: 24 training and 8 validation rows, two epochs of three steps, a tiny llama."""
    from relish.extract.tune_settings import TuneSettings

    def settings(method: str = "lora", *, arch: str = "llama", **changes: Any) -> TuneSettings:
        options: dict[str, Any] = {
            "model": tiny_model(arch),
            "data": {"train": tiny_rows(24), "dev": tiny_rows(8, 1)},
            "prompt": "Rate: {text}\nScore:",
            "label_range": (0.0, 5.0),
            "device": "cpu",
            "epochs": 2,
            "batch_size": 8,
            "lr": 1e-2,
        }
        return TuneSettings(method=method, **{**options, **changes})

    return settings


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, tune_settings: Any) -> Callable[..., Path]:
    """`tuned("raft")`: the folder of a finished adapter, made once; `tuned("lora", "gpt2")` of another architecture."""
    from relish.extract.tune import tune_adapter

    made: dict[tuple[str, str], Path] = {}
    home = tmp_path_factory.mktemp("tuned")

    def adapter(method: str = "lora", arch: str = "llama") -> Path:
        if (method, arch) not in made:
            folder = home / f"{method}-{arch}"
            tune_adapter(folder, tune_settings(method, arch=arch))
            made[method, arch] = folder
        return made[method, arch]

    return adapter


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Any]:
    """`run_cli("cache", "info", path)` runs the command line in this process: exit_code, stdout, stderr."""
    from typer.testing import CliRunner

    from relish.cli import app

    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """`room(1)`: the tiny llama's forward pass is out of memory with more rows; gives the rows of each pass."""
    import torch
    from transformers import LlamaModel

    real = LlamaModel.forward

    def begin(rows: int) -> list[int]:
        tried: list[int] = []

        def forward(self: Any, *arguments: Any, input_ids: Any, **options: Any) -> Any:
            tried.append(len(input_ids))
            if len(input_ids) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(self, *arguments, input_ids=input_ids, **options)

        monkeypatch.setattr(LlamaModel, "forward", forward)
        return tried

    return begin


class Relish:
    """Starts and awaits real `relish` processes through tests/forkserver.py."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._ask(None)

    def start(self, *arguments: object, **options: Any) -> int:
        """Begin `relish` with these arguments; gives the process id."""
        return self._ask({"start": [str(argument) for argument in arguments], **options})["pid"]

    def wait(self, pid: int) -> Any:
        """Until it has ended: code (negative after a signal), stdout, stderr."""
        return SimpleNamespace(**self._ask({"wait": pid}))

    def run(self, *arguments: object, **options: Any) -> Any:
        """Start and wait."""
        return self.wait(self.start(*arguments, **options))

    def _ask(self, request: Any) -> Any:
        if request is not None:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@pytest.fixture(scope="session")
def relish_process() -> Iterator[Relish]:
    """Real processes of the command line, quick to start: run, start and wait."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("forkserver.py"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield Relish(server)
        assert server.stdin is not None
        server.stdin.close()


def _save_tiny_model(arch: str, folder: Path) -> Path:
    import torch
    import transformers

    tokenizer = _tiny_tokenizer(arch)
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    decoder = {
        **size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if arch == "llama":
        config = transformers.LlamaConfig(**decoder, num_hidden_layers=3)
    elif arch == "qwen3":
        config = transformers.Qwen3Config(**decoder, num_hidden_layers=3)
    elif arch == "gemma3":
        # The window is shorter than the tests' rows, so that local and global attention differ.
        config = transformers.Gemma3TextConfig(
            **decoder,
            num_hidden_layers=4,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            query_pre_attn_scalar=8,
        )
    elif arch == "gpt2":
        config = transformers.GPT2Config(
            **size,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    elif arch == "bert":
        config = transformers.BertConfig(
            **size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
        )
    else:
        raise ValueError(arch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = transformers.AutoModelForMaskedLM if arch == "bert" else transformers.AutoModelForCausalLM
        kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tiny_tokenizer(arch: str) -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=321,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"a film so {word} and a play so {word}" for word in (*GOOD, *BAD)]
    # Where a text stops, a blank line is one token, as in many LLMs; where it goes on, this splitter cuts it in two.
    tokenizer.train_from_iterator([f"{text}\n\n" for text in texts], trainer)
    around = {"llama": "<s> $A", "gemma3": "<s> $A", "bert": "[CLS] $A [SEP]"}.get(arch)
    if around is not None:
        named = [(name, special.index(name)) for name in around.split() if name in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if arch == "gpt2":
        names.pop("pad_token")
    if arch == "bert":
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "<pad>"}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left" if arch == "llama" else "right",
        model_max_length=128,
        **names,
    )
    if arch == "llama":
        wrapped.chat_template = (
            "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant:{% endif %}"
        )
    return wrapped
