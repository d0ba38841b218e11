"""Cells trained in processes of their own: the same weights, and every fault ends with a sentence and no process."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from relish.cache.errors import CacheError, RunError
from relish.cache.lock import lock_folder
from relish.cache.reader import open_cache
from relish.train import grid
from relish.train.grid import train_heads
from relish.train.settings import TrainSettings
from relish.train.workers import _Worker

from .conftest import write_cache

SMALL = {"latent_size": 32, "num_heads": 4, "epochs": 2, "threads": 1, "device": "cpu"}
SLOW = ["--epochs", 3000, "--patience", 3000, "--latent-size", 32, "--num-heads", 4, "--device", "cpu"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find processes")


class Heard:
    def __init__(self):
        self.events = []

    def plan(self, cells, steps):
        self.events.append(("plan", cells, steps))

    def start(self, cell):
        self.events.append(("start", cell))

    def step(self, cell, done):
        self.events.append(("step", cell, done))

    def epoch(self, cell, record):
        self.events.append(("epoch", cell, record.epoch))

    def end(self, cell, status, metrics):
        self.events.append(("end", cell, status))


def weights(folder):
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*/model.safetensors")
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# the same results


def test_weights_are_the_same_bit_for_bit_alone_in_a_grid_and_in_any_number_of_processes(cache, tmp_path):
    settings = {"heads": ("linear", "ridge", "relish"), "depths": (1, 2), "seeds": (0, 1), "dropout": 0.1, **SMALL}
    heard = Heard()
    one = train_heads(cache, tmp_path / "one", TrainSettings(**settings, workers=1))
    two = train_heads(cache, tmp_path / "two", TrainSettings(**settings, workers=2), listener=heard)
    alone = {**settings, "heads": ("linear", "relish"), "depths": (2,), "seeds": (1,)}
    train_heads(cache, tmp_path / "alone", TrainSettings(**alone))
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    assert weights(tmp_path / "alone").items() <= weights(tmp_path / "two").items()

    assert list(two.cells) == list(one.cells)  # in the order of the grid…
    for cell in two.cells:  # …and what is heard of each is whole and in order
        own = [(what, *rest) for what, about, *rest in heard.events if about == cell]
        assert (own[0], own[-1]) == (("start",), ("end", "done"))
        if cell.head != "ridge":
            assert [rest[0] for what, *rest in own if what == "epoch"] == [1, 2]
            assert own[-3:-1] == [("step", 12), ("epoch", 2)]
    assert {**two.cells[cell], "seconds": 0} == {**one.cells[cell], "seconds": 0}

    again = Heard()
    train_heads(cache, tmp_path / "two", TrainSettings(**settings, workers=2), listener=again)
    assert [(what, *rest) for what, _, *rest in again.events[1:]] == [("end", "there already")] * 7
    assert names(tmp_path / "two") == names(tmp_path / "one")


def test_the_longest_cells_are_handed_out_first(cache, tmp_path, monkeypatch):
    handed, hand = [], _Worker.hand

    def note(worker, cell):  # what the processes say of their starts may cross on its way
        handed.append(cell)
        hand(worker, cell)

    monkeypatch.setattr(_Worker, "hand", note)
    settings = TrainSettings(heads=("linear", "ridge", "relish"), depths=(1, 2), seeds=(0, 1), workers=2, **SMALL)
    train_heads(cache, tmp_path, settings)
    assert [(cell.head, cell.depth) for cell in handed if cell] == [
        *[("relish", 2)] * 2,
        *[("relish", 1)] * 2,
        *[("linear", 0)] * 2,
        ("ridge", 0),
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_cells_of_the_folder_that_are_not_in_the_grid_are_not_heard_of(cache, tmp_path, workers):
    train_heads(cache, tmp_path, TrainSettings(heads=("linear",), seeds=(0, 1), **SMALL))
    one, heard = TrainSettings(heads=("linear",), seeds=(1,), workers=workers, **SMALL), Heard()
    assert list(map(str, train_heads(cache, tmp_path, one, listener=heard).cells)) == ["linear-L0-seed1"]
    assert [(what, str(cell), *rest) for what, cell, *rest in heard.events[1:]] == [
        ("end", "linear-L0-seed1", "there already")
    ]


def test_a_script_without_a_main_guard_trains_in_processes(cache, tmp_path):
    script = tmp_path / "scripts" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "import sys\nimport relish\nprint('once')\n"
        f"settings = relish.TrainSettings(depths=(1, 2), workers=2, **{SMALL!r})\n"
        "print(len(relish.train_heads(sys.argv[1], sys.argv[2], settings).cells))\n"
    )
    (tmp_path / "random.py").write_text("raise ImportError('a file that only lies where the script is run')")
    command = [sys.executable, script, cache, tmp_path / "runs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("once\n2\n", "")


def test_how_many_processes_and_threads(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "available_cores", lambda: 4)
    monkeypatch.setattr(grid.torch, "get_num_threads", lambda: 64)  # in a container torch counts all of a machine's

    def shares(**changes):
        settings = TrainSettings(**{"latent_size": 32, "num_heads": 4, "device": "cpu", "epochs": 200, **changes})
        processes = grid._processes(grid.open_training(cache, tmp_path, settings), grid.grid_cells(settings))
        return processes, grid._threads_each(settings, processes)

    assert shares() == (1, 4)  # one cell alone takes all cores
    assert shares(seeds=(0, 1)) == (2, 2)
    assert shares(seeds=tuple(range(9))) == (4, 1)
    assert shares(seeds=tuple(range(9)), threads=2) == (2, 2)
    assert shares(seeds=tuple(range(9)), workers=3) == (3, 1)
    assert shares(seeds=tuple(range(9)), workers=1) == (1, 4)
    assert shares(seeds=tuple(range(9)), epochs=1) == (1, 4)  # 54 steps are done before a process has started


# errors and deaths


def test_a_cell_that_diverges_does_so_in_a_process_of_its_own_too(tmp_path):
    cache = write_cache(tmp_path / "c", fill=3e38)
    settings = TrainSettings(heads=("linear", "mlp", "ridge-mean"), standardise=False, workers=2, **SMALL)
    result = train_heads(cache, tmp_path / "r", settings)
    assert [str(cell) for cell in result.diverged] == ["linear-L0-seed0", "mlp-L0-seed0", "ridge-mean-L0-seed0"]
    assert result.cells == {}
    assert names(tmp_path / "r") == [f"{cell}.diverged.json" for cell in result.diverged]


def test_an_error_in_a_process_is_the_error_here_and_finished_cells_are_kept(tmp_path):
    cache = write_cache(tmp_path / "c", sizes={"train": 60, "dev": 20})
    settings = {"seeds": (0, 1, 2), "depths": (1,), "standardise": False, **SMALL}
    train_heads(cache, tmp_path / "r", TrainSettings(**{**settings, "seeds": (0,)}))
    record = open_cache(cache).manifest.splits["dev"].shards[0]
    shard = cache / record.file
    content = bytearray(shard.read_bytes())
    content[record.offset] ^= 1  # in the hidden states, which only a process that validates reads
    shard.write_bytes(content)
    raised = []
    for workers in (1, 2):
        with pytest.raises(CacheError, match=f"{record.file} is damaged") as error:
            train_heads(cache, tmp_path / "r", TrainSettings(**settings, workers=workers))
        raised.append((type(error.value), str(error.value)))
        assert names(tmp_path / "r") == ["relish-L1-seed0"]
    assert raised[0] == raised[1]
    assert "in train_cell" in str(error.value.__cause__)  # where it arose


def test_a_process_that_cannot_start_is_an_error(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false") or pytest.skip("needs the command false"))
    settings = TrainSettings(seeds=(0, 1), workers=2, **SMALL)
    with pytest.raises(RunError, match="the process that trained relish-L3-seed[01] ended with code 1; finished cells"):
        train_heads(cache, tmp_path / "r", settings)


def test_a_listener_that_fails_leaves_no_process(cache, tmp_path):
    class Fails(Heard):
        def epoch(self, cell, record):
            raise LookupError("mine")

    settings = TrainSettings(seeds=(0, 1), **{**SMALL, "workers": 2, "epochs": 3000, "patience": 3000})
    before = children(os.getpid())  # other tests' helpers
    with pytest.raises(LookupError, match="mine"):
        train_heads(cache, tmp_path / "r", settings, listener=Fails())
    assert children(os.getpid()) == before
    with lock_folder(tmp_path / "r", RunError):
        assert names(tmp_path / "r") == []


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == pid and rest.split()[0] != "Z":
            found.append(int(name.split()[0]))
    return sorted(found)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@contextmanager
def training(cache, runs, *more):
    """A training in two processes that lasts, in a process group of its own; gives it and its two processes at work."""
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from relish.train.live import LiveTable\n"
        "LiveTable.start = lambda self, cell: print('start', cell, file=sys.stderr, flush=True)\n"
        "from relish.cli import main\nsys.argv[0] = 'relish'\nmain()\n"
    )
    words = ["train", cache, "--out", runs, "--depths", "1", "--seeds", "0-3", "--workers", 2, *SLOW, *more]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = []
    try:
        assert process.stderr is not None
        lines = []
        while sum(line.startswith("start") for line in lines) < 2:
            line = process.stderr.readline()
            assert line, lines
            lines.append(line)
        workers = children(process.pid)
        assert len(workers) == 2
        yield process, workers
    finally:
        process.kill()
        process.communicate()
        for pid in workers:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


def all_gone(pids, within=5.0):
    until = time.monotonic() + within
    while time.monotonic() < until:
        if all(map(gone, pids)):
            return True
        time.sleep(0.01)
    return False


@needs_proc
def test_a_process_that_is_killed_is_named_with_a_way_out_and_the_others_end(cache, tmp_path):
    runs = tmp_path / "r"
    with training(cache, runs) as (process, workers):
        (runs / ".relish-L1-seed0.tmp").mkdir()  # as if it was saving its run
        os.kill(workers[0], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2, said
        assert all_gone(workers, within=0.5)
    last = said.splitlines()[-1]
    assert last.startswith("error: the process that trained relish-L1-seed")
    assert last.endswith(
        " was killed (SIGKILL); finished cells are kept: run the same command again. If memory ran out, --workers 1 "
        "takes less"
    )
    assert "Traceback" not in said
    assert names(runs) == []


@needs_proc
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_goes_to_the_whole_group_and_ends_it_in_order(cache, tmp_path, number, code):
    with training(cache, tmp_path / "r") as (process, workers):
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert all_gone(workers, within=0.5)
    assert said.splitlines()[-1].startswith("interrupted; what is finished is kept")
    assert "Traceback" not in said
    assert names(tmp_path / "r") == []


@needs_proc
def test_processes_end_at_once_when_the_one_that_started_them_is_killed(cache, tmp_path):
    with training(cache, tmp_path / "r") as (process, workers):
        process.kill()
        assert all_gone(workers)
        _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    with lock_folder(tmp_path / "r", RunError):
        assert names(tmp_path / "r") == []
