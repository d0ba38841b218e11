"""`relish extract`, and `relish tune` beside it."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ..cache.errors import CacheError
from .options import (
    AsJson,
    BatchTokens,
    ChatTemplate,
    ComputeDtype,
    Device,
    GgufFile,
    Hub,
    HubConfig,
    HubRevision,
    HubSplits,
    IdColumn,
    LabelRange,
    MaxLength,
    Prompt,
    Revision,
    TargetColumn,
    Task,
    Truncate,
    TrustRemoteCode,
)
from .tune_command import tune

if TYPE_CHECKING:
    from ..cache.reader import FeatureCache
    from .pipeline import ExtractSummary


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(no_args_is_help=True)(extract)
    app.command(no_args_is_help=True)(tune)


def extract(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of the cache, made if it is not there.")],
    model: Annotated[str, typer.Option("--model", help="Hub id, local folder or GGUF file of a causal LM or encoder.")],
    gguf_file: GgufFile = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    task: Task = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SPLIT=FILE", help="CSV, TSV, JSONL or Parquet; once for each split."),
    ] = None,
    hub: Hub = None,
    hub_config: HubConfig = None,
    hub_revision: HubRevision = None,
    hub_splits: HubSplits = None,
    prompt: Prompt = None,
    chat_template: ChatTemplate = False,
    target_column: TargetColumn = None,
    id_column: IdColumn = None,
    label_range: LabelRange = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="ADAPTER", help="Folder of an adapter to merge into the model.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="last, indices or fractions of the depth: 12, 0.5, or several: 0.5,last.")
    ] = "last",
    dtype: Annotated[str, typer.Option(help="Storage type: bfloat16, float16 or float32.")] = "bfloat16",
    compute_dtype: ComputeDtype = "auto",
    device: Device = "auto",
    max_length: MaxLength = None,
    truncate: Truncate = False,
    batch_tokens: BatchTokens = None,
    shard_rows: Annotated[int, typer.Option(help="Most rows in a shard.")] = 4096,
    on_nonfinite: Annotated[
        str, typer.Option(help="A row with NaN, infinity or a value beyond --dtype: error, or skip to leave it out.")
    ] = "error",
    readouts: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,...",
            help="Write what the LLM itself answers, for all splits but train: greedy, samples, candidates; or "
            "regression, what the adapter's own head predicts.",
        ),
    ] = None,
    shots: Annotated[
        str, typer.Option(metavar="N,...", help="Solved examples in the prompt of readouts: 0, or several: 0,128.")
    ] = "0",
    as_json: AsJson = False,
) -> None:
    """Run the frozen LLM over texts once and cache its hidden states.

    Run the same command again after an interruption: it goes on where it stopped.

    Examples:

    \b
    relish extract sts-cache --model HuggingFaceTB/SmolLM2-135M-Instruct --task stsb
    relish extract sts-cache --model ./SmolLM2.gguf --task stsb --data train=train.csv --data test=test.csv
    relish extract my-cache --model Qwen/Qwen3-8B --data train=a.csv --data test=b.jsonl \\
        --prompt "Essay: {text}" --target-column score --label-range 1,6
    relish extract sts-cache --model HuggingFaceTB/SmolLM2-135M-Instruct --task stsb \\
        --readouts greedy,samples,candidates --shots 0,128
    """
    from ..cache.errors import DataError
    from ..cache.reader import open_cache
    from .live import ExtractBar
    from .pipeline import extract_cache
    from .settings import (
        ExtractSettings,
        parse_data,
        parse_label_range,
        parse_layers,
        parse_readouts,
        parse_shots,
    )

    settings = ExtractSettings(
        model=model,
        gguf_file=gguf_file,
        revision=revision,
        trust_remote_code=trust_remote_code,
        task=task,
        data=parse_data(data or []),
        hub=hub,
        hub_config=hub_config,
        hub_revision=hub_revision,
        hub_splits=tuple(name.strip() for name in hub_splits.split(",")) if hub_splits else (),
        prompt=prompt,
        chat_template=chat_template,
        target_column=target_column,
        id_column=id_column,
        label_range=parse_label_range(label_range) if label_range is not None else None,
        adapter=adapter,
        layers=parse_layers(layers),
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        max_length=max_length,
        truncate=truncate,
        batch_tokens=batch_tokens,
        shard_rows=shard_rows,
        on_nonfinite=on_nonfinite,
        readouts=parse_readouts(readouts) if readouts is not None else (),
        shots=parse_shots(shots),
    )
    with ExtractBar() as bar:
        summary = extract_cache(cache, settings, progress=bar)
    opened = open_cache(summary.folder)
    empty = [name for name, split in opened.manifest.splits.items() if split.complete and not split.shards]
    if as_json:
        figures = {
            "cache": str(summary.folder),
            "rows": summary.rows,
            "tokens": summary.tokens,
            "bytes": summary.bytes,
            "padding_overhead": round(summary.padding_overhead, 4),
            "skipped": [
                {"split": split, "row": row.row, "id": row.id, "why": row.why} for split, row in summary.skipped
            ],
            "computed_tokens": summary.computed_tokens,
            "seconds": round(summary.seconds, 3),
            "readouts": [asdict(readout) for readout in summary.readouts],
        }
        typer.echo(json.dumps(figures, indent=2))
    else:
        _tell(cache, summary)
        if not empty and _can_be_trained_on(opened):
            layer = f" --layer {opened.layers[-1]}" if len(opened.layers) > 1 else ""
            typer.echo(f"next: relish train {quote(str(cache))} --out runs{layer}")
    if empty:
        raise DataError(
            f"every row of {', '.join(empty)} was skipped, so there is nothing to train on or to score; try "
            "--compute-dtype float32, or a wider --dtype, in another folder"
        )


def _can_be_trained_on(cache: "FeatureCache") -> bool:
    try:
        split = cache.split("train", layer=cache.layers[-1])
    except CacheError:  # none, or one that was extracted before and is not whole, or not here
        return False
    return any(map(math.isfinite, split.target))


def _tell(cache: Path, summary: "ExtractSummary") -> None:
    from ..cache.manifest import MANIFEST

    rate = f", {summary.computed_tokens / summary.seconds:,.0f} tokens/s" if summary.computed_tokens else ""
    typer.echo(
        f"{cache}: {summary.rows:,} rows, {summary.tokens:,} tokens, {summary.bytes / 1e6:,.1f} MB, "
        f"padding ×{summary.padding_overhead:.3f}{rate}"
    )
    if summary.skipped:
        named = [f"row {row.row} of {split} (id {row.id!r})" for split, row in summary.skipped]
        more = f" and {len(named) - 10:,} more, all listed in {MANIFEST}" if len(named) > 10 else ""
        typer.echo(f"skipped {len(named):,} rows: {', '.join(named[:10])}{more}")
    if not summary.computed_tokens:
        typer.echo("everything was there already" if not summary.readouts else "all hidden states were there already")
    for readout in summary.readouts:
        shots = f", {readout.shots_used} examples" if readout.shots_used != readout.shots else ""
        done = f"{readout.computed:,} asked now" if readout.computed else "there already"
        typer.echo(f"{readout.split}: {readout.name}, {readout.rows:,} rows, {done}{shots}")
