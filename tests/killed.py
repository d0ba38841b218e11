"""Kills `relish train` and `relish evaluate` at every step that touches a file, and at random moments."""

import os
import subprocess
import sys

# Forks a process for each kill, so that torch is imported once. An audit hook sees every file that is opened, made,
# renamed or removed under `home`, and kills the process right before the n-th of these.
SCRIPT = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path

import jinja2, matplotlib.backends.backend_agg, matplotlib.figure, rich.live, rich.table, safetensors.torch, scipy.stats
import torch.optim.adamw
import PIL.PngImagePlugin, PIL.BmpImagePlugin, PIL.GifImagePlugin, PIL.JpegImagePlugin, PIL.PpmImagePlugin
import relish.evaluate.report, relish.evaluate.results, relish.evaluate.tables, relish.train.grid, relish.train.live
from relish.cli import app

what, cache, home = sys.argv[1], sys.argv[2], Path(sys.argv[3])
TRAIN = ["train", cache, "--head", "relish", "--depths", "1", "--seeds", "0-1", "--epochs", "1"]
TRAIN += ["--latent-size", "8", "--num-heads", "2", "--device", "cpu", "--threads", "1"]
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def words(folder):
    return [*TRAIN, "--out", str(folder)] if what == "train" else ["evaluate", str(home / "runs"), "--out", str(folder)]


def start(words, folder, kill_before=None):
    child = os.fork()
    if child:
        return child
    left = kill_before
    def hook(event, arguments):
        nonlocal left
        if event in EVENTS and any(str(folder) in str(argument) for argument in arguments[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    if kill_before is not None:
        sys.addaudithook(hook)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(home / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    try:
        app(words)
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(70)


def run(words, folder, kill_before=None):
    status = os.waitpid(start(words, folder, kill_before), 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, (home / "stderr").read_text()
    return False


def contents(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == ".lock":
            continue
        found[name] = path.read_bytes()
        # Wall times are in these three and nowhere else; metrics.json ends with a hash of itself.
        if path.name == "metrics.json":
            value = json.loads(found[name])
            del value["seconds"], value["sha256"]
            found[name] = value
        if path.name == "results.json":
            value = found[name] = json.loads(found[name])
            for one in value["cells"] + value["groups"]:
                del one["seconds_per_1000_rows"]
        if path.name == "history.jsonl":
            found[name] = [{**json.loads(line), "seconds": 0} for line in found[name].splitlines()]
    return found


def cells(folder):
    return {path.parent.name for path in folder.glob("[!.]*/config.json")}


def check_train(folder, before):
    for name in cells(folder):  # under a final name everything is whole
        part = {f"{name}/{file}" for file in ("config.json", "history.jsonl", "metrics.json", "model.safetensors")}
        there = contents(folder)
        assert all(there[file] == whole[file] for file in part), name
    assert before <= cells(folder)


def check_report(folder, before):
    there = contents(folder)
    for name, content in there.items():
        assert name.startswith(".report.tmp") or content in (old.get(name), whole.get(name)), name


run(words(home / "whole"), home / "whole")
whole = contents(home / "whole")
if what == "train":
    run(words(home / "twice"), home / "twice")
    assert contents(home / "twice") == whole
    old, check = {}, check_train
else:
    run(["evaluate", str(home / "runs"), "--split", "dev", "--out", str(home / "old")], home / "old")
    old, check = contents(home / "old"), check_report
    assert set(old) == set(whole) and not any(old[name] == whole[name] for name in old)

killed, states = 0, set()
while True:
    folder = home / f"killed-{killed}"
    if what == "evaluate":
        shutil.copytree(home / "old", folder)
    if not run(words(folder), folder, killed + 1):
        break
    check(folder, set())
    states.add(len(cells(folder)) if what == "train" else sum(contents(folder).get(n) == whole[n] for n in whole))
    had = cells(folder)
    times = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in had}
    run(words(folder), folder)
    assert contents(folder) == whole, killed
    assert all((folder / name / "model.safetensors").stat().st_mtime_ns == times[name] for name in had)
    shutil.rmtree(folder)
    killed += 1
assert contents(folder) == whole

# At random moments, several times in the same folder: every cell that was there stays.
draw, hits = random.Random(0), 0
began = time.monotonic()
run(words(home / "timed"), home / "timed")
spent = time.monotonic() - began
folder = home / "random"
tries = 0
while hits < int(sys.argv[4]):
    tries += 1
    assert tries < 10 * int(sys.argv[4]), f"only {hits} kills hit"
    before = cells(folder)
    child = start(words(folder), folder)
    time.sleep(draw.uniform(0, spent))
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    hits += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    check(folder, before)
    if contents(folder) == whole:
        shutil.rmtree(folder)
run(words(folder), folder)
assert contents(folder) == whole
print(f"{spent:.2f} s each", file=sys.stderr)
print(killed, sorted(states))
"""


def run_script(what, cache, home, kills):
    """How many steps there were, and how much was new after a kill at each (a list); random kills come after these.

    Args:
        what: train or evaluate.
        cache: to train on.
        home: a folder to work in.
        kills: how many processes to kill at random moments, those that ended before not counted.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, what, str(cache), str(home), str(kills)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    killed, states = done.stdout.split(" ", 1)
    return int(killed), states.strip()
