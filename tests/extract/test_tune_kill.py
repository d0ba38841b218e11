"""Real `relish tune` processes that are killed while they write, and the same command run again."""

import json
import signal

import pytest

FILES = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors")


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_model, tiny_rows):
    pytest.importorskip("peft")
    home = tmp_path_factory.mktemp("rows")
    for name, rows in (("train", tiny_rows(12)), ("dev", tiny_rows(6, 1))):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = [word for name in ("train", "dev") for word in ("--data", f"{name}={home / name}.jsonl")]
    fixed = ("--label-range", "0,5", "--device", "cpu", "--epochs", "2", "--batch-size", "6", "--lr", "0.01", "--json")

    def arguments(folder):
        return ("tune", folder, "--model", tiny_model("llama"), "--method", "lora", *data, *fixed)

    return arguments


@pytest.fixture(scope="module")
def whole(command, relish_process, tmp_path_factory):
    """The files of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    done = relish_process.run(*command(folder))
    assert done.code == 0, done.stderr
    return files(folder)


def files(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_killed_at_steps_of_the_writing_it_goes_on_to_the_same_adapter(command, whole, relish_process, tmp_path):
    """Every third step: a file takes five, so that each of them comes round."""
    step, seen = 1, set()
    while True:
        folder = tmp_path / f"step-{step}"
        done = relish_process.run(*command(folder), kill_before=step, checkpoints=True)
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done.stderr
        seen.add(tuple(sorted(path.name for path in folder.iterdir() if path.name != ".lock")))
        done = relish_process.run(*command(folder))
        assert done.code == 0, done.stderr
        assert files(folder) == whole, step
        left = {path.name for path in folder.iterdir()}
        assert left == {".lock", "tune.json", *FILES}, step
        step += 3
    checkpoint = "checkpoint.safetensors"
    for state in (
        (f".{checkpoint}.tmp",),
        (checkpoint,),
        (f".{checkpoint}.tmp", checkpoint),
        ("adapter_config.json", checkpoint),
    ):
        assert state in seen, seen
