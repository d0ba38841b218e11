"""`relish tune`."""

import json
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .options import (
    AsJson,
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


def tune(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter, made if it is not there.")],
    model: Annotated[str, typer.Option("--model", help="Hub id, local folder or GGUF file of a causal LM.")],
    method: Annotated[
        str,
        typer.Option("--method", help="lora: a regression head, trained with it; raft: the expected score of answers."),
    ],
    gguf_file: GgufFile = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    task: Task = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SPLIT=FILE", help="CSV, TSV, JSONL or Parquet: train, and dev for validation."),
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
    max_length: MaxLength = None,
    truncate: Truncate = False,
    rank: Annotated[int, typer.Option(help="Width of the low-rank products.")] = 8,
    alpha: Annotated[int, typer.Option(help="They are scaled by alpha / rank.")] = 16,
    dropout: Annotated[float, typer.Option(help="On their input, in training.")] = 0.05,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows; the best is kept.")] = 3,
    lr: Annotated[float, typer.Option(help="Highest learning rate; LLMs of billions may want less.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 16,
    loss: Annotated[str | None, typer.Option(help="Of the method lora: mse (default) or huber.")] = None,
    rows: Annotated[
        int | None, typer.Option(help="Train on so many rows only, drawn at random, the same for every seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws first weights, order of rows and dropout.")] = 0,
    compute_dtype: ComputeDtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Fine-tune an LLM through a small LoRA adapter, which relish extract --adapter then merges into it.

    Run the same command again after an interruption: it goes on from the last checkpoint.

    Examples:

    \b
    relish tune sts-lora --model HuggingFaceTB/SmolLM2-135M-Instruct --task stsb --method lora
    relish tune sts-raft --model ./SmolLM2.gguf --task stsb --method raft --data train=train.csv --data dev=dev.csv
    """
    from .live import ExtractBar
    from .settings import parse_data, parse_label_range
    from .tune import tune_adapter
    from .tune_settings import TuneSettings

    settings = TuneSettings(
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
        compute_dtype=compute_dtype,
        device=device,
        max_length=max_length,
        truncate=truncate,
        method=method,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        loss=loss,
        rows=rows,
        seed=seed,
    )
    with ExtractBar("tune") as bar:
        summary = tune_adapter(adapter, settings, listener=bar)
    if as_json:
        figures = asdict(summary)
        typer.echo(json.dumps({"adapter": str(figures.pop("folder")), **figures}, indent=2))
        return
    pearson = summary.val["pearson"]
    typer.echo(
        f"{adapter}: {summary.method}, {summary.trainable_parameters:,} trainable parameters "
        f"({100 * summary.trainable_parameters / summary.backbone_parameters:.2g} % of the backbone's), "
        f"best epoch {summary.best_epoch} of {summary.epochs}, val NRMSE {summary.val['nrmse']:.4f}, "
        f"val Pearson {'–' if pearson is None else f'{pearson:.4f}'}, {summary.seconds:,.0f} s"
    )
    if summary.already:
        typer.echo("it was finished already")
    typer.echo(f"next: relish extract CACHE --model {quote(model)} … --adapter {quote(str(adapter))}")
