"""Size and speed of a packed cache, beside tar with gzip or zstd and beside other codecs, on real hidden states.

    python benchmarks/cache_size.py my-cache --out cache_size.json
    python benchmarks/cache_size.py --small

Takes shards of the cache from all over it, up to --megabytes. The codecs go through the same code as
`relish cache pack`, with another filter or other chunks; only `relish cache pack` itself also reads back what it wrote
and syncs it to disk. MB/s are of the cache's bytes, on one thread.
"""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import Rival, arguments, race, save, table

Work = Callable[[], int]

CODECS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    # name: (class of hdf5plugin, its settings and HDF5's shuffle, rows of a chunk; None for those of the archive)
    "zstd 1, shuffle": ("Zstd", {"clevel": 1, "shuffle": True}, None),
    "zstd 3, shuffle": ("Zstd", {"clevel": 3, "shuffle": True}, None),
    "zstd 9, shuffle": ("Zstd", {"clevel": 9, "shuffle": True}, None),
    "zstd 1, no shuffle": ("Zstd", {"clevel": 1}, None),
    "zstd 1, shuffle, a row a chunk": ("Zstd", {"clevel": 1, "shuffle": True}, 1),
    "zstd 1, bit shuffle": ("Bitshuffle", {"cname": "zstd", "clevel": 1}, None),
    "lz4, bit shuffle": ("Bitshuffle", {"cname": "lz4"}, None),
    "blosc2 zstd 1, shuffle": ("Blosc2", {"cname": "zstd", "clevel": 1, "filters": 1}, None),
    "blosc2 zstd 3, shuffle": ("Blosc2", {"cname": "zstd", "clevel": 3, "filters": 1}, None),
    "blosc2 zstd 3, bit shuffle": ("Blosc2", {"cname": "zstd", "clevel": 3, "filters": 2}, None),
    "blosc2 lz4 5, shuffle": ("Blosc2", {"cname": "lz4", "clevel": 5, "filters": 1}, None),
}


def sample(cache: Path, folder: Path, most: int) -> tuple[int, int]:
    """A cache of some shards of another, from all over it, of at most so many bytes; gives its bytes and shards."""
    from relish.cache.manifest import load_manifest

    manifest = load_manifest(cache)
    records = [record for split in manifest.splits.values() for record in split.shards]
    spread = sorted(range(len(records)), key=lambda number: (number + 0.5) * 0.618034 % 1)
    chosen, size = set(), 0
    for number in spread:
        if not chosen or size + records[number].bytes <= most:
            chosen.add(records[number].file)
            size += records[number].bytes
    folder.mkdir()
    for file in chosen:
        shutil.copyfile(cache / file, folder / file)
    splits = {
        name: replace(split, shards=tuple(record for record in split.shards if record.file in chosen))
        for name, split in manifest.splits.items()
    }
    replace(manifest, splits=splits).save(folder)
    return size, len(chosen)


def random_cache(folder: Path) -> Path:
    """200 rows of a few tokens, half of them the same in all rows."""
    import torch
    from caches import cache_of

    draw = torch.Generator().manual_seed(0)
    start = torch.randn(1, 8, 64, generator=draw)
    lengths = torch.randint(10, 30, (200,), generator=draw).tolist()

    def states(row: int) -> torch.Tensor:
        return torch.cat([start, torch.randn(1, lengths[row] - 8, 64, generator=draw)], dim=1).bfloat16()

    return cache_of(folder, lengths, 64, states, shard_rows=64)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def copy(cache: str, work: str) -> Work:
    def run() -> int:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(cache, work)
        return folder_size(Path(work))

    return run


def tar_gzip(cache: str, work: str) -> Work:
    def run() -> int:
        with tarfile.open(work, "w:gz", compresslevel=6) as tar:
            tar.add(cache, arcname="c")
        return Path(work).stat().st_size

    return run


def tar_gunzip(packed: str, work: str) -> Work:
    def run() -> int:
        with tarfile.open(packed) as tar:
            tar.extractall(work, filter="data")
        return folder_size(Path(work) / "c")

    return run


def tar_zstd(cache: str, work: str, options: str) -> Work:
    def run() -> int:
        subprocess.run(f"tar -cf - -C '{cache}' . | zstd -q -f -T1 {options} -o '{work}'", shell=True, check=True)
        return Path(work).stat().st_size

    return run


def tar_unzstd(packed: str, work: str, options: str) -> Work:
    def run() -> int:
        Path(work).mkdir(exist_ok=True)
        subprocess.run(f"zstd -q -d -c {options} '{packed}' | tar -xf - -C '{work}'", shell=True, check=True)
        return folder_size(Path(work))

    return run


def pack(cache: str, work: str) -> Work:
    from relish.cache.pack import pack_cache

    def run() -> int:
        shutil.rmtree(work, ignore_errors=True)
        return pack_cache(Path(cache), Path(work)).bytes

    return run


def unpack(packed: str, work: str) -> Work:
    from relish.cache.unpack import unpack_cache

    def run() -> int:
        shutil.rmtree(work, ignore_errors=True)
        unpack_cache(Path(packed), Path(work))
        return folder_size(Path(work))

    return run


def codec(cache: str, work: str, name: str, writing: bool) -> Work:
    import hdf5plugin

    from relish.cache import packed
    from relish.cache.dtypes import storage_dtype
    from relish.cache.manifest import load_manifest
    from relish.cache.shard import HiddenLayout

    kind, options, rows = CODECS[name]
    shuffle = {"shuffle": True} if "shuffle" in options else {}
    others = {key: value for key, value in options.items() if key != "shuffle"}
    packed.zstd_filter = lambda: {**shuffle, **getattr(hdf5plugin, kind)(**others)}
    if rows is not None:
        packed._CHUNK_ROWS, packed._CHUNK_BYTES = rows, 1 << 30
    manifest = load_manifest(Path(cache))
    dtype, layers = storage_dtype(manifest.identity.dtype), len(manifest.identity.layers)
    records = [record for split in manifest.splits.values() for record in split.shards]
    layouts = [HiddenLayout(layers, record.T, manifest.identity.hidden_size, dtype) for record in records]
    Path(work).mkdir(exist_ok=True)

    def write() -> int:
        for record, layout in zip(records, layouts, strict=True):
            target = os.open(Path(work) / record.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            packed.write_packed(Path(cache) / record.file, target, record, layout, lambda _: None)
            os.close(target)
        return folder_size(Path(work))

    def read() -> int:
        for record, layout in zip(records, layouts, strict=True):
            packed.restore(Path(work) / record.file, record, layout, lambda *_: None)
        return sum(record.bytes for record in records)

    return write if writing else read


def forms(cache: Path, home: Path) -> list[tuple[str, Rival, Rival]]:
    """Each form of the cache: its name, and what writes it and gives the cache back from it."""
    found: list[tuple[str, Any, tuple[Any, ...], Any, tuple[Any, ...]]] = [
        ("the cache as it is", copy, (), copy, ()),
        ("relish cache pack", pack, (), unpack, ()),
        ("tar, gzip 6", tar_gzip, (), tar_gunzip, ()),
    ]
    if shutil.which("zstd") and shutil.which("tar"):
        found.append(("tar, zstd 3", tar_zstd, ("-3",), tar_unzstd, ("",)))
        found.append(("tar, zstd 3 --long", tar_zstd, ("-3 --long=27",), tar_unzstd, ("--long=27",)))
    rivals = []
    for number, (name, write, write_args, read, read_args) in enumerate(found):
        form, back = str(home / f"form-{number}"), str(home / f"back-{number}")
        there = Rival(f"{name}: write", write, (str(cache), form, *write_args))
        rivals.append((name, there, Rival(f"{name}: read", read, (form, back, *read_args))))
    for number, name in enumerate(CODECS):
        form = str(home / f"codec-{number}")
        there = Rival(f"{name}: write", codec, (str(cache), form, name, True))
        rivals.append((name, there, Rival(f"{name}: read", codec, (str(cache), form, name, False))))
    return rivals


def measure(chosen: Sequence[tuple[str, Rival, Rival]], size: int, rounds: int) -> list[dict[str, Any]]:
    """Written in turn, then read in turn."""
    written = race([write for _, write, _ in chosen], rounds=rounds)
    back = race([read for _, _, read in chosen], rounds=rounds)
    lines = []
    for name, write, read in chosen:
        there, here = written[write.name], back[read.name]
        lines.append(
            {
                "form": name,
                "bytes": there.value,
                "share": round(there.value / size, 4),
                "write_mb_s": round(size / 1e6 / there.median, 1),
                "read_mb_s": round(size / 1e6 / here.median, 1),
                "write": there.to_json(),
                "read": here.to_json(),
            }
        )
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("cache", type=Path, nargs="?", help="a cache of real hidden states")
    parser.add_argument("--megabytes", type=int, default=200, help="how much of it to take")
    given = parser.parse_args()
    if given.cache is None and not given.small:
        parser.error("give a cache, or --small")
    with tempfile.TemporaryDirectory(prefix="cache-size-") as place:
        home = Path(place)
        cache = random_cache(home / "random") if given.cache is None else given.cache
        size, shards = sample(cache, home / "cache", given.megabytes * 1_000_000)
        print(f"{shards} shards, {size / 1e6:.1f} MB")
        lines = measure(forms(home / "cache", home), size, 1 if given.small else given.rounds)
    header = ("form", "size", "write MB/s", "read MB/s")
    print(table(header, [(x["form"], f"{x['share']:.3f}", x["write_mb_s"], x["read_mb_s"]) for x in lines]))
    save(given.out, {"cache": {"bytes": size, "shards": shards}, "forms": lines})


if __name__ == "__main__":
    main()
