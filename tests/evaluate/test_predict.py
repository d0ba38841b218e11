import csv
import json

import numpy as np
import pytest

from relish.cache.errors import RunError
from relish.evaluate import predict
from relish.evaluate.results import evaluate_runs
from relish.train.grid import train_heads
from relish.train.metrics import score
from relish.train.settings import TrainSettings

from ..train.conftest import write_cache
from .conftest import SMALL


@pytest.fixture(scope="module")
def run(tiny_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("predict") / "runs"
    train_heads(tiny_cache, out, TrainSettings(depths=(2,), **SMALL))
    return out / "relish-L2-seed0"


@pytest.fixture
def new(tmp_path, tiny_rows):
    """The texts of the cache's test split, without their labels."""
    path = tmp_path / "new.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(tiny_rows(20, 2))
    return path


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("chunk", [1024, 7])
def test_scores_are_evaluates_numbers_for_the_same_rows(run, new, tiny_model, tmp_path, run_cli, monkeypatch, chunk):
    monkeypatch.setattr(predict, "_CHUNK", chunk)
    out = tmp_path / "scores.csv"
    result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", new, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert f"{out}: 20 scores" in result.stdout
    rows = read(out)
    expected = evaluate_runs(run)
    assert list(rows[0]) == ["id", "text", "score"]
    assert [row["id"] for row in rows] == expected.ids
    # Another batch may round a hidden state to the neighbouring bfloat16.
    np.testing.assert_allclose([float(row["score"]) for row in rows], expected.predictions[0], rtol=0, atol=5e-3)


@pytest.fixture(scope="module")
def seeds(tiny_cache, tmp_path_factory):
    """Runs of two seeds of relish, and of attention pooling."""
    out = tmp_path_factory.mktemp("seeds") / "runs"
    train_heads(tiny_cache, out, TrainSettings(heads=("relish", "attention"), depths=(2,), seeds=(0, 1), **SMALL))
    return out


def test_several_runs_are_averaged(seeds, new, tiny_model, tiny_rows, tmp_path, run_cli):
    def scores(*names):
        out = tmp_path / "scores.csv"
        runs = [seeds / name for name in names]
        result = run_cli("predict", *runs, "--model", tiny_model("llama"), "--data", new, "--out", out)
        assert result.exit_code == 0, result.stderr
        several = len({run.resolve() for run in runs})
        assert result.stdout == f"{out}: 20 scores{f', each the mean of {several} runs' if several > 1 else ''}\n"
        return np.array([float(row["score"]) for row in read(out)])

    names = ("relish-L2-seed0", "relish-L2-seed1", "attention-L0-seed0")
    alone = [scores(name) for name in names]
    assert np.ptp(alone, axis=0).min() > 0
    np.testing.assert_allclose(scores(*names), np.mean(alone, axis=0), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(scores(names[0], f"../runs/{names[0]}"), alone[0])  # named twice, it counts once
    together = next(group for group in evaluate_runs(seeds).groups if group.head == "relish")
    figures = score([row["score"] for row in tiny_rows(20, 2)], scores(*names[:2]), (0, 5))
    assert figures == pytest.approx(together.averaged, abs=1e-2)


def test_runs_of_different_caches_are_not_averaged(seeds, adapted, new, tiny_model, tmp_path, run_cli):
    first = seeds / "relish-L2-seed0"
    out = tmp_path / "scores.csv"
    result = run_cli("predict", first, adapted, "--model", tiny_model("llama"), "--data", new, "--out", out)
    assert result.exit_code == 2
    assert " ".join(result.stderr.split()).startswith(
        f"error: {adapted} was trained on something else than {first}: adapter is '"
    )
    assert result.stderr.endswith("Name runs of one cache and layer, or predict with each alone\n")
    with pytest.raises(RunError, match=r"^there is no run to predict with; name one, such as runs/relish-L3-seed0$"):
        predict.predict_scores([], model=tiny_model("llama"), data=new, out=out)


def test_runs_of_another_layer_or_label_range_are_not_averaged(tmp_path):
    runs = []
    for name, changes in (("a", {}), ("b", {}), ("c", {"label_range": (0.0, 9.0)})):
        cache = write_cache(tmp_path / f"{name}-cache", layers=(1, 2), **changes)
        layer = 2 if name == "b" else 1
        train_heads(cache, tmp_path / name, TrainSettings(depths=(1,), layer=layer, **SMALL))
        runs.append(tmp_path / name / "relish-L1-seed0")
    for other, said in ((runs[1], "layer is 2 there and 1 here"), (runs[2], r"label_range is \[0.0, 9.0\] there and ")):
        with pytest.raises(RunError, match=said):
            predict.predict_scores([runs[0], other], model="m", data="new.csv", out=tmp_path / "s.csv")


def test_the_mark_of_a_diverged_cell_is_no_run(seeds, tmp_path, new, tiny_model, run_cli):
    mark = tmp_path / "relish-L2-seed2.diverged.json"
    mark.write_text("{}", encoding="utf-8")
    words = ("--model", tiny_model("llama"), "--data", new, "--out", tmp_path / "s.csv")
    result = run_cli("predict", seeds / "relish-L2-seed0", mark, *words)
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {mark} is a file and no run folder but the mark of a cell that diverged; leave it out\n",
    )


def test_jsonl_and_a_column_that_is_called_score_already(run, tiny_model, tiny_rows, tmp_path, run_cli):
    data, out = tmp_path / "new.jsonl", tmp_path / "scores.csv"
    data.write_text("\n".join(json.dumps(row) for row in tiny_rows(5, 3)), encoding="utf-8")
    result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", data, "--out", out)
    assert "new.jsonl has a column 'score'; the new one is called 'prediction'" in result.stderr
    rows = read(out)
    assert list(rows[0]) == ["id", "text", "score", "prediction"]
    assert [float(row["score"]) for row in rows] == [row["score"] for row in tiny_rows(5, 3)]


def test_keys_of_jsonl_that_the_first_row_lacks_are_kept(run, tiny_model, tmp_path, run_cli):
    data, out = tmp_path / "new.jsonl", tmp_path / "scores.csv"
    given = [{"text": "warm"}, {"text": "dull", "note": "a"}, {"id": 3, "text": "fresh", "score": 1}]
    data.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", data, "--out", out)
    assert "new.jsonl has a column 'score'; the new one is called 'prediction'" in result.stderr
    rows = read(out)
    assert list(rows[0]) == ["text", "note", "id", "score", "prediction"]
    assert [list(row.values())[:4] for row in rows] == [
        ["warm", "", "", ""],
        ["dull", "a", "", ""],
        ["fresh", "", "3", "1"],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "Rate: {text}"], "was trained with the prompt '{text}', not 'Rate: {text}'; leave --prompt out"),
        (["--layer", 1], "was trained with the layer 3, not 1; leave --layer out"),
    ],
)
def test_another_prompt_or_layer_is_refused(run, new, tiny_model, tmp_path, run_cli, words, message):
    result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", new, "--out", tmp_path / "s.csv", *words)
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_another_backbone_is_refused(run, new, tiny_model, tmp_path, run_cli):
    out = tmp_path / "s.csv"
    result = run_cli("predict", run, "--model", tiny_model("qwen3"), "--data", new, "--out", out)
    assert result.exit_code == 2
    assert (
        "tiny-qwen3 is not the backbone that relish-L2-seed0 was trained on, tiny-llama: the hash of its weights files"
        in result.stderr
    )
    assert not out.exists()


# With an adapter


@pytest.fixture(scope="module")
def adapted(tuned, tiny_model, tiny_rows, tmp_path_factory):
    """A head on the states of a tuned backbone."""
    from relish.extract.pipeline import extract_cache
    from relish.extract.settings import ExtractSettings

    home = tmp_path_factory.mktemp("adapted")
    data = {name: tiny_rows(count, seed) for seed, (name, count) in enumerate((("train", 40), ("test", 20)))}
    settings = ExtractSettings(
        model=tiny_model("llama"), adapter=tuned(), data=data, label_range=(0.0, 5.0), device="cpu"
    )
    extract_cache(home / "cache", settings)
    train_heads(home / "cache", home / "runs", TrainSettings(depths=(1,), **SMALL))
    return home / "runs" / "relish-L1-seed0"


def test_scores_with_the_adapter_are_evaluates_numbers(adapted, tuned, tiny_model, tiny_rows, tmp_path, run_cli):
    data, out = tmp_path / "new.jsonl", tmp_path / "scores.csv"
    data.write_text("\n".join(json.dumps({"text": row["text"]}) for row in tiny_rows(20, 1)), encoding="utf-8")
    words = ("predict", adapted, "--model", tiny_model("llama"), "--data", data, "--out", out)
    result = run_cli(*words, "--adapter", tuned())
    assert result.exit_code == 0, result.stderr
    scores = [float(row["score"]) for row in read(out)]
    np.testing.assert_allclose(scores, evaluate_runs(adapted).predictions[0], rtol=0, atol=5e-3)


def test_a_missing_or_another_adapter_is_refused(run, adapted, tuned, new, tiny_model, tmp_path, run_cli):
    from relish.extract.adapter import read_adapter

    def refused(run, *words):
        out = tmp_path / "s.csv"
        result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", new, "--out", out, *words)
        assert (result.exit_code, out.exists()) == (2, False)
        return result.stderr

    own, other = (read_adapter(tuned(method)).sha256 for method in ("lora", "raft"))
    alone = f"error: relish-L1-seed0 was trained on states of the backbone with the adapter {own[:12]}…, and "
    assert refused(adapted) == f"{alone}none was given; give that one with --adapter\n"
    assert refused(adapted, "--adapter", tuned("raft")) == (
        f"{alone}raft-llama is {other[:12]}…; give that one with --adapter\n"
    )
    assert refused(run, "--adapter", tuned()) == (
        "error: relish-L2-seed0 was trained on states of the backbone alone; leave --adapter out\n"
    )


# What is refused


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("new.csv", "id,body\n1,hello\n", "the prompt names the column 'text', but new.csv has: id, body"),
        ("new.csv", "id,text\n1,fresh\n2,  \n", "row 1 of new.csv has an empty text in column 'text'"),
        ("new.csv", "id,text\n", "new.csv holds no rows"),
        (
            "new.csv",
            "text\n" + "warm " * 200 + "\n",
            "row 0 of new.csv gives 203 tokens, and the head was trained for 1 to 128",
        ),
        ("new.xls", "", "new.xls"),
    ],
)
def test_rows_that_cannot_be_scored_are_named_before_the_backbone_loads(
    run, tiny_model, tmp_path, run_cli, monkeypatch, name, text, message
):
    monkeypatch.setattr(predict.Backbone, "load", lambda _self: pytest.fail("loaded"))
    data, out = tmp_path / name, tmp_path / "scores.csv"
    data.write_text(text, encoding="utf-8")
    result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", data, "--out", out)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_where_the_scores_go(run, new, tiny_model, tmp_path, run_cli):
    result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", new, "--out", new)
    assert (result.exit_code, "--out is the same file as --data" in result.stderr) == (2, True)
    assert new.read_text(encoding="utf-8").startswith("id,text")
    result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", new, "--out", tmp_path / "scores.json")
    assert "give --out a name that ends in .csv, not 'scores.json'" in result.stderr
    result = run_cli("predict", run.parent, "--model", tiny_model("llama"), "--data", new, "--out", tmp_path / "s.csv")
    assert (result.exit_code, "name one or several of its 1 runs, such as" in result.stderr) == (2, True)


def test_a_failure_midway_leaves_the_old_scores_and_no_other_file(run, new, tiny_model, tmp_path, run_cli, monkeypatch):
    out = tmp_path / "scores.csv"
    out.write_text("old")
    forward = predict.Backbone.hidden_states
    calls = []

    def failing(self, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, rows)

    monkeypatch.setattr(predict.Backbone, "hidden_states", failing)
    monkeypatch.setattr(predict, "_CHUNK", 7)
    result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", new, "--out", out)
    assert result.exit_code != 0
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.csv", "scores.csv"]
