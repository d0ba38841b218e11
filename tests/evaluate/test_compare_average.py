"""`relish compare --average-seeds`: each method predicts the mean over its seeds."""

import json
import re

import pytest

from relish.cache.errors import RunError
from relish.evaluate.compare import compare_reports
from relish.evaluate.compare_load import load_places, parse_source
from relish.evaluate.compare_words import remarks
from relish.train.metrics import METRICS

from .reports import grid, write_report

DRAWS = ("--resamples", "100")


def test_seeds_are_averaged_where_that_is_asked_for(reports, tmp_path, run_cli):
    names = [f"{name}={path}" for name, path in zip(("one", "two"), reports, strict=True)]
    shown = run_cli("compare", *names, "--average-seeds", "--out", tmp_path / "c", "--format", "markdown", *DRAWS)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count("Of the mean prediction over a method's seeds; the best of a column in bold.") == 3
    assert "over seeds, ±" not in shown.stdout
    figures = json.loads((tmp_path / "c/comparison.json").read_text(encoding="utf-8"))
    assert figures["average_seeds"] is True
    assert "Figures × 100, of the mean prediction over a method's seeds, mean over" in shown.stdout
    assert "Each method predicts the mean over its seeds; one of a single seed and tuning, such" in shown.stdout
    for place, folder in zip(figures["places"], reports, strict=True):
        groups = json.loads((folder / "results.json").read_text(encoding="utf-8"))["groups"]
        for method, group in zip(sorted(place["methods"], key=by_name), sorted(groups, key=by_name), strict=True):
            seeds, several = group["seeds"], "averaged" in group
            assert (method["seeds"], several) == (seeds, seeds > 1)
            assert method["parameters"] == seeds * group["parameters"]
            assert method["val_nrmse"] == group["val_nrmse"]
            assert (method["seconds_per_1000_rows"] is None) == several
            if group["train_seconds"] is not None:
                assert method["train_seconds"] == pytest.approx(seeds * group["train_seconds"])
            for name in METRICS:
                expected = group["averaged"][name] if several else group[name]["mean"]
                assert method[name]["mean"] == pytest.approx(expected)
                assert method[name]["sd"] is None
                assert method[name]["ci95"][0] < expected < method[name]["ci95"][1]
    alone = [duel for duel in figures["tests"] if (duel["dataset"], duel["opponent"]) == ("one", "mlp")]
    assert len(alone) == 3
    for duel in alone:
        assert duel["difference"] == pytest.approx(duel["ours"] - duel["theirs"])
        assert duel["ci95"][0] < duel["difference"] < duel["ci95"][1]


def by_name(method):
    return method["head"], method["depth"]


def test_the_adapters_weights_count_once_however_many_seeds_of_a_head_are_averaged(tmp_path):
    about = {"adapter": "ab" * 32, "adapter method": "lora", "adapter parameters": "5,000", "adapter seconds": "60.0"}
    write_report(tmp_path / "r", grid(relish1=0.9), meta=about)
    (place,) = load_places([parse_source(str(tmp_path / "r"))], average=True)
    (entry,) = place.entries
    assert (entry.parameters, entry.extras["train_seconds"]) == (3 * 2000 + 5000, 3 * 10.0 + 60.0)


def test_what_is_unequal_or_wrong_in_averages_is_said(tmp_path):
    cells = {**grid(relish1=0.9, mlp=1.2), ("attention", 0, 0): 0.8, ("attention", 0, 1): 0.0, ("mlp", 0, 3): 1.1}
    write_report(tmp_path / "r", cells)
    compared = compare_reports([parse_source(str(tmp_path / "r"))], average_seeds=True, resamples=100)
    said = remarks(compared)
    alone = remarks(compare_reports([parse_source(str(tmp_path / "r"))], resamples=100))
    assert [remark for remark in alone if "fewer seeds" in remark] == [r for r in said if "fewer seeds" in r]
    assert "stsb with tiny: fewer seeds than 4 stand behind attention (2), relish, L = 1 (3)." in said
    assert "stsb with tiny: attention: seed 1 predicts one score for all rows, and is part of the mean." in said
    predictions = tmp_path / "r" / "predictions.csv"
    lines = predictions.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1].rpartition(",")[0] + ","
    predictions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for average in (False, True):
        with pytest.raises(RunError, match=rf"^the report {re.escape(str(tmp_path / 'r'))} cannot be used \("):
            compare_reports([parse_source(str(tmp_path / "r"))], average_seeds=average, resamples=100)
