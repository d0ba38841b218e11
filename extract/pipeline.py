"""`extract_cache`: texts through the frozen LLM into a cache, resumable at every shard."""

import hashlib
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import DataError
from ..cache.exact import exact_range
from ..cache.identity import Identity
from ..cache.info import padding_overhead
from ..cache.manifest import SkippedRow
from ..cache.speed import add_speed
from ..cache.validation import VALIDATION_NAMES
from ..cache.writer import CacheWriter, SplitRows, SplitWriter, manifest_to_resume
from .adapter import open_adapter, tuning_kind
from .backbone import Backbone
from .batches import Budget, run_in_batches
from .files import find_backbone
from .progress import Progress
from .readouts import ReadoutSummary, add_readouts, plan_questions
from .rows import SplitData
from .settings import ExtractSettings
from .sink import ShardSink, SinkShard
from .sources import TextData, load_texts
from .start import slots


@dataclass(frozen=True)
class ExtractSummary:
    """What an extraction did, and what the cache's new splits hold."""

    folder: Path
    rows: int
    tokens: int
    bytes: int
    padding_overhead: float
    """Padded ÷ real token slots."""
    computed_tokens: int
    """Tokens whose hidden states came out of the backbone this time; fewer than `tokens` when a run is resumed."""
    seconds: float
    """Time from the first forward pass to the last commit."""
    skipped: tuple[tuple[str, SkippedRow], ...] = ()
    """(split, row) of each row that was left out since its hidden states could not be stored."""
    readouts: tuple[ReadoutSummary, ...] = ()
    """What the LLM's own answers were written of."""


def extract_cache(cache: str | Path, settings: ExtractSettings, *, progress: Progress | None = None) -> ExtractSummary:
    """Run the frozen LLM over texts and cache its token-level hidden states.

    Run again after an interruption, it goes on where it stopped. Splits can be added to a cache later, with the same
    settings.

    Args:
        cache: folder of the cache, made if it is not there.
        settings: backbone, rows and layers.
        progress: hears of notes and progress; None for silence.

    Raises:
        DataError: for rows that cannot be used, before the backbone is loaded.
        BackboneError: if the model is not found or cannot be run, or is an encoder and readouts are asked for.
        SettingsError: if a layer is deeper than the backbone, or the device is not there.
        AdapterError: if the adapter cannot be used with that model.
        CacheError: if the folder holds a cache, or readouts, made with anything different.
    """
    folder = Path(cache).resolve()
    known = manifest_to_resume(folder)
    # Rows before the model: one of the hub is gigabytes to fetch, and a wrong column is not worth that.
    data = load_texts(settings, known.label_range if known is not None else None)
    backbone = open_backbone(settings)
    if not settings.readouts:
        return fill_cache(folder, data, backbone, settings, progress=progress)
    questions = plan_questions(data, backbone, settings, choose_max_length(settings.max_length, backbone))
    summary = fill_cache(folder, data, backbone, settings, progress=progress)
    backbone.release()
    return replace(summary, readouts=add_readouts(folder, data, questions, backbone, settings, progress))


def open_backbone(settings: ExtractSettings) -> Backbone:
    """Find the backbone and read its configuration and tokenizer; its weights are loaded when they are needed.

    Raises:
        BackboneError: if it is not found, or is none.
        AdapterError: if the adapter cannot be read, or is one of another backbone.
        SettingsError: if a layer is deeper than the backbone, or the device is not there.
    """
    files = find_backbone(settings.model, gguf_file=settings.gguf_file, revision=settings.revision)
    return Backbone(
        files,
        adapter=open_adapter(settings.adapter, files) if settings.adapter is not None else None,
        layers=settings.layers,
        compute_dtype=settings.compute_dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )


def fill_cache(
    folder: Path, data: TextData, backbone: Backbone, settings: ExtractSettings, *, progress: Progress | None = None
) -> ExtractSummary:
    """`extract_cache`, once the texts are read and the backbone is found."""
    note = progress.note if progress is not None else _ignore
    if data.range_was_taken:
        taken = exact_range(data.label_range)
        note(f"label range {taken}, taken from the training split (--label-range sets it)")
    max_length = choose_max_length(settings.max_length, backbone)
    maker = made_by(backbone)
    if backbone.adapter is not None:
        backbone.adapter.refuse_own_rows(data.splits)
    writer = CacheWriter(
        folder,
        identity=identify(backbone, settings, prompt=data.prompt, max_length=max_length),
        label_range=data.label_range,
        task=settings.task,
        made_by=maker,
    )
    if backbone.adapter is not None:
        texts = {
            "prompt": data.prompt,
            "chat_template": settings.chat_template,
            "label_range": list(data.label_range),
        }
        validated = not {*data.splits, *writer.manifest.splits}.isdisjoint(VALIDATION_NAMES)
        for text in backbone.adapter.notes(backbone.files, texts, data.splits, validated=validated):
            note(f"note: {text}")
    splits = []
    for name, split in data.splits.items():
        tokens, cut = backbone.tokenize(
            split.texts, chat_template=settings.chat_template, max_length=max_length, truncate=settings.truncate
        )
        check_lengths(name, tokens, max_length, truncate=settings.truncate)
        rows = SplitRows(split.ids, split.targets, tokens, cut, _fingerprint(split, tokens))
        splits.append((name, rows, writer.split(name, rows, shard_rows=settings.shard_rows)))
    for text in writer.noted:
        note(f"note: {text}; hidden states may differ in their last bits")
    pending = [(name, rows, split, number) for name, rows, split in splits for number in split.pending()]
    computed = 0
    started = time.perf_counter()
    if writer.lost_manifest and not pending:
        with writer.writing():
            pass  # entering puts the manifest back
    if pending:
        with writer.writing():
            note(f"loading {backbone.files.name} ({backbone.compute_dtype}, {backbone.device})".replace("torch.", ""))
            backbone.load()
            for name, value in _made_with(backbone).items():
                writer.made_with(name, value)
            started = time.perf_counter()
            todo = [len(rows.tokens[row]) for _, rows, split, number in pending for row in split.members(number)]
            if progress is not None:
                progress.begin(len(todo), sum(todo))
            budget = Budget(settings.batch_tokens or backbone.default_batch_tokens)
            with ShardSink(skip=settings.on_nonfinite == "skip") as sink:
                started_with, read = None, 0
                for name, rows, split, number in pending:
                    if started_with != name:
                        # Of all rows of the split, the same after an interruption as before it.
                        sink.drain()
                        read = backbone.read_start(rows.tokens)
                        started_with = name
                        if read:
                            note(f"{name}: the {read:,} tokens that all rows begin with are read once")
                    computed += _extract_shard(backbone, name, rows, split, number, budget, sink, progress, read)
            seconds = time.perf_counter() - started
            add_speed(folder, maker["device"], rows=len(todo), tokens=computed, seconds=seconds)
    records = [split.record for _, _, split in splits]
    shards = [shard for record in records for shard in record.shards]
    return ExtractSummary(
        folder=folder,
        rows=sum(shard.rows for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        padding_overhead=padding_overhead(shards),
        computed_tokens=computed,
        seconds=time.perf_counter() - started,
        skipped=tuple((name, row) for name, _, split in splits for row in split.record.skipped),
    )


def choose_max_length(asked: int | None, backbone: Backbone) -> int:
    """The longest row allowed: what was asked for, or the backbone's context.

    Raises:
        DataError: if neither says a length, or more is asked for than the context.
    """
    context = backbone.context
    if asked is None and context is None:
        raise DataError(f"{backbone.files.name} does not say how long its context is; give --max-length")
    if asked is not None and context is not None and asked > context:
        raise DataError(f"--max-length {asked} is beyond the context of {backbone.files.name}, {context} tokens")
    return asked or context or 0


LONGER = "a larger --max-length keeps them whole"
CUT_OR_LONGER = f"--truncate cuts them, {LONGER}"
"""What to do about rows that are too long."""


def check_lengths(
    split: str,
    tokens: list[np.ndarray],
    max_length: int,
    *,
    truncate: bool,
    way: str = CUT_OR_LONGER,
) -> None:
    """Refuse rows that are too long, or have no token at all.

    Args:
        split: its name.
        tokens: token ids of each row.
        max_length: the most a row may have.
        truncate: whether the tokenizer has cut them already; it leaves its special tokens in, however many.
        way: what to do about rows that were not cut.

    Raises:
        DataError: saying how many rows, and how long the longest is.
    """
    lengths = np.array([len(row) for row in tokens])
    if (lengths > max_length).any():
        raise DataError(
            f"{int((lengths > max_length).sum())} of {len(tokens)} rows of {split} are longer than {max_length} tokens "
            + (
                f"even when they are cut, since the tokenizer's special tokens stay; {LONGER}"
                if truncate
                else f"(the longest has {lengths.max()}); {way}"
            )
        )
    if (lengths == 0).any():
        raise DataError(f"row {int(np.argmin(lengths))} of {split} gives no token at all; take it out")


def identify(backbone: Backbone, settings: ExtractSettings, *, prompt: str, max_length: int) -> Identity:
    """All that the hidden states depend on besides the texts."""
    return Identity(
        model=backbone.files.name,
        revision=backbone.files.revision,
        **backbone.files.hashes(),
        prompt=prompt,
        chat_template=settings.chat_template,
        max_length=max_length,
        truncate=settings.truncate,
        layers=backbone.layers,
        hidden_size=backbone.hidden_size,
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        compute_dtype=str(backbone.compute_dtype).removeprefix("torch."),
        transformers=backbone.version,
        adapter=backbone.adapter.sha256 if backbone.adapter is not None else None,
    )


def _fingerprint(split: SplitData, tokens: list[np.ndarray]) -> str:
    # The tokens too: another version of the tokenizer's library, or a chat template, may change them.
    digest = hashlib.sha256(split.fingerprint().encode())
    for row in tokens:
        digest.update(len(row).to_bytes(4, "little") + row.tobytes())
    return digest.hexdigest()


def _extract_shard(
    backbone: Backbone,
    name: str,
    rows: SplitRows,
    split: SplitWriter,
    number: int,
    budget: Budget,
    sink: ShardSink,
    progress: Progress | None,
    read: int,
) -> int:
    members = split.members(number)
    tokens = [rows.tokens[row] for row in members]
    lengths = [len(row) for row in tokens]
    names = [f"row {row} of {name} (id {rows.ids[row]!r})" for row in members]
    shard = SinkShard(partial(split.shard, number), lengths, names)
    forward = partial(_forward, backbone, tokens, split.dtype.torch)
    sizes = [slots(length, read) for length in lengths]
    for batch, states in run_in_batches(sizes, budget, forward, sink.drain, tokens=lengths):
        sink.put(shard, batch, *states)
        del states  # the sink alone holds them, and drain waits for it
        if progress is not None:
            progress.advance(len(batch), sum(lengths[i] for i in batch))
    return sum(lengths)


def _forward(backbone: Backbone, tokens: list[np.ndarray], dtype: Any, batch: range) -> tuple[Any, Any]:
    states = backbone.hidden_states([tokens[row] for row in batch])
    return states, states.to(dtype)


def made_by(backbone: Backbone) -> dict[str, str]:
    """For people: versions of relish and torch, and the device."""
    import torch

    from ..cache.version import __version__

    device = torch.cuda.get_device_name(backbone.device) if backbone.device.type == "cuda" else backbone.device.type
    return {"relish": __version__, "torch": torch.__version__, "device": device}


def _made_with(backbone: Backbone) -> dict[str, str]:
    """What tables say of a loaded backbone: its size, how its adapter was tuned, and what that took."""
    tuned = backbone.adapter.tuned if backbone.adapter is not None else None
    facts = {"parameters": f"{backbone.parameters:,}"}
    if tuned is not None:
        settings = tuned["settings"]
        facts["adapter_method"] = settings["method"]
        facts["adapter_recipe"] = f"lr {settings['lr']:g}, {settings['epochs']} epochs, seed {settings['seed']}"
        facts["adapter_kind"] = tuning_kind(tuned)[:16]
        facts["adapter_seed"] = str(settings["seed"])
        facts["adapter_rows"] = f"{tuned['data']['train_rows']:,}"
        facts["adapter_parameters"] = f"{tuned['trainable_parameters']:,}"
        facts["adapter_seconds"] = f"{tuned['seconds']:,}"
    return facts


def _ignore(_text: str) -> None:
    pass
