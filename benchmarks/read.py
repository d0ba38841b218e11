"""Random batches from a cache, beside other forms of the same rows, beside raw preadv, and behind training steps.

    python benchmarks/read.py --work /var/tmp/relish-read --out read.json
    python benchmarks/read.py --small

--work keeps what is written (five forms of at least 2 GB each, and caches of up to three times that) for the next
time. Rows are random, 2048 wide in bfloat16, their lengths like those of STS-B with the preset's prompt. Every form
reads the same batches of 32 and gives the same padded tensor and mask, which is checked. Warm: all is in the system's
page cache. Cold: before each round the files are closed and the system is asked to forget their pages (posix_fadvise
DONTNEED); what disk or hypervisor remember, they remember. Opening is not timed, but for the first batch: from
`open_cache` on, in a fresh process after its imports.
"""

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lengths import draw_lengths
from measure import Figures, Rival, arguments, race, save, table

BATCH = 32
FLOOR = "os.preadv, one buffer"
FLOOR_BATCH = "os.preadv, padded batch"
FIRST, LATER = "relish, first pass (CRC)", "relish, later passes"


def build(work: Path, tokens: int, width: int) -> None:
    """Write each form that is not there yet; a folder gets its name when it is whole."""
    from forms import FORMS, random_rows

    rows = random_rows(draw_lengths(tokens), width)
    for kind in FORMS:
        final, making = work / kind.__name__, work / f"{kind.__name__}.tmp"
        if not final.exists():
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            kind(making, rows).write()
            making.rename(final)
    os.sync()  # the system forgets only pages that are on disk


def forget(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def batches(count: int, rows: int) -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [draw.integers(0, rows, BATCH) for _ in range(count)]


def reading(work: str, tokens: int, width: int, name: str, count: int, cold: bool) -> Callable[[], Any]:
    """What is timed: `count` batches. Gives the seconds of each call without opening, and a hash of the first batch."""
    import forms
    import torch

    rows = forms.random_rows(draw_lengths(tokens), width)
    kinds = {kind.name: kind for kind in forms.FORMS}
    folder = Path(work) / (kinds[name].__name__ if name in kinds else "Relish")
    if name in (FLOOR, FLOOR_BATCH):
        form: Any = forms.Floor(folder, rows, batch=name == FLOOR_BATCH)
    else:
        form = kinds.get(name, forms.Relish)(folder, rows)
    asked = batches(count, len(rows.lengths))
    again = name == FIRST or (cold and name != LATER)
    read = form.open()
    first = read(asked[0])
    digest = None if first is None else zlib.crc32(first[0].view(torch.uint8).numpy()) ^ int(first[1].sum())
    if name == LATER:
        for batch in asked:
            read(batch)
    del first
    seconds: list[float] = []

    def run() -> Any:
        nonlocal read
        if again:
            del read
        if cold:
            forget(folder)
        if again:
            read = form.open()
        began = time.perf_counter()
        for batch in asked:
            read(batch)
        seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "digest": digest}

    return run


def first_batch(folder: str, cold: bool) -> tuple[float, float]:
    """Seconds and CPU seconds from open_cache to the first batch, after all imports and before any file was opened."""
    from relish.cache.reader import open_cache

    if cold:
        forget(Path(folder))
    began, cpu = time.perf_counter(), time.process_time()
    split = open_cache(folder).split("train")
    split.read(np.random.default_rng(2).integers(0, len(split), BATCH))
    return time.perf_counter() - began, time.process_time() - cpu


def _send(pipe: Any, work: Callable[..., Any], *args: Any) -> None:
    pipe.send(work(*args))


def in_a_child(work: Callable[..., Any], *args: Any) -> Any:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_send, args=(theirs, work, *args))
    child.start()
    answer = ours.recv()
    child.join()
    return answer


def time_to_first_batch(work: Path, sizes: list[int], width: int, rounds: int) -> list[dict[str, Any]]:
    # What the reader imports when it is first used: the children that are timed inherit it.
    import h5py  # noqa: F401
    import torch  # noqa: F401
    from forms import Relish, random_rows

    import relish.cache.reader

    found = []
    for tokens in sizes:
        folder = work / f"size-{tokens}"
        if not folder.exists():
            making = work / f"size-{tokens}.tmp"
            Relish(making, random_rows(draw_lengths(tokens), width)).write()
            making.rename(folder)
            os.sync()
        manifest = relish.cache.reader.open_cache(folder).manifest.splits["train"]
        line: dict[str, Any] = {
            "bytes": sum(record.bytes for record in manifest.shards),
            "tokens": manifest.tokens,
            "rows": manifest.rows,
            "shards": len(manifest.shards),
        }
        for how in ("warm", "cold"):
            in_a_child(first_batch, str(folder), False)
            values = [in_a_child(first_batch, str(folder), how == "cold") for _ in range(rounds)]
            line[f"{how}_s"] = round(statistics.median(wall for wall, _ in values), 5)
            line[f"{how}_cpu_s"] = round(statistics.median(cpu for _, cpu in values), 5)
            line[f"{how}_rounds_s"] = [round(wall, 5) for wall, _ in values]
        found.append(line)
    return found


def training(folder: str, width: int, steps: int) -> Callable[[], Any]:
    """`relish train`'s steps behind its `read_ahead`, beside the same steps on batches that lie in memory.

    Per step, in seconds: waiting for the batch, the step itself, the step on batches in memory, and reading alone.
    """
    import torch

    from relish import RelishHead
    from relish.cache.reader import open_cache
    from relish.train.adamw import AdamW
    from relish.train.data import Rows, read_ahead
    from relish.train.step import take_step

    torch.manual_seed(0)
    head = RelishHead(hidden_size=width, depth=3).train()
    optimizer, loss_of = AdamW(head, weight_decay=1.0), torch.nn.MSELoss()

    def in_memory(held: list[Any]) -> float:
        for batch in held:  # a first round, as the caches have seen other batches
            take_step(head, optimizer, loss_of, batch, lr=3e-4)
        began = time.perf_counter()
        for batch in held:
            take_step(head, optimizer, loss_of, batch, lr=3e-4)
        return (time.perf_counter() - began) / len(held)

    def run() -> Any:
        split = open_cache(folder).split("train")
        rows, asked = Rows(split, np.arange(len(split))), batches(steps, len(split))
        result = {}
        for name in ("first pass", "later pass"):
            waits, works = [], []
            before = time.perf_counter()
            for batch in read_ahead(rows, asked):
                begin = time.perf_counter()
                waits.append(begin - before)
                take_step(head, optimizer, loss_of, batch, lr=3e-4)
                before = time.perf_counter()
                works.append(before - begin)
            result[name] = {
                "wait_first_s": round(waits[0], 5),
                "wait_s": round(statistics.mean(waits[1:]), 6),
                "step_s": round(statistics.mean(works[1:]), 6),
                "share": round(sum(waits[1:]) / (sum(waits[1:]) + sum(works[1:])), 4),
            }
        result["in memory"] = round(in_memory(list(read_ahead(rows, asked))), 6)
        began = time.perf_counter()
        for batch in asked:
            split.read(batch)
        result["reading alone"] = round((time.perf_counter() - began) / steps, 6)
        return result

    return run


def compare(found: dict[str, Figures], tokens: int, width: int, count: int) -> list[dict[str, Any]]:
    lengths = draw_lengths(tokens)
    size = sum(int(lengths[batch].sum()) for batch in batches(count, len(lengths))) * width * 2
    rounds = min(len(figures.wall) for figures in found.values())
    seconds = {name: figures.value["seconds"][-rounds:] for name, figures in found.items()}
    speed = {name: size / 1e9 / statistics.median(values) for name, values in seconds.items()}

    def ratio(name: str, floor: str) -> float:
        pairs = zip(seconds[name], seconds[floor], strict=True)
        return round(statistics.median(its / mine for mine, its in pairs), 3)

    digests = {figures.value["digest"] for figures in found.values()} - {None}
    if len(digests) != 1:
        raise RuntimeError(f"the forms give different batches: { {n: f.value['digest'] for n, f in found.items()} }")
    return [
        {
            "form": name,
            "gb_s": round(speed[name], 3),
            "of_preadv": ratio(name, FLOOR),
            "of_preadv_batch": ratio(name, FLOOR_BATCH),
            "batch_ms": round(statistics.median(seconds[name]) / count * 1e3, 3),
            "rounds_s": [round(value, 5) for value in seconds[name]],
            "cpu_s": round(statistics.median(found[name].cpu[-rounds:]), 5),
            "peak_mb": round(found[name].peak_mb),
        }
        for name in found
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "relish-read")
    parser.add_argument("--gigabytes", type=float, default=2.1)
    given = parser.parse_args()
    width = 64 if given.small else 2048
    size = 10_000_000 if given.small else int(given.gigabytes * 1e9)
    rounds = 2 if given.small else given.rounds
    work = given.work / f"{size}-{width}"
    tokens = size // (2 * width)
    began = time.perf_counter()
    build(work, tokens, width)
    print(f"built or found in {time.perf_counter() - began:.0f} s: {work}\n")

    from forms import FORMS

    names = [FLOOR, FLOOR_BATCH, LATER, FIRST, *(kind.name for kind in FORMS if kind.name != "relish")]
    result: dict[str, Any] = {"bytes": size, "width": width, "batch": BATCH}
    for how, count in (("warm", 100), ("cold", 20)):
        count = 5 if given.small else count
        rivals = [Rival(name, reading, (str(work), tokens, width, name, count, how == "cold")) for name in names]
        lines = compare(race(rivals, rounds=rounds), tokens, width, count)
        header = (f"{how}, {count} batches", "GB/s", "of preadv", "of preadv with batch", "ms a batch")
        keys = ("form", "gb_s", "of_preadv", "of_preadv_batch", "batch_ms")
        print(table(header, [[line[key] for key in keys] for line in lines]) + "\n")
        result[how] = lines

    sizes = [tokens // 100, tokens // 4, tokens, *([] if given.small else [3 * tokens])]
    lines = time_to_first_batch(work, sizes, width, 3 if given.small else 11)
    header = ("GB", "rows", "shards", "first batch, warm", "its CPU time", "cold")
    keys = ("warm_s", "warm_cpu_s", "cold_s")
    shown = [
        (f"{x['bytes'] / 1e9:.2f}", x["rows"], x["shards"], *(f"{x[key] * 1e3:.1f} ms" for key in keys)) for x in lines
    ]
    print(table(header, shown) + "\n")
    result["first_batch"] = lines

    steps = 5 if given.small else 40
    figures = race([Rival("training", training, (str(work / "Relish"), width, steps))], rounds=1, warm_up=0)["training"]
    result["training"] = figures.value
    header = (f"training, {steps} steps", "wait for a batch", "step", "share of waiting")
    shown = [
        (name, f"{x['wait_s'] * 1e3:.2f} ms", f"{x['step_s'] * 1e3:.1f} ms", f"{x['share']:.2%}")
        for name, x in figures.value.items()
        if isinstance(x, dict)
    ]
    print(table(header, shown))
    print(f"a step on batches in memory: {figures.value['in memory'] * 1e3:.1f} ms; ", end="")
    print(f"reading alone: {figures.value['reading alone'] * 1e3:.2f} ms a batch")
    save(given.out, result)


if __name__ == "__main__":
    main()
