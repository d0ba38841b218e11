"""`relish train`."""

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .settings import HEADS, TrainSettings, parse_layer, parse_range


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(no_args_is_help=True)(train)


def train(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of the cache.")],
    out: Annotated[Path, typer.Option("--out", metavar="RUNS", help="Folder for the run folders.")],
    head: Annotated[str, typer.Option("--head", help=f"{', '.join(HEADS)}; several with commas.")] = "relish",
    depths: Annotated[str, typer.Option(help="Refinement steps of relish: 3, 1-5 or 1,3.")] = "3",
    seeds: Annotated[str, typer.Option(help="0, 0-2 or 0,7.")] = "0",
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training rows, at most; default 5, below 2,000 rows more."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; default each head's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = TrainSettings.batch_size,
    loss: Annotated[str, typer.Option(help="mse or huber.")] = TrainSettings.loss,
    weight_decay: Annotated[
        float | None, typer.Option(help="AdamW's weight decay; default each head's own, less on more than 1,000 rows.")
    ] = None,
    dropout: Annotated[
        float, typer.Option(help="On the output of attention and feed-forward layers.")
    ] = TrainSettings.dropout,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the learning rate rises.")
    ] = TrainSettings.warmup,
    best_by: Annotated[
        str, typer.Option(help="Validation figure that chooses the epoch: nrmse or pearson.")
    ] = TrainSettings.best_by,
    patience: Annotated[
        int | None,
        typer.Option(help="Epochs without a better --best-by figure till a cell stops; default 3/5 of all."),
    ] = None,
    standardise: Annotated[
        bool, typer.Option("--standardise/--no-standardise", help="Scale the hidden states per dimension.")
    ] = TrainSettings.standardise,
    latent_size: Annotated[int, typer.Option(help="Width of the latent state.")] = TrainSettings.latent_size,
    num_heads: Annotated[int, typer.Option(help="Attention heads.")] = TrainSettings.num_heads,
    layer: Annotated[
        str | None,
        typer.Option(help="Which layer of a cache that has several, or mix for a learned mix of them all."),
    ] = None,
    val_split: Annotated[
        str | None, typer.Option(help="Validation split; default validation, val, dev or trial.")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(help="Share of the training rows held out if there is no validation split.")
    ] = TrainSettings.val_fraction,
    device: Annotated[str, typer.Option(help="cuda, mps, cpu or auto.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes that train cells at once; default one per CPU core, 1 on a GPU.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each process; by default the processes share out torch's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the validation figures as JSON.")] = False,
) -> None:
    """Train heads from a cache: every head, depth and seed of a grid.

    Run the same command again after an interruption: finished cells are kept. A cell whose loss is no longer
    finite is marked as diverged and not tried again with the same settings. Depths, seeds and heads can be added to
    the same folder later.

    On the CPU several cells are trained at once, one per core. With the same --threads, weights are bit for bit the
    same with any --workers.

    Examples:

    \b
    relish train sts-cache --out runs
    relish train sts-cache --out runs --head relish,linear,mlp,ridge --depths 1-5 --seeds 0-2
    relish train sts-cache --out runs --depths 1-5 --seeds 0-2 \\
        --head relish,linear,linear-last,mlp,mlp-last,attention,ridge,ridge-mean
    relish train sts-cache --out runs-mix --layer mix
    """
    settings = TrainSettings(
        heads=tuple(name.strip() for name in head.split(",") if name.strip()),
        depths=parse_range(depths, "--depths"),
        seeds=parse_range(seeds, "--seeds"),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        loss=loss,
        weight_decay=weight_decay,
        dropout=dropout,
        warmup=warmup,
        best_by=best_by,
        patience=patience,
        standardise=standardise,
        latent_size=latent_size,
        num_heads=num_heads,
        layer=parse_layer(layer),
        val_split=val_split,
        val_fraction=val_fraction,
        device=device,
        workers=workers,
        threads=threads,
    )
    from .grid import train_heads
    from .live import LiveTable

    with LiveTable() as table:
        result = train_heads(cache, out, settings, listener=table)
    if as_json:
        cells = [
            {"head": cell.head, "depth": cell.depth, "seed": cell.seed, **metrics}
            for cell, metrics in result.cells.items()
        ]
        typer.echo(
            json.dumps({"runs": str(out), "cells": cells, "diverged": [str(c) for c in result.diverged]}, indent=2)
        )
    elif result.cells:
        typer.echo(f"next: relish evaluate {quote(str(out))} --out report")
    if result.diverged:
        from .diverged import find_diverged
        from .progress import CellName

        names = ", ".join(map(str, result.diverged))
        lost = [
            cell
            for cell in find_diverged(result.folder)
            if CellName(cell.head, cell.depth, cell.seed) in result.diverged
        ]
        reasons = "; ".join(dict.fromkeys(cell.reason for cell in lost))
        typer.echo(
            f"error: {names} diverged: {reasons}. Against a loss that is not finite, try a lower --lr. "
            + ("The other cells are there. " if result.cells else "")
            + f"To try a cell again with the same settings, delete its file {out / 'CELL.diverged.json'}",
            err=True,
        )
        raise typer.Exit(2)
