"""`predict_scores`: new texts through the backbone and trained heads, a file of any length in bounded memory."""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..cache.dtypes import storage_dtype
from ..cache.errors import DataError, RunError
from ..cache.fileio import replace_durably
from ..cache.identity import Identity, name_differences
from ..extract.adapter import Adapter, open_adapter
from ..extract.backbone import Backbone
from ..extract.batches import Budget, run_in_batches
from ..extract.files import find_backbone
from ..extract.rows import Columns, check_utf8, fill_row, resolve_columns
from ..extract.start import slots
from ..extract.tables import read_rows
from ..extract.tasks import get_task
from ..train.run import Run, load_head, load_run
from ..train.saving import writing
from ..train.settings import MIX, Layer
from .files import refuse_read_only

_CHUNK = 1024  # rows that are tokenised, sorted by length and scored together


def predict_scores(
    run: str | Path | Sequence[str | Path],
    *,
    model: str | Path,
    data: str | Path,
    out: str | Path,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    prompt: str | None = None,
    layer: Layer | None = None,
    device: str = "auto",
    batch_tokens: int | None = None,
    note: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Score the rows of a file; the scores are those `evaluate` would give the same rows.

    Of several runs, such as the seeds of one head or the folds of a cross-validation, each score is the mean of theirs
    (an ensemble): the backbone reads a text once, and seeds as a rule predict better together than one by one. A run
    that is named twice counts once.

    Every row is checked before the backbone is loaded, and `out` appears only when it is complete: a row for each row
    of the input, in its order. Ids may repeat. Of two that write one `out` at the same time, the later one's stays.

    Args:
        run: a run folder, or several of one cache and layer.
        model: the backbone the heads were trained on: hub id, folder or GGUF file.
        data: CSV, TSV, JSONL or Parquet with the columns that the head's prompt names; labels are not needed.
        out: CSV to write: the input's columns and `score` (`prediction`, if the input has a column `score`). JSONL's
            columns are the keys of all its rows, in the order in which they first appear.
        gguf_file: name of the GGUF inside the folder or repository.
        revision: of the hub repository.
        trust_remote_code: whether to run Python code of the model's repository.
        adapter: folder of the adapter that the cache of the head was extracted with.
        prompt: if given, must be the head's own.
        layer: if given, must be the head's own.
        device: cuda, mps, cpu or auto.
        batch_tokens: token slots per forward pass; None for a default by device.
        note: hears what a person should know.
        progress: called with rows done and rows in all.

    Returns:
        How many rows were scored.

    Raises:
        RunError: if a run cannot be used or was changed since it was saved, runs read different hidden states or are of
            different label ranges, if `out` cannot be written, or if backbone, adapter, prompt or layer are not those
            the head was trained on.
        AdapterError: if the adapter cannot be read, or is one of another backbone.
        DataError: naming the row, if one cannot be used.
        BackboneError: if the backbone cannot be run.
    """
    import torch

    data, out = Path(data).absolute(), Path(out).absolute()  # so that a later chdir moves none
    runs = [load_run(path) for path in _folders(run)]
    _refuse_other_trainings(runs)
    heads = [load_head(one) for one in runs]
    trained = runs[0]
    identity = trained.identity
    if out.suffix.lower() != ".csv":
        raise DataError(f"the scores are written as CSV; give --out a name that ends in .csv, not {out.name!r}")
    if out.exists() and data.exists() and out.samefile(data):
        raise DataError(f"--out is the same file as --data, {data}, which would be lost; choose another name")
    if out.is_dir():
        raise DataError(f"{out} is a folder; --out takes the name of a file")
    refuse_read_only(out, out.parent)
    _refuse("prompt", identity.prompt, prompt, trained)
    _refuse("layer", trained.layer, layer, trained)
    if revision is None and str(model) == identity.model:
        revision = identity.revision  # a hub model that has moved on since then is not the one the head knows
    files = find_backbone(model, gguf_file=gguf_file, revision=revision)
    for part, digest in files.hashes().items():
        if digest != getattr(identity, part):
            raise RunError(
                f"{model} is not the backbone that {trained.path.name} was trained on, {identity.model}: the hash of "
                f"its {part} files is {digest[:12]}…, not {getattr(identity, part)[:12]}…. Give that one with --model"
                + (f" and --revision {identity.revision}" if identity.revision else "")
            )
    merged = open_adapter(adapter, files) if adapter is not None else None
    _refuse_other_adapter(merged, trained)
    columns = _columns(data, trained)
    backbone = Backbone(
        files,
        adapter=merged,
        layers=trained.layers,
        compute_dtype=identity.compute_dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if backbone.version != identity.transformers and note is not None:
        note(f"transformers is {backbone.version}; the head was trained with {identity.transformers}")
    total, names = 0, dict[str, None]()
    for rows, _ in _tokenised(data, columns, identity, backbone):
        total += len(rows)
        names.update(dict.fromkeys(chain.from_iterable(rows)))
    backbone.load()
    for head in heads:
        head.to(backbone.device)
    budget = Budget(batch_tokens or backbone.default_batch_tokens)
    stored = storage_dtype(identity.dtype).torch

    def forward(tokens: list[np.ndarray], batch: range) -> Any:
        rows = [tokens[row] for row in batch]
        states = backbone.hidden_states(rows).to(stored)
        if trained.layer != MIX:
            states = states[:, 0]
        mask = torch.arange(states.shape[-2]) < torch.tensor([len(row) for row in rows])[:, None]
        mask = mask.to(states.device)
        with torch.inference_mode():
            return torch.stack([head(states, mask) for head in heads], dim=1).cpu().double().numpy()

    added = next(
        name for name in chain(("score", "prediction"), (f"prediction_{n}" for n in count(2))) if name not in names
    )
    if added != "score" and note is not None:
        note(f"{data.name} has a column 'score'; the new one is called {added!r}")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")  # of this process alone
    done = 0
    try:
        with writing(out, "no scores were written"), _finishing(temporary, out) as file:
            writer = csv.writer(file)
            writer.writerow([*names, added])
            for rows, tokens in _tokenised(data, columns, identity, backbone):
                scores = np.empty((len(tokens), len(heads)))
                order = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
                longest_first = [tokens[row] for row in order]
                read = backbone.read_start(tokens)
                lengths = [len(row) for row in longest_first]
                sizes = [slots(length, read) for length in lengths]
                passes = run_in_batches(sizes, budget, partial(forward, longest_first), tokens=lengths)
                for batch, values in passes:
                    scores[[order[i] for i in batch]] = values
                if not np.isfinite(scores).all():
                    bad, which = np.argwhere(~np.isfinite(scores))[0].tolist()
                    raise DataError(
                        f"the score of row {done + bad} of {data.name} is not finite with {runs[which].path.name}; "
                        "take the row out"
                    )
                for row, value in zip(rows, scores.mean(axis=1).tolist(), strict=True):
                    writer.writerow([*(row.get(name, "") for name in names), repr(value)])
                done += len(rows)
                if progress is not None:
                    progress(done, total)
    finally:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
    return done


@contextmanager
def _finishing(temporary: Path, final: Path) -> Iterator[TextIO]:
    """A file to write into, which takes its name once the block is done."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    replace_durably(temporary, final)


def _folders(run: str | Path | Sequence[str | Path]) -> list[Path]:
    several = [run] if isinstance(run, (str, Path)) else list(run)
    if not several:
        raise RunError("there is no run to predict with; name one, such as runs/relish-L3-seed0")
    return list({Path(path).resolve(): Path(path).absolute() for path in several}.values())


def _refuse_other_trainings(runs: Sequence[Run]) -> None:
    first = runs[0]
    for other in runs[1:]:
        different = other.identity.differences(first.identity)
        different += [
            (name, there, here)
            for name, there, here in (
                ("layer", other.layer, first.layer),
                ("label_range", list(other.label_range), list(first.label_range)),
            )
            if there != here
        ]
        if different:
            raise RunError(
                f"{other.path} was trained on something else than {first.path}: {name_differences(different)}. Name "
                "runs of one cache and layer, or predict with each alone"
            )


def _refuse(name: str, have: object, want: object, run: Run) -> None:
    if want is not None and want != have:
        raise RunError(f"{run.path.name} was trained with the {name} {have!r}, not {want!r}; leave --{name} out")


def _refuse_other_adapter(given: Adapter | None, run: Run) -> None:
    wanted = run.identity.adapter
    if wanted == (given.sha256 if given is not None else None):
        return
    if wanted is None:
        raise RunError(f"{run.path.name} was trained on states of the backbone alone; leave --adapter out")
    here = "none was given" if given is None else f"{given.name} is {given.sha256[:12]}…"
    raise RunError(
        f"{run.path.name} was trained on states of the backbone with the adapter {wanted[:12]}…, and {here}; give that "
        "one with --adapter"
    )


def _columns(data: Path, run: Run) -> Columns:
    first = next(iter(read_rows(data)), None)
    if first is None:
        raise DataError(f"{data.name} holds no rows")
    task = get_task(run.task) if run.task is not None else None
    columns = resolve_columns(list(first), prompt=run.identity.prompt, task=task, need_target=False, source=data.name)
    return Columns(columns.texts, None, None)


def _tokenised(
    data: Path, columns: Columns, identity: Identity, backbone: Backbone
) -> Iterator[tuple[list[dict[str, object]], list[np.ndarray]]]:
    """Chunks of rows and their token ids, each row checked."""
    numbered = enumerate(read_rows(data))
    while chunk := list(islice(numbered, _CHUNK)):
        for number, row in chunk:
            for column, cell in row.items():  # every column is written again beside the score
                for text in (column, cell):
                    if isinstance(text, str):
                        check_utf8(text, column, f"row {number} of {data.name}")
        texts = [fill_row(row, columns, identity.prompt, where=f"row {number} of {data.name}") for number, row in chunk]
        tokens, _ = backbone.tokenize(
            texts,
            chat_template=identity.chat_template,
            max_length=identity.max_length,
            truncate=identity.truncate,
        )
        for (number, _), row in zip(chunk, tokens, strict=True):
            if not 0 < len(row) <= identity.max_length:
                raise DataError(
                    f"row {number} of {data.name} gives {len(row):,} tokens, and the head was trained for 1 to "
                    f"{identity.max_length:,}; change its text or take it out"
                )
        yield [row for _, row in chunk], tokens
