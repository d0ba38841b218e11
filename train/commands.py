"""`relish train`."""

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(no_args_is_help=True)(train)


def train(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of the cache.")],
    out: Annotated[Path, typer.Option("--out", metavar="RUNS", help="Folder for the run folders.")],
    head: Annotated[
        str, typer.Option("--head", help="relish, linear, mlp, ridge, ridge-mean; several with commas.")
    ] = "relish",
    depths: Annotated[str, typer.Option(help="Refinement steps of relish: 3, 1-5 or 1,3.")] = "3",
    seeds: Annotated[str, typer.Option(help="0, 0-2 or 0,7.")] = "0",
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows, at most.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    loss: Annotated[str | None, typer.Option(help="huber or mse.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    dropout: Annotated[float | None, typer.Option(help="On the output of attention and feed-forward layers.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps in which the learning rate rises.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without a better validation NRMSE before stopping.")
    ] = None,
    standardise: Annotated[
        bool | None, typer.Option("--standardise/--no-standardise", help="Scale the hidden states per dimension.")
    ] = None,
    latent_size: Annotated[int | None, typer.Option(help="Width of the latent state.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    layer: Annotated[int | None, typer.Option(help="Which layer of a cache that has several.")] = None,
    val_split: Annotated[
        str | None, typer.Option(help="Validation split; default validation, val, dev or trial.")
    ] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="Share of the training rows held out if there is no validation split.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, mps, cpu or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the validation figures as JSON.")] = False,
) -> None:
    """Train heads from a cache: every head, depth and seed of a grid.

    Run the same command again after an interruption: finished cells are kept. Depths, seeds and heads can be added to
    the same folder later.

    Examples:

    relish train sts-cache --out runs

    relish train sts-cache --out runs --head relish,linear,mlp,ridge --depths 1-5 --seeds 0-2
    """
    from .settings import TrainSettings, parse_range

    given = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "loss": loss,
        "weight_decay": weight_decay,
        "dropout": dropout,
        "warmup": warmup,
        "patience": patience,
        "standardise": standardise,
        "latent_size": latent_size,
        "num_heads": num_heads,
        "val_fraction": val_fraction,
    }
    settings = TrainSettings(
        heads=tuple(name.strip() for name in head.split(",") if name.strip()),
        depths=parse_range(depths, "--depths"),
        seeds=parse_range(seeds, "--seeds"),
        layer=layer,
        val_split=val_split,
        device=device,
        threads=threads,
        **{name: value for name, value in given.items() if value is not None},  # pyright: ignore[reportArgumentType]
    )
    from .grid import train_heads
    from .live import LiveTable

    with LiveTable() as table:
        try:
            result = train_heads(cache, out, settings, listener=table)
        except KeyboardInterrupt:
            typer.echo("interrupted; run the same command again to go on: finished cells are kept", err=True)
            raise typer.Exit(130) from None
    if as_json:
        cells = [
            {"head": cell.head, "depth": cell.depth, "seed": cell.seed, **metrics}
            for cell, metrics in result.cells.items()
        ]
        typer.echo(
            json.dumps({"runs": str(out), "cells": cells, "diverged": [str(c) for c in result.diverged]}, indent=2)
        )
    else:
        typer.echo(f"next: relish evaluate {out} --out report")
    if result.diverged:
        names = ", ".join(map(str, result.diverged))
        typer.echo(
            f"error: the loss of {names} was no longer finite; try a lower --lr. The other cells are there", err=True
        )
        raise typer.Exit(2)
