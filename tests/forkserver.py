"""Runs `relish` in processes of its own for the tests of faults, each forked from this one, which has imported
everything: a fresh interpreter would take seconds every time. It reads one JSON request a line and answers with one.

{"start": [argv], "kill_before": n, "pause": seconds, "cwd": path} forks and answers {"pid"}. The child is killed right
before the n-th step of a commit, or of a tuning's checkpoints, of which `checkpoints` writes one after each step; each
forward pass takes `pause` seconds longer; os lacks the function `without`.
{"wait": pid} answers {"code", "stdout", "stderr"}; code is negative after a signal, as in subprocess.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

STEPS = ("open", "posix_fallocate", "pwrite", "fsync", "replace", "close")


def count_steps(kill_before: int) -> None:
    """Kill this process before a step: a system call of the commit, of which many writes in a row are one step."""
    from relish.cache.writer import SplitWriter
    from relish.extract.tune_state import TuneState

    left, last = kill_before, ""

    def counted(name, real):
        def call(*arguments, **options):
            nonlocal left, last
            if name != "pwrite" or last != "pwrite":
                left -= 1
            last = name
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    def arm(owner, name):
        real = getattr(owner, name)

        def armed(*arguments):  # from here on: what came before is not part of the protocol
            setattr(owner, name, real)
            for step in STEPS:
                if hasattr(os, step):
                    setattr(os, step, counted(step, getattr(os, step)))
            return real(*arguments)

        setattr(owner, name, armed)

    arm(SplitWriter, "shard")
    arm(TuneState, "save")


def slow_down(pause: float) -> None:
    from relish.extract.backbone import Backbone

    real = Backbone.hidden_states

    def slow(self, rows):
        time.sleep(pause)
        return real(self, rows)

    Backbone.hidden_states = slow


def child(request, out, err) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if "cwd" in request:
        os.chdir(request["cwd"])
    if request.get("without"):
        delattr(os, request["without"])
    if request.get("kill_before"):
        count_steps(request["kill_before"])
    if request.get("checkpoints"):
        from relish.extract import tune_loop

        tune_loop.SAVE_SECONDS = 0.0
    if request.get("pause"):
        slow_down(request["pause"])
    from relish.cli import main

    sys.argv = ["relish", *request["start"]]
    code = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    import torch
    import transformers  # noqa: F401
    from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaModel, PreTrainedTokenizerFast  # noqa: F401

    import relish.cache.reader
    import relish.cli
    import relish.extract.live
    import relish.extract.pipeline
    import relish.extract.tune  # noqa: F401

    torch.set_num_threads(1)
    said = {}
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            paths = [tempfile.mkstemp() for _ in range(2)]
            pid = os.fork()
            if pid == 0:
                child(request, paths[0][0], paths[1][0])
            said[pid] = [Path(path) for _, path in paths]
            for descriptor, _ in paths:
                os.close(descriptor)
            answer = {"pid": pid}
        else:
            pid = request["wait"]
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = [path.read_text(encoding="utf-8") for path in said[pid]]
            for path in said.pop(pid):
                path.unlink()
            answer = {"code": code, "stdout": texts[0], "stderr": texts[1]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
