"""`relish cache info | verify | repair | merge | pack | unpack`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .exact import exact_range

if TYPE_CHECKING:
    from rich.progress import Progress

    from .manifest import ShardRecord

app = typer.Typer(no_args_is_help=True, help="Look into caches, check, join and pack them.", rich_markup_mode=None)

CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of the cache.")]


@app.command()
def info(
    cache: CachePath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in a cache, packed or not, and what made it.

    Example: relish cache info my-cache
    """
    from .archive import is_archive, load_archive
    from .info import cache_info, packed_info
    from .manifest import load_manifest
    from .readouts import readouts_info

    archive = load_archive(cache) if is_archive(cache) else None
    manifest = archive.manifest if archive is not None else load_manifest(cache)
    figures = packed_info(archive) if archive is not None else cache_info(manifest)
    figures["readouts"] = readouts_info(cache, manifest)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    splits = Table("split", "rows", "tokens", "longest", "shards", "MB", "padding", box=None, header_style="bold")
    for name, split in figures["splits"].items():
        done = f"{split['shards']}" if split["complete"] else f"{split['shards']} of {split['planned']}"
        splits.add_row(
            name,
            f"{split['rows']:,}" + (f" ({len(split['skipped'])} skipped)" if split["skipped"] else ""),
            f"{split['tokens']:,}",
            f"{split['longest']}" + (f" ({split['truncated']} cut)" if split["truncated"] else ""),
            done,
            f"{split['bytes'] / 1e6:,.1f}",
            f"×{split['padding_overhead']:.3f}",
        )
    console.print(splits)
    if figures["readouts"]:
        answers = Table("split", "readout", "rows", "shots", "seconds", "", box=None, header_style="bold")
        for one in figures["readouts"]:
            rows = f"{one['rows']:,}" + ("" if one["rows"] == one["of"] else f" of {one['of']:,}")
            shots = "" if one["shots_used"] is None else str(one["shots_used"])
            answers.add_row(one["split"], one["name"], rows, shots, f"{one['seconds']:,.1f}", one["state"])
        console.print(answers)
    facts = Table.grid(padding=(0, 2))
    if "packed" in figures:
        packed = figures["packed"]
        facts.add_row("packed", f"{packed['shards']} of {packed['planned']} shards, {packed['bytes'] / 1e6:,.1f} MB")
        facts.add_row("unpack", Text(f"relish cache unpack {cache} CACHE"))
    facts.add_row("label range", exact_range(figures["label_range"]))
    if figures["task"]:
        facts.add_row("task", figures["task"])
    for name, value in {**figures["identity"], **figures["made_by"]}.items():
        if value is None:
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        short = f"{text[:16]}…" if name in ("weights", "config", "tokenizer", "adapter") else text
        facts.add_row(name, Text(repr(short)[1:-1] if name == "prompt" else short))
    console.print(facts)


@app.command()
def verify(
    cache: CachePath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every byte of a cache and name each bad shard; exit code 1 if there is any.

    Example: relish cache verify my-cache
    """
    from .errors import DamagedCacheError
    from .reader import open_cache
    from .verify import verify_cache

    records: list[ShardRecord] = []
    try:
        opened = open_cache(cache)
    except DamagedCacheError as error:
        found = [str(error)]
    else:
        records = [shard for split in opened.manifest.splits.values() for shard in split.shards]
        with _bytes_bar() as bar:
            task = bar.add_task("verify", total=sum(record.bytes for record in records))
            found = verify_cache(opened, lambda done: bar.advance(task, done))
    if as_json:
        typer.echo(json.dumps({"shards": len(records), "problems": found}, indent=2))
    else:
        typer.echo("\n".join(found) or f"{cache}: {len(records)} shards, every byte as it was written")
    if found:
        raise typer.Exit(1)


@app.command()
def repair(
    cache: CachePath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Drop bad or missing shards from a cache's manifest, so that extracting again computes only those.

    A damaged or deleted manifest.json is brought back from its copy. Nothing that is whole is touched.

    Example: relish cache repair my-cache
    """
    from .repair import repair_cache

    with _bytes_bar() as bar:
        task = bar.add_task("repair", total=None)
        done = repair_cache(cache, lambda count, total: bar.update(task, advance=count, total=total))
    if as_json:
        figures = {"found": done.found, "dropped": [shard.file for shard in done.dropped], "pending": done.pending}
        typer.echo(json.dumps(figures, indent=2))
        return
    for sentence in done.found:
        typer.echo(sentence.partition("; restore it from a copy, or run:")[0])
    if done.dropped:
        typer.echo(f"dropped: {', '.join(shard.file for shard in done.dropped)}")
    if done.pending:
        typer.echo(f"next: run the same relish extract command again; it computes {done.pending} shards")
    elif not done.found:
        typer.echo(f"{cache}: nothing to repair")


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

    with _bytes_bar() as bar:
        task = bar.add_task("merge", total=None)
        merge_caches(out, caches, lambda done, total: bar.update(task, advance=done, total=total))
    typer.echo(f"{out}: splits {', '.join(open_cache(out).splits)}")


@app.command()
def pack(
    cache: CachePath,
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Folder of the packed cache.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compress a cache without loss, to move it to another machine.

    Interrupted, the same command goes on. Run again after another split was extracted, it packs only that. Needs
    hdf5plugin: pip install 'relish-llm[pack]'

    Example, on the GPU box: relish cache pack my-cache my-packed

    Example, on the laptop: rsync -a box:my-packed . && relish cache unpack my-packed my-cache
    """
    from .pack import pack_cache

    with _bytes_bar() as bar:
        task = bar.add_task("pack", total=None)
        done = pack_cache(cache, archive, lambda count, total: bar.update(task, advance=count, total=total))
    records = [record for split in done.manifest.splits.values() for record in split.shards]
    before = sum(record.bytes for record in records)
    if as_json:
        typer.echo(json.dumps({"shards": len(records), "bytes": before, "packed": done.bytes}, indent=2))
        return
    share = f" ({done.bytes / before:.0%})" if before else ""
    typer.echo(
        f"{archive}: {len(records)} shards, {before / 1e6:,.1f} MB packed into {done.bytes / 1e6:,.1f} MB{share}"
    )
    typer.echo(f"next: relish cache unpack {archive} CACHE")


@app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Folder of the packed cache.")],
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder for the cache, new or empty.")],
) -> None:
    """Write the cache that was packed, byte for byte; every byte is checked.

    Interrupted, the same command goes on. Needs hdf5plugin: pip install 'relish-llm[pack]'

    Example: relish cache unpack my-packed my-cache
    """
    from .unpack import unpack_cache

    with _bytes_bar() as bar:
        task = bar.add_task("unpack", total=None)
        splits = unpack_cache(archive, cache, lambda count, total: bar.update(task, advance=count, total=total))
    typer.echo(f"{cache}: splits {', '.join(splits)}")


def _bytes_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
