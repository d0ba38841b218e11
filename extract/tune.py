"""`tune_adapter`: the backbone fine-tuned on scored texts through a small adapter, resumable at every checkpoint."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache.errors import AdapterError, require_extra
from ..cache.exact import exact_range
from ..cache.fileio import write_durably, writing_cache
from ..cache.identity import name_differences
from ..cache.jsonfile import sealed_text
from ..cache.lock import lock_folder
from .adapter import (
    CHECKPOINT,
    CONFIG,
    FORMAT,
    NAMES,
    SETUP,
    TUNED,
    VERSION,
    WEIGHTS,
    adapter_hash,
    read_adapter,
    read_tuned,
)
from .backbone import Backbone
from .files import find_backbone
from .generator import refuse_encoder
from .pipeline import CUT_OR_LONGER, LONGER, check_lengths, choose_max_length, made_by
from .progress import Progress
from .regression import HEAD, load_regression_head
from .rows import hash_texts
from .sources import TextData, load_texts
from .tree import pack_size
from .tune_loop import Examples, tune
from .tune_lora import add_adapter
from .tune_methods import Answers, Method, raft_method, regression_method
from .tune_rows import TuneRows, choose_rows
from .tune_settings import TuneSettings
from .tune_state import TuneState, saved_setup


@dataclass(frozen=True)
class TuneSummary:
    """A finished adapter."""

    folder: Path
    method: str
    epochs: int
    best_epoch: int
    val: dict[str, float | None]
    """NRMSE and Pearson on the validation rows after the best epoch."""
    train_rows: int
    val_rows: int
    trainable_parameters: int
    """Of adapter and head."""
    backbone_parameters: int
    """Of the LLM, which stay as they are."""
    seconds: float
    """Of training and validation, all runs together that it took."""
    sha256: str
    """The adapter's part of the identity of a cache."""
    already: bool
    """Whether it was there already, and nothing was done."""


def tune_adapter(adapter: str | Path, settings: TuneSettings, *, listener: Progress | None = None) -> TuneSummary:
    """Fine-tune a causal LM through a LoRA adapter, and keep the weights of the best epoch.

    Run again after an interruption, it goes on from the last checkpoint; the adapter comes out as it would have, bit
    for bit on the CPU. `relish extract --adapter` then merges it into the backbone.

    Args:
        adapter: folder of the adapter, made if it is not there.
        settings: backbone, rows, method and recipe.
        listener: hears of notes and progress; None for silence.

    Raises:
        DataError: for rows that cannot be used, before the backbone is loaded.
        BackboneError: if the model is not found, cannot be run, is an encoder or of a kind that peft refuses.
        SettingsError: if the device is not there.
        AdapterError: if the folder holds something else, or an adapter that was begun with other settings, or if the
            loss is no longer finite.
        MissingExtraError: if peft is not installed.
    """
    peft: Any = require_extra("peft", "tune", "Tuning a backbone")
    folder = Path(adapter).expanduser().resolve()
    _refuse_other_files(folder)
    data = load_texts(settings, None)
    train, val = choose_rows(data, settings.rows)
    backbone = _open_backbone(settings)
    max_length = choose_max_length(settings.max_length, backbone)
    setup = _setup(settings, data, train, val, backbone, max_length)
    if listener is not None:
        _tell_rows(listener, data, val)
    with lock_folder(folder, AdapterError):
        tuned = read_tuned(folder)
        if tuned is not None:
            _refuse_other_setup(folder, tuned, setup)
            finished = read_adapter(folder)  # says so if a file was damaged
            if finished.method == "lora":
                load_regression_head(finished)
            (folder / CHECKPOINT).unlink(missing_ok=True)
            return _summary(folder, tuned, already=True)
        if (folder / CHECKPOINT).exists():
            _refuse_other_setup(folder, saved_setup(folder / CHECKPOINT), setup)
        answers = None
        if settings.method == "raft":
            answers = Answers.over(
                data.label_range, backbone=backbone, prompt=data.prompt, chat_template=settings.chat_template
            )
        examples = [_examples(rows, backbone, settings, max_length, answers) for rows in (train, val)]
        if listener is not None:
            name, kind = backbone.files.name, str(backbone.compute_dtype).removeprefix("torch.")
            listener.note(f"loading {name} ({kind}, {backbone.device})")
        device = backbone.device
        # The caller's generator stays as it was.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            tuned = _tune(peft, folder, data, backbone, examples, answers, settings, setup, listener)
        return _summary(folder, tuned, already=False)


def _tune(
    peft: Any,
    folder: Path,
    data: TextData,
    backbone: Backbone,
    examples: list[Examples],
    answers: Answers | None,
    settings: TuneSettings,
    setup: dict[str, Any],
    listener: Progress | None,
) -> dict[str, Any]:
    model = backbone.place(backbone.read_model("AutoModelForCausalLM"))
    frozen = sum(parameter.numel() for parameter in model.parameters())
    torch.manual_seed(settings.seed)
    adapted = add_adapter(peft, model, settings)
    if answers is not None:
        method = raft_method(model, backbone, answers, data.label_range)
    else:
        method = regression_method(model, backbone, examples[0].target)
    parameters = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    if method.head is not None:
        parameters |= {f"head.{name}": value for name, value in method.head.named_parameters()}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=settings.lr, weight_decay=0.0)
    state = TuneState(parameters, optimizer)
    if (folder / CHECKPOINT).exists():
        state.load(folder / CHECKPOINT)
        if listener is not None:
            listener.note(f"going on after step {state.step}")
    tune(
        adapted,
        method,
        state,
        *examples,
        settings=settings,
        label_range=data.label_range,
        device=backbone.device,
        slots=pack_size(backbone.device.type),
        save=lambda: state.save(folder / CHECKPOINT, setup),
        listener=listener,
    )
    state.restore_best()
    return _finish(peft, folder, adapted, method, state, backbone, setup, frozen)


def _finish(
    peft: Any,
    folder: Path,
    adapted: Any,
    method: Method,
    state: TuneState,
    backbone: Backbone,
    setup: dict[str, Any],
    frozen: int,
) -> dict[str, Any]:
    """Write the adapter's files, tune.json last; the checkpoint goes only then."""
    from safetensors.torch import save

    weights = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    config = adapted.peft_config["default"].to_dict()
    # A path of this machine would mean nothing on another one, and the order of a set changes from run to run.
    config |= {"base_model_name_or_path": backbone.files.name, "revision": backbone.files.revision}
    config["inference_mode"] = True
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    contents = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS: save({name: value.detach().cpu().contiguous() for name, value in weights.items()}, {"format": "pt"}),
    }
    if method.head is not None:
        contents[HEAD] = save({name: value.detach().cpu() for name, value in method.head.state_dict().items()})
    for name, content in contents.items():
        _write(folder / name, content)
    best = state.best_epoch
    assert best is not None
    tuned = {
        **setup,
        "made_by": {**made_by(backbone), "transformers": backbone.version, "peft": peft.__version__},
        "history": [asdict(record) for record in state.history],
        "best_epoch": best.epoch,
        "val": {"nrmse": best.val_nrmse, "pearson": best.val_pearson},
        "trainable_parameters": sum(parameter.numel() for parameter in state.parameters.values()),
        "backbone_parameters": frozen,
        "seconds": round(sum(record.seconds for record in state.history), 3),
        "sha256_of_adapter": adapter_hash(folder),
        "sha256_of_head": hashlib.sha256(contents[HEAD]).hexdigest() if HEAD in contents else None,
    }
    tuned["learned"] = tuned.pop("learned")  # last, since it is long, and people read this file
    _write(folder / TUNED, sealed_text({"format": FORMAT, "version": VERSION, **tuned}).encode())
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return tuned


def _write(path: Path, content: bytes) -> None:
    with writing_cache(path, "the checkpoint is kept", AdapterError):
        write_durably(path, content)


def _open_backbone(settings: TuneSettings) -> Backbone:
    backbone = Backbone(
        find_backbone(settings.model, gguf_file=settings.gguf_file, revision=settings.revision),
        layers=(),
        compute_dtype=settings.compute_dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    refuse_encoder(backbone, "and only causal LMs can be tuned")
    return backbone


def _examples(
    rows: TuneRows, backbone: Backbone, settings: TuneSettings, max_length: int, answers: Answers | None
) -> Examples:
    way = CUT_OR_LONGER
    if answers is None:
        tokens, _ = backbone.tokenize(
            rows.texts, chat_template=settings.chat_template, max_length=max_length, truncate=settings.truncate
        )
    else:
        way = LONGER  # an answer to a part of a text is none: RAFT cuts nothing
        tokens = answers.prompts.tokens(rows.texts, 0)
        answer = max(map(len, answers.tokens))
        if backbone.context is not None and backbone.context - answer <= max_length:
            max_length = backbone.context - answer
            way = (
                f"RAFT reads answers of up to {answer} tokens after each, and the context of {backbone.files.name} "
                f"holds {backbone.context}; leave these rows out, or take a backbone with a longer context"
            )
    check_lengths(rows.name, tokens, max_length, truncate=settings.truncate, way=way)
    return Examples(tokens, rows.target)


def _tell_rows(listener: Progress, data: TextData, val: TuneRows) -> None:
    if data.range_was_taken:
        taken = exact_range(data.label_range)
        listener.note(f"label range {taken}, taken from the training split (--label-range sets it)")
    unused = [name for name in data.splits if name not in ("train", val.name)]
    if unused:
        listener.note(f"not used: {', '.join(unused)}")


def _setup(
    settings: TuneSettings, data: TextData, train: TuneRows, val: TuneRows, backbone: Backbone, max_length: int
) -> dict[str, Any]:
    """All that the adapter depends on, and the texts that it learns, as tune.json and the checkpoint have it."""
    held_out = val.name == train.name  # rows that chose the epoch, and that nobody would call another split's
    return {
        "base": {
            "model": backbone.files.name,
            "revision": backbone.files.revision,
            **backbone.files.hashes(),
            "trust_remote_code": settings.trust_remote_code,
            "compute_dtype": str(backbone.compute_dtype).removeprefix("torch."),
        },
        "texts": {
            "task": settings.task,
            "prompt": data.prompt,
            "chat_template": settings.chat_template,
            "max_length": max_length,
            "truncate": settings.truncate,
            "label_range": list(data.label_range),
        },
        "data": {
            "train": train.split.fingerprint(),
            "train_rows": len(train),
            "val_split": val.name,
            "val": val.split.fingerprint(),
            "val_rows": len(val),
        },
        "settings": {
            "method": settings.method,
            "rank": settings.rank,
            "alpha": settings.alpha,
            "dropout": settings.dropout,
            "epochs": settings.epochs,
            "lr": settings.lr,
            "batch_size": settings.batch_size,
            "loss": settings.own_loss,
            "seed": settings.seed,
        },
        "learned": " ".join(sorted({*hash_texts(train.texts), *(hash_texts(val.texts) if held_out else ())})),
    }


def _refuse_other_setup(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    different = [
        (name, there[part][name], value)
        for part in SETUP
        for name, value in here[part].items()
        if name not in NAMES and there[part][name] != value
    ]
    if different:
        raise AdapterError(
            f"the adapter {folder} was begun with something else: {name_differences(different)}. Tune into another "
            "folder, or use the same settings to go on."
        )


def _refuse_other_files(folder: Path) -> None:
    if folder.is_file():
        raise AdapterError(f"{folder} is a file, and an adapter is a folder; choose a new one")
    ours = {TUNED, CHECKPOINT}
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    if there and not there & ours:
        raise AdapterError(f"{folder} holds other files and no adapter of relish; choose a new or empty folder")


def _summary(folder: Path, tuned: dict[str, Any], *, already: bool) -> TuneSummary:
    return TuneSummary(
        folder=folder,
        method=tuned["settings"]["method"],
        epochs=len(tuned["history"]),
        best_epoch=tuned["best_epoch"],
        val=tuned["val"],
        train_rows=tuned["data"]["train_rows"],
        val_rows=tuned["data"]["val_rows"],
        trainable_parameters=tuned["trainable_parameters"],
        backbone_parameters=tuned["backbone_parameters"],
        seconds=tuned["seconds"],
        sha256=tuned["sha256_of_adapter"],
        already=already,
    )
