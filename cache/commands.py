"""`relish cache info | verify | merge`."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look into caches, check them, join them.", rich_markup_mode=None)

CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of the cache.")]


@app.command()
def info(
    cache: CachePath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in a cache and what made it.

    Example: relish cache info my-cache
    """
    from .info import cache_info
    from .manifest import load_manifest

    figures = cache_info(load_manifest(cache))
    if as_json:
        typer.echo(json.dumps(figures, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    splits = Table("split", "rows", "tokens", "longest", "shards", "MB", "padding", box=None, header_style="bold")
    for name, split in figures["splits"].items():
        done = f"{split['shards']}" if split["complete"] else f"{split['shards']} of {split['planned']}"
        splits.add_row(
            name,
            f"{split['rows']:,}",
            f"{split['tokens']:,}",
            f"{split['longest']}" + (f" ({split['truncated']} cut)" if split["truncated"] else ""),
            done,
            f"{split['bytes'] / 1e6:,.1f}",
            f"×{split['padding_overhead']:.3f}",
        )
    console.print(splits)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("label range", " to ".join(f"{value:g}" for value in figures["label_range"]))
    if figures["task"]:
        facts.add_row("task", figures["task"])
    for name, value in {**figures["identity"], **figures["made_by"]}.items():
        if value is None:
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        short = f"{text[:16]}…" if name in ("weights", "config", "tokenizer") else text
        facts.add_row(name, repr(short)[1:-1] if name == "prompt" else short)
    console.print(facts)


@app.command()
def verify(cache: CachePath) -> None:
    """Read every byte of a cache and name each bad shard; exit code 1 if there is any.

    Example: relish cache verify my-cache
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from .reader import open_cache
    from .verify import verify_cache

    opened = open_cache(cache)
    records = [shard for split in opened.manifest.splits.values() for shard in split.shards]
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("verify", total=sum(record.bytes for record in records))
        found = verify_cache(opened, lambda done: progress.advance(bar, done))
    for sentence in found:
        typer.echo(sentence)
    if found:
        raise typer.Exit(1)
    typer.echo(f"{cache}: {len(records)} shards, every byte as it was written")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the joined cache.")],
    caches: Annotated[list[Path], typer.Argument(metavar="CACHE", help="Caches of one identity.")],
) -> None:
    """Join caches of one identity: their splits come together in a new cache.

    Example: relish cache merge all train-cache test-cache
    """
    from .merge import merge_caches
    from .reader import open_cache

    merge_caches(out, caches)
    typer.echo(f"{out}: splits {', '.join(open_cache(out).splits)}")
