"""The benchmarks run: each in its smallest form, as a process."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

DECIMAL = r"\d+\.\d+"
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(name: str, out: Path, *more: str) -> tuple[dict, str]:
    command = [sys.executable, BENCHMARKS / name, "--small", "--out", out, *more]
    single = {**os.environ, "OMP_NUM_THREADS": "1"}  # many processes at once, of which none has much to do
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=single)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def test_grid(tmp_path):
    result, shown = run("grid.py", tmp_path / "grid.json")
    assert result["machine"]["torch"]
    assert not result["rival"]["extrapolated"]
    assert result["factor"] == pytest.approx(result["rival"]["wall_s"] / result["relish"]["wall_s"])
    for mine, other in zip(result["relish"]["cells"], result["rival"]["cells"], strict=True):
        # The same weights, batches and recipe on both sides: any difference but rounding is a mistake in one of them.
        assert (mine["depth"], mine["seed"]) == (other["depth"], other["seed"])
        assert mine["pearson"] == pytest.approx(other["pearson"], abs=1e-3)
        assert mine["nrmse"] == pytest.approx(other["nrmse"], abs=1e-3)
    assert "2 cells, 96 training rows, 2 epochs" in shown


def test_scaling(tmp_path):
    result, shown = run("scaling.py", tmp_path / "scaling.json")
    assert [one["varied"] for one in result["series"]] == ["D", "T", "L", "rows", "cells"]
    assert all(second > 0 for one in result["series"] for second in one["seconds"])
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert shown.count("\n") == 7


def test_extract(tmp_path):
    result, shown = run("extract.py", tmp_path / "extract.json")
    own = {"relish", "relish, layer 1", "floor"}
    others = {"padded to 256", "padded to the longest", "sentence-transformers", "pipeline"}
    assert set(result["rivals"]) == own | others
    for one in result["rivals"].values():
        assert one["tokens_per_s"] > 0
    assert set(result["peak_mb_by_rows"]) == {"16", "64"}
    assert "the forward passes waited" in shown


def test_end_to_end(tmp_path):
    result, shown = run("end_to_end.py", tmp_path / "end_to_end.json")
    cost = result["seconds_a_row"]
    assert min(cost.values()) > 0
    assert result["break_even_cells"]["5"] == pytest.approx((cost["x"] + cost["m"]) / (5 * cost["f"]))
    fifteen = result["stsb"]["grids"][-1]
    assert fifteen["recompute_s"] == pytest.approx(5749 * 15 * 5 * (cost["f"] + cost["t"]))
    assert "the cache pays from" in shown


def test_startup(tmp_path):
    result, _ = run("startup.py", tmp_path / "startup.json")
    stages = result["first_step_stages_s"]
    assert list(stages) == ["imported", "opened", "begun", "step"]
    assert list(stages.values()) == sorted(stages.values())
    assert result["commands"]["relish train, first step"]["median_s"] == pytest.approx(stages["step"])


def test_train_step(tmp_path):
    result, shown = run("train_step.py", tmp_path / "train_step.json")
    assert [one["depth"] for one in result["results"]] == [1, 2]
    assert all(one["ratio"] > 0 and one["ours_over_floor"] > 0 for one in result["results"])
    assert "plain ÷ ours" in shown


def test_mix_step(tmp_path):
    result, shown = run("mix_step.py", tmp_path / "mix_step.json")
    assert [one["ratio"] > 0 for one in result["results"]] == [True]
    assert "| 16 | 8 | ragged |" in shown


@pytest.mark.parametrize("name", ["comparison", "comparison-1000", "comparison-full"])
def test_the_committed_tables_of_a_comparison_come_out_of_its_reports(name, tmp_path):
    kept = BENCHMARKS / "results" / name
    command = [sys.executable, BENCHMARKS / "comparison.py", tmp_path, "--kept", kept, "--tasks", ""]
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    tables = ("comparison/comparison.md", "overview.md", "averaged.md", "recipe.md")
    for made in [table for table in tables if (kept / Path(table).name).exists()]:
        texts = [path.read_text(encoding="utf-8") for path in (kept / Path(made).name, tmp_path / made)]
        words, numbers = zip(*[(re.sub(DECIMAL, "#", text), re.findall(DECIMAL, text)) for text in texts], strict=True)
        assert words[0] == words[1], f"tables print otherwise now: make those of {kept} again by this command"
        # Another processor may round the last digit otherwise.
        digits = [10.0 ** -len(number.partition(".")[2]) for number in numbers[0]]
        off = np.abs(np.array(numbers[1], dtype=float) - np.array(numbers[0], dtype=float))
        assert (off <= 1.1 * np.array(digits)).all()


def test_comparison(tmp_path):
    # From kept reports, as the tables of RESULTS.md are made.
    work, kept = tmp_path / "work", tmp_path / "kept"
    result, shown = run("comparison.py", tmp_path / "comparison.json", work, "--kept", kept, "--jobs", "2")
    parts = [f"stsb-tiny-{part}.tar.xz" for part in ("frozen", "prompted", "tuned", "tuned1")]
    assert sorted(path.name for path in kept.iterdir()) == parts
    methods = {method["method"] for place in result["places"] for method in place["methods"]}
    families = {"greedy-0shot", "rail-0shot", "rail-samples-2shot", "ridge", "ridge-mean", "attention", "relish, L = 2"}
    tuned = {"tuned-head on lora", "linear-last on lora", "relish, L = 1 on lora"}
    answering = {"rail-sum-0shot on raft", "relish, L = 1 on raft"}
    assert families | tuned | answering <= methods
    seeds = {method["method"]: method["seeds"] for place in result["places"] for method in place["methods"]}
    assert {seeds[method] for method in tuned | answering} == {2}  # two trainings of the LLM
    assert "Macro average" in shown
    assert "favours the rival" not in (work / "comparison" / "comparison.md").read_text()  # all have validation figures
    recipe = (work / "recipe.md").read_text()
    for method in ("lora", "raft"):
        unpacked = (work / "unpacked" / "stsb-tiny").glob(f"{method}-*/tune.json")
        nrmse = {path.parent.name: json.loads(path.read_text())["val"]["nrmse"] for path in unpacked}
        assert set(nrmse) == {f"{method}-3e-4", f"{method}-1e-3", f"{method}-seed1"}
        del nrmse[f"{method}-seed1"]
        best = min(nrmse, key=nrmse.__getitem__)
        done = {
            name: (work / "done" / f"stsb-tiny-{name}").read_text().splitlines()[0]
            for name in (f"extract-{method}", f"tune-{method}-seed1", f"extract-{method}-seed1")
        }
        assert done[f"extract-{method}"].endswith(f"--adapter {work / 'stsb' / 'tiny' / best}")
        assert done[f"tune-{method}-seed1"].endswith(f"--seed 1 --epochs 1 --lr {best.removeprefix(method + '-')}")
        assert done[f"extract-{method}-seed1"].endswith(f"--adapter {work / 'stsb' / 'tiny' / f'{method}-seed1'}")
        figures = [
            f"{rate}: {100 * nrmse[f'{method}-{name}']:.1f}" for rate, name in (("0.0003", "3e-4"), ("0.001", "1e-3"))
        ]
        assert f"| stsb-tiny | {method} | {'; '.join(figures)} |" in recipe
    assert {"frozen-2-report", "loss-report"} <= {path.name for path in (work / "unpacked" / "stsb-tiny").iterdir()}
    assert "| stsb-tiny | 2 | 1 |" in recipe
    assert all(f"| stsb-tiny | {states} | 2 |" in recipe for states in ("frozen", "lora", "raft"))
    assert json.loads((work / "unpacked" / "stsb-tiny" / "machine.json").read_text())["commit"]
    glance = (work / "overview.md").read_text().splitlines()
    (own,) = (line for line in glance if line.startswith("| LoRA and its linear head | "))
    place = next(place for place in result["places"] if place["backbone"] == "model")
    figures = next(method for method in place["methods"] if method["method"] == "tuned-head on lora")
    assert f"{figures['nrmse']['mean']:.3f}" in own
    assert sum(" ‡ |" in line for line in glance) == 1
    again, shown = run("comparison.py", tmp_path / "again.json", work, "--kept", kept)
    assert again == result
    assert all(f"taken from {kept}: {part}" in shown for part in parts)

    # A further seed of a tuning that was run elsewhere.
    (kept / parts[3]).unlink()
    elsewhere = tmp_path / "elsewhere"
    again, _ = run("comparison.py", tmp_path / "again.json", elsewhere, "--kept", kept, "--jobs", "2")
    assert sorted(path.name for path in kept.iterdir()) == parts
    assert {path.name for path in (elsewhere / "done").iterdir()} == {
        f"stsb-tiny-{step}-{method}-seed1{layer}"
        for method in ("lora", "raft")
        for step, layer in (("tune", ""), ("extract", ""), ("train", "-2"), ("evaluate", "-2"))
    }
    same = ("method", "seeds", "pearson", "nrmse", "val_nrmse")
    figures, expected = (
        [[{name: method[name] for name in same} for method in place["methods"]] for place in found["places"]]
        for found in (again, result)
    )
    assert figures == expected

    packed = kept / parts[0]
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "other", filter="data")
    plan = json.loads((tmp_path / "other" / "plan.json").read_text())
    (tmp_path / "other" / "plan.json").write_text(json.dumps({**plan, "rows": {**plan["rows"], "train": 25}}))
    with tarfile.open(packed, "w:xz") as archive:
        archive.add(tmp_path / "other" / "plan.json", "plan.json")
    command = [sys.executable, BENCHMARKS / "comparison.py", work, "--small", "--kept", kept]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"{packed} was run by another plan (rows {{'train': 25, ")


def test_the_tables_at_a_glance(monkeypatch):
    """Bold, marks, a method without correlation, one that was not run everywhere, and one of no known name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from overview import overview

    def figures(*values):
        return dict(zip(("pearson", "spearman", "nrmse"), values, strict=True))

    def method(name, *values):
        return {"method": name, **{metric: {"mean": value} for metric, value in figures(*values).items()}}

    relish, attention = ("relish, L = 3", 0.5, 0.4, 0.2), ("attention", 0.6, 0.4, 0.25)
    greedy = ("greedy-0shot", None, None, 0.5)
    tuned, own, median = (
        ("ridge on lora", 0.1, 0.1, 0.3),
        ("my-head on lora", 0.1, 0.1, 0.3),
        ("rail-median-0shot", 0, 0, 0.3),
    )
    here = {"dataset": "a", "backbone": "llm"}
    duel = {**here, "contender": "RELISH, chosen", "opponent_method": "attention"}
    comparison = {
        "average_seeds": False,
        "datasets": ["a", "b"],
        "backbones": ["llm"],
        "places": [
            {**here, "methods": [method(*one) for one in (relish, attention, greedy, tuned, own, median)]},
            {"dataset": "b", "backbone": "llm", "methods": [method(*relish), method(*greedy)]},
        ],
        "chosen": [{**here, "family": "relish", "method": "relish, L = 3"}],
        "tests": [
            {**duel, "metric": metric, "outcome": outcome} for metric, outcome in figures("loss", "tie", "win").items()
        ],
        "best_rival": [
            {**duel, "opponent": "best rival", "method": "relish, L = 3", "ours": ours, "theirs": theirs, **one}
            for ours, theirs, one in (
                (0.5, 0.6, {"metric": "pearson", "outcome": "loss"}),
                (0.4, 0.4, {"metric": "spearman", "outcome": "tie"}),
                (0.2, 0.25, {"metric": "nrmse", "outcome": "win", "opponent_method": "ridge-mean"}),
            )
        ],
        "counts": [
            {"contender": "RELISH, chosen", "opponent": opponent, "metric": metric, "backbone": backbone, **tally}
            for opponent in ("best rival", "attention")
            for metric in ("pearson", "spearman", "nrmse")
            for backbone, tally in (
                (None, {"wins": 2, "ties": int(metric == "pearson"), "losses": 1}),
                ("llm", {"wins": 9, "ties": 9, "losses": 9}),
            )
        ],
        "macro": [
            {"backbone": "llm", "methods": [{"method": name, **figures(*values)} for name, *values in (relish, greedy)]}
        ],
    }
    first, rest = overview(comparison).split("**llm**")
    line = "| RELISH, its depth by validation | best rival | 2 / 1 / 1 | 2 / 0 / 1 | 2 / 0 / 1 |"
    assert [text for text in first.splitlines() if text.startswith("| RELISH")] == [line]
    by_llm, rest = rest.split("Macro averages")
    macro, duels = rest.split("against the best rival")
    assert "| LoRA, then ridge, last token | 0.100 / 0.100 / 0.300 | – |" in by_llm
    assert "| my-head on lora | 0.100 / 0.100 / 0.300 | – |" in by_llm
    assert "median" not in by_llm
    assert "| greedy decoding, 0-shot | – / – / 0.500 | – / – / 0.500 |" in by_llm
    assert r"| attention pooling | **0.600**† / **0.400** / 0.250\* | – |" in by_llm
    assert "| RELISH, L = 3 | 0.500 / **0.400** / **0.200** ‡ | **0.500** / **0.400** / **0.200** |" in by_llm
    assert "| greedy decoding, 0-shot | – / – / 50.0 |" in macro
    assert "| RELISH, L = 3 | **50.0** / **40.0** / **20.0** |" in macro
    assert "attention" not in macro
    assert "run everywhere" in macro
    ours, theirs = "RELISH, L = 3 0.500 / 0.400 / **0.200**", "attention pooling **0.600** / 0.400 / –"
    assert f"| a | llm | {ours} | {theirs}; ridge, mean – / – / 0.250 |" in duels


def test_a_step_is_noted_as_done_only_if_it_is_or_failed_as_foreseen(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from commands import Step, run

    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "wrong.log").write_text("error: the loss was no longer finite\n")  # of an earlier attempt
    for words in ("", "the loss was no longer finite"):
        with pytest.raises(SystemExit):
            run(Step("wrong", ["no-such-command"], may_fail=words), tmp_path, 1)
    assert not (tmp_path / "done" / "wrong").exists()
    run(Step("foreseen", ["no-such-command"], may_fail="No such command"), tmp_path, 1)
    assert (tmp_path / "done" / "foreseen").read_text().startswith("no-such-command\n")


def test_the_adapter_of_the_best_rate_is_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from backbones import tiny_model
    from comparison_plan import METHODS, Cell, Plan, tuned_steps

    cell = Cell(tmp_path / "cell", "stsb-tiny", tiny_model(tmp_path / "model"), [])
    steps = {step.name: step for step in tuned_steps(cell, Plan({}, rates=("3e-4", "1e-3", "3e-3")))}
    for method in METHODS:
        extract = steps[f"stsb-tiny-extract-{method}"]
        assert set(extract.needs) == {f"stsb-tiny-tune-{method}-{rate}" for rate in ("3e-4", "1e-3", "3e-3")}
        with pytest.raises(SystemExit, match=f"{method}-3e-3 was tuned without diverging"):
            extract.late()
        for rate, nrmse in (("3e-4", 0.3), ("1e-3", 0.2)):  # at the third rate the loss was no longer finite
            folder = tmp_path / "cell" / f"{method}-{rate}"
            folder.mkdir(parents=True)
            (folder / "tune.json").write_text(json.dumps({"val": {"nrmse": nrmse}}))
        assert extract.late() == ["--adapter", str(tmp_path / "cell" / f"{method}-1e-3")]


def test_what_comparison_cannot_do_is_said():
    for wrong, said in (
        (("--tasks", "foo"), "the tasks are stsb, sick, wmt-en-zh, wmt-ru-en, wmt-si-en; got 'foo'"),
        (("--tuning-seeds", "0,1"), "--tuning-seeds takes seeds beside 0, such as 1,2; got '0,1'"),
        (("--backbones", "smolm2"), "the backbones are smollm2, gemma3; got 'smolm2'"),
        (("--parts", "frozen,"), "the parts are frozen, prompted, tuned; got 'frozen,'"),
        (
            ("--rows", "2000,250"),
            "--rows takes three numbers, of train, val and test, such as 2000,250,500; got 2000,250",
        ),
        (("--rates", "1e-3,"), "--rates takes learning rates, such as 3e-4,1e-3; got '1e-3,'"),
    ):
        command = [sys.executable, BENCHMARKS / "comparison.py", "work", "--data", "data", *wrong]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"comparison.py: error: {said}")


def test_rows(tmp_path):
    result, shown = run("rows.py", tmp_path / "rows.json", tmp_path / "work", "--weight-decay", "9")
    assert list(result["rows"]) == ["24", "48"]
    for count in ("24", "48"):
        cell = json.loads((tmp_path / "work" / count / "runs" / "attention-L0-seed0" / "config.json").read_text())
        assert cell["settings"]["weight_decay"] == 9
    for heads in result["rows"].values():
        assert set(heads) == {"ridge-mean", "attention"}
        assert all(figure["nrmse"] > 0 and figure["val_nrmse"] > 0 for figure in heads.values())
    assert "| stsb, tiny | 24 rows | 48 rows |" in shown


def test_shared_rows(shared_data):
    command = [sys.executable, BENCHMARKS / "shared_rows.py", shared_data]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    told = (BENCHMARKS.parent / "RESULTS.md").read_text(encoding="utf-8")
    assert "49 of 4,927 in SICK, 35 of 1,000 in WMT si-en, 7 of 1,379 in STS-B" in " ".join(told.split())
    for line in (
        "| sick | 3 of 500 | 49 of 4,927 |",
        "| wmt-si-en | 23 of 1,000 | 35 of 1,000 |",
        "| stsb | 6 of 1,500 | 7 of 1,379 |",
    ):
        assert line in shown


def test_budget(tmp_path):
    from relish.train.settings import LEARNING_RATES, WEIGHT_DECAYS

    from .train.conftest import write_cache

    cache = write_cache(tmp_path / "cache")
    work, out = tmp_path / "work", tmp_path / "budget.json"
    command, one = [sys.executable, BENCHMARKS / "budget.py", work], ["--heads", "linear", "--seeds", "0"]
    first = [*command, f"{cache}:2", *one, "--out", out]
    done = subprocess.run(first, capture_output=True, text=True, check=True, timeout=600)
    ((name, pairs),) = json.loads(out.read_text())["nrmse"]["linear"].items()
    assert (name.endswith("-cache-2"), len(pairs), len(set(pairs.values()))) == (True, 12, 12)
    rate, decay = LEARNING_RATES["linear"], WEIGHT_DECAYS["linear"]
    middle = f"{rate:.3g}-{decay:.3g}"
    assert f"| × rate | × decay | linear ({rate:g}, {decay:g}) |" in done.stdout
    assert "| 1 | 1 | 1.000 |" in done.stdout.replace("**", "")
    assert f"**{min(pairs.values()) / pairs[middle]:.3f}**" in done.stdout
    for source in (work, out):
        again = subprocess.run(
            [sys.executable, BENCHMARKS / "budget.py", source, *one], capture_output=True, text=True, timeout=600
        )
        assert again.stdout == done.stdout[done.stdout.index("| ×") :]

    early = subprocess.run([*command, f"{cache}:2", "--best", "2"], capture_output=True, text=True, timeout=600)
    assert "--best takes a number from 1 on, and a WORK where all pairs of these heads were tried" in early.stderr
    other = write_cache(tmp_path / "other", sizes={"train": 50, "dev": 20})
    second = [*command, f"{other}:2", *one, "--best", "2", "--out", out]
    done = subprocess.run(second, capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(out.read_text())["nrmse"]["linear"]
    best = sorted(pairs, key=pairs.__getitem__)[:2]
    assert found.pop(name) == pairs
    assert [set(finalists) for finalists in found.values()] == [{middle, *best}]
    first, both = (table.splitlines() for table in done.stdout[done.stdout.index("| ×") :].split("| × rate")[1:])
    assert (len(first), len(both)) == (2 + 12, 2 + len({middle, *best}))


def test_profile_stages(tmp_path):
    result, shown = run("profile_stages.py", tmp_path / "profile.json")
    assert [sum(one["shares"].values()) for one in result["stages"]] == pytest.approx([1, 1])
    assert all(one["arithmetic_s"] > 0 and one["bytes_s"] > 0 for one in result["stages"])
    assert "where it goes" in shown


def test_gpu(tmp_path):
    result, _ = run("gpu.py", tmp_path / "gpu.json")
    assert {"plain", "plain, tuned", "ours"} <= set(result["results"][0]["step_ms"])
    assert ("recorded" in result["results"][0]["step_ms"]) == torch.cuda.is_available()


def test_reading(tmp_path):
    result, shown = run("reading.py", tmp_path / "reading.json")
    assert [one["threads"] for one in result["results"]] == [1, 2]
    assert "Direct ÷ Projected" in shown


@pytest.mark.parametrize("name", ["read.py", "cache_size.py", "checks.py"])
def test_caches(tmp_path, name):
    result, shown = run(name, tmp_path / "out.json")
    assert result["machine"]["commit"] is not None
    assert "| relish" in shown


def test_a_load_run(tmp_path):
    command = [BENCHMARKS / "load_faults.py", "--rows", "300", "--kills", "3", "--epochs", "2", "--shard-rows", "40"]
    done = subprocess.run(
        [sys.executable, *command, "--out", tmp_path / "out.json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (result["rows"], result["kills"], result["caches_that_differ"]) == (300, 3, 0)


def test_lora_check(tmp_path):
    result, shown = run("lora_check.py", tmp_path / "lora_check.json", "--same-start", "--seeds", "2")
    for mine, other in zip(*result["sides"].values(), strict=True):
        # The same first weights, batches and recipe on both sides: any difference but rounding is a mistake.
        assert mine["trainable_parameters"] == other["trainable_parameters"]
        assert mine["pearson"] == pytest.approx(other["pearson"], abs=2e-3)
        assert mine["nrmse"] == pytest.approx(other["nrmse"], abs=2e-3)
    assert max(one["pearson"] for one in result["sides"]["relish tune"]) > 0.9
    assert "| relish tune |" in shown
    result, _ = run("lora_check.py", tmp_path / "as_it_comes.json")
    (mine,), (other,) = result["sides"].values()
    assert mine["trainable_parameters"] == other["trainable_parameters"] + 1  # a bias
