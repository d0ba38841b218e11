"""Memory that runs out in the LLM's forward pass: fewer rows at once, or the row's length."""

import json

import pytest
import torch

from relish.cache.manifest import load_manifest
from relish.cache.speed import SPEED
from relish.extract.sink import ShardSink


@pytest.fixture
def extract(run_cli, tiny_model, tiny_rows, tmp_path):
    table = tmp_path / "train.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(24)), encoding="utf-8")

    def run(folder, *more):
        fixed = ("--label-range", "0,5", "--device", "cpu", "--shard-rows", "10")
        return run_cli("extract", folder, "--model", tiny_model("llama"), "--data", f"train={table}", *fixed, *more)

    return run


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SPEED}


def test_batches_halve_down_to_one_row_and_the_cache_is_the_same(extract, room, tmp_path):
    assert extract(tmp_path / "one-by-one", "--batch-tokens", 1).exit_code == 0
    tried = room(1)
    result = extract(tmp_path / "c")
    assert result.exit_code == 0, result.stderr
    assert tried == [5, 2, *[1] * 24]  # the next shards begin with what fitted
    assert files(tmp_path / "c") == files(tmp_path / "one-by-one")


def test_memory_that_runs_out_in_the_conversion_halves_the_batch_too(extract, tmp_path, monkeypatch):
    """To the storage type: it is made on the device."""
    assert extract(tmp_path / "one-by-one", "--batch-tokens", 1).exit_code == 0
    real, tried = torch.Tensor.to, []

    def convert(self, *arguments, **options):
        if arguments == (torch.bfloat16,) and self.ndim == 4:
            tried.append(len(self))
            if len(self) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", convert)
    assert extract(tmp_path / "c").exit_code == 0
    assert tried == [5, 2, *[1] * 24]
    assert files(tmp_path / "c") == files(tmp_path / "one-by-one")


def test_what_waits_to_be_written_is_written_before_a_batch_is_tried_again(extract, room, tmp_path, monkeypatch):
    drained, real = [], ShardSink.drain

    def drain(self):
        real(self)
        drained.append(self._queue.unfinished_tasks)

    monkeypatch.setattr(ShardSink, "drain", drain)
    room(1)
    assert extract(tmp_path / "c").exit_code == 0
    assert drained == [0, 0, 0]  # before the split is begun, too


def test_a_single_row_that_does_not_fit_is_named_by_its_length(extract, room, tmp_path):
    assert extract(tmp_path / "whole").exit_code == 0
    tried = room(0)
    result = extract(tmp_path / "c")
    assert (result.exit_code, result.stdout, tried) == (2, "", [5, 2, 1])
    tokens = load_manifest(tmp_path / "whole").splits["train"].longest
    assert result.stderr.endswith(
        f"error: out of memory on a single row of {tokens:,} tokens; use --max-length with --truncate, a smaller "
        "--compute-dtype, or a device with more memory\n"
    )
    assert sorted(files(tmp_path / "c")) == [".lock"]
