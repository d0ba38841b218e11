"""A load run: an extraction of many rows that is killed again and again, what comes out in the end, and training on it.

    python benchmarks/load_faults.py --out load_faults.json
    python benchmarks/load_faults.py --rows 20000 --kills 200

A tiny random model reads the rows. Processes that run `relish extract` are killed (SIGKILL) at random moments, start-up
included, and started again; each finished cache is compared, byte for byte, with that of an unbroken run. When a cache
is finished before all kills are done, the next one begins. Then a head is trained on the last of them, and one on a
tenth of the rows: the peak memory after each epoch shows whether it grows, with time or with rows. To save the minutes
that importing torch would take, each process is forked from this one, which has imported everything but computed
nothing.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from backbones import WORDS, tiny_model
from measure import machine

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make_rows(path: Path, count: int) -> None:
    draw = Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(draw.choice(WORDS) for _ in range(8 + int(8 * draw.paretovariate(1.5)) % 90))
            file.write(json.dumps({"id": number, "text": text, "score": round(draw.uniform(0, 5), 2)}) + "\n")


def fork(task: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            task()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            os._exit(code)
    return pid


def extract(words: list[str]) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    from relish.cli import main

    sys.argv = words
    main()


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(cache: Path, out: Path, epochs: int, peaks: Path) -> None:
    """Train one head; `peaks` gets the peak memory in MB before the training and after each epoch."""
    from relish.train.grid import train_heads
    from relish.train.settings import TrainSettings

    seen = [peak_mb()]

    class Memory:
        def plan(self, *_: object) -> None: ...
        def start(self, *_: object) -> None: ...
        def step(self, *_: object) -> None: ...
        def end(self, *_: object) -> None: ...
        def epoch(self, *_: object) -> None:
            seen.append(peak_mb())

    settings = TrainSettings(depths=(1,), epochs=epochs, patience=epochs, threads=1, device="cpu")
    train_heads(cache, out, settings, listener=Memory())
    peaks.write_text(json.dumps(seen))


def peak_mb() -> int:
    per_mb = 1_000_000 if sys.platform == "darwin" else 1_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // per_mb


def listed(folder: Path) -> dict[str, int]:
    """Each listed shard, and when it was written."""
    from relish.cache.manifest import load_manifest

    if not (folder / "manifest.json").exists():
        return {}
    records = load_manifest(folder).splits["train"].shards
    return {record.file: (folder / record.file).stat().st_mtime_ns for record in records}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "speed.json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--shard-rows", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=4, help="of the training at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("load_faults.json"))
    given = parser.parse_args()

    # All that an extraction or a training imports: the processes that are forked inherit it.
    import torch
    import transformers  # noqa: F401
    from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaModel  # noqa: F401

    import relish.cli
    import relish.extract.live
    import relish.extract.pipeline
    import relish.train.grid  # noqa: F401
    from relish.cache.reader import open_cache
    from relish.cache.verify import verify_cache

    torch.set_num_threads(1)
    draw = Random(given.seed)
    home = Path(tempfile.mkdtemp(prefix="load-faults-"))
    model, table = home / "model", home / "train.jsonl"
    assert wait(fork(lambda: tiny_model(model, hidden_size=256))) == 0
    make_rows(table, given.rows)
    tenth = home / "tenth.jsonl"
    make_rows(tenth, given.rows // 10)

    def words(folder: Path, table: Path = table) -> list[str]:
        shape = ["--label-range", "0,5", "--device", "cpu", "--shard-rows", str(given.shard_rows)]
        return ["relish", "extract", str(folder), "--model", str(model), "--data", f"train={table}", *shape]

    began = time.monotonic()
    whole = home / "whole"
    pid = fork(lambda: extract(words(whole)))
    while not listed(whole):
        time.sleep(0.01)
        assert os.waitpid(pid, os.WNOHANG)[0] == 0 or listed(whole), "the unbroken run failed"
    first = time.monotonic() - began
    assert wait(pid) == 0
    unbroken = time.monotonic() - began
    expected, planned = contents(whole), len(listed(whole))
    per_shard = (unbroken - first) / max(planned - 1, 1)
    print(f"unbroken: {given.rows:,} rows, {planned} shards, {unbroken:.1f} s, the first shard after {first:.1f} s")

    kills, caches, attempts, without_progress = 0, 0, 0, 0
    most_lost, touched, different = 0, 0, 0
    began = time.monotonic()
    folder = whole
    while kills < given.kills or caches == 0:
        folder, before = home / f"cache-{caches}", {}
        while True:
            pid = fork(lambda folder=folder: extract(words(folder)))
            attempts += 1
            if kills < given.kills:
                time.sleep(draw.uniform(0, 2 * first + 3 * per_shard))
                os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            after = listed(folder) if folder.exists() else {}
            touched += sum(after.get(name) != moment for name, moment in before.items())
            if folder.exists():
                unlisted = {path.name for path in folder.glob("*.h5")} - set(after)
                unlisted |= {path.name[1:].removesuffix(".tmp") for path in folder.glob(".*.h5.tmp")}
                most_lost = max(most_lost, len(unlisted))
            without_progress += code != 0 and after == before
            before = after
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"the extraction failed with exit code {code}"
            kills += 1
            if kills % 20 == 0:
                print(f"{kills} kills, cache {caches + 1}, {len(after)} of {planned} shards")
        different += contents(folder) != expected
        assert verify_cache(open_cache(folder)) == []
        caches += 1
        if kills < given.kills:
            shutil.rmtree(folder)
    seconds = time.monotonic() - began
    assert wait(fork(lambda: extract(words(home / "tenth", tenth)))) == 0
    peaks = {}
    for name, cache in (("all rows", folder), ("a tenth of them", home / "tenth")):
        file = home / f"{cache.name}-peaks.json"
        pid = fork(lambda cache=cache, file=file: train(cache, home / f"{cache.name}-runs", given.epochs, file))
        assert wait(pid) == 0, "the training failed"
        peaks[name] = json.loads(file.read_text())
        print(f"training on {name}: peak memory in MB before it and after each epoch: {peaks[name]}")
    result = {
        "rows": given.rows,
        "tokens": open_cache(whole).manifest.splits["train"].tokens,
        "shards": planned,
        "bytes": sum(map(len, expected.values())),
        "kills": kills,
        "attempts": attempts,
        "kills_without_progress": without_progress,
        "caches_finished": caches,
        "caches_that_differ": different,
        "most_shards_lost_by_a_kill": most_lost,
        "finished_shards_touched": touched,
        "seconds_unbroken": round(unbroken, 1),
        "seconds": round(seconds, 1),
        "training_peak_mb": peaks,
        "machine": machine(),
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    shutil.rmtree(home)
    if different or touched or most_lost > 1:
        sys.exit("finished work was lost, or a finished cache differs")
    first_epoch, last = peaks["all rows"][1], peaks["all rows"][-1]
    if last > 1.05 * first_epoch or last > 1.15 * peaks["a tenth of them"][-1]:
        sys.exit("training takes more memory with time, or with rows")


if __name__ == "__main__":
    main()
