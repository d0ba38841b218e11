"""Tunings of the LLM that differ in the seed alone: the heads on all of them are seeds of one method."""

import json

import numpy as np
import pytest
from scipy.stats import pearsonr

from relish.cache.errors import RunError
from relish.evaluate.bootstrap import intervals
from relish.evaluate.compare import compare_reports
from relish.evaluate.compare_load import load_places
from relish.evaluate.compare_read import Source
from relish.evaluate.compare_words import remarks
from relish.evaluate.results import evaluate_runs
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings
from relish.extract.tune import tune_adapter
from relish.train.grid import train_heads
from relish.train.settings import TrainSettings

from .reports import grid, write_report

ERRORS = (0.5, 0.7, 0.6)


def edit(folder, change):
    path = folder / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


def write_tuning(folder, seed, cells=None, *, layer="15", adapter=None, **more):
    meta = {
        "layer": layer,
        "adapter": adapter or f"{seed}" * 64,
        "adapter method": "lora",
        "adapter kind": "k",
        "adapter seed": str(seed),
        "adapter parameters": "40,000",
        "adapter seconds": f"{100 * (seed + 1)}",
        "validation data": "dev, 1a",
    }
    error = ERRORS[seed]
    cells = cells or {**grid(relish1=error, ridge=1 + error), ("tuned-head", 0, 0): 2 * error}
    return Source(folder), write_report(folder, cells, meta=meta, **more)


@pytest.fixture
def tunings(tmp_path):
    made = [write_tuning(tmp_path / f"t{seed}", seed) for seed in range(3)]
    return [source for source, _ in made], [results for _, results in made]


def test_the_heads_on_all_tunings_are_seeds_of_one_method(tunings, tmp_path):
    sources, results = tunings
    write_report(tmp_path / "frozen", grid(relish1=0.8))
    (place,) = load_places([Source(tmp_path / "frozen"), *sources])
    entries = {entry.method.label: entry for entry in place.entries}
    assert list(entries) == ["ridge on lora", "tuned-head on lora", "relish, L = 1", "relish, L = 1 on lora"]
    assert entries["relish, L = 1"].seeds == (0, 1, 2)
    assert entries["tuned-head on lora"].seeds == ((0, 0), (1, 0), (2, 0))
    relish = entries["relish, L = 1 on lora"]
    assert relish.seeds == tuple((tuning, seed) for tuning in range(3) for seed in range(3))
    lines = [line for one in results for c, line in zip(one.cells, one.predictions, strict=True) if c.head == "relish"]
    np.testing.assert_array_equal(relish.predictions, lines)
    own = [pearsonr(place.target, line)[0] for line in lines]
    figure = relish.metrics["pearson"]
    assert (figure["mean"], figure["sd"]) == pytest.approx((np.mean(own), np.std(own, ddof=1)))
    assert figure["ci95"] == intervals(place.target, relish.predictions, place.label_range)["pearson"]
    assert relish.parameters == 2000 + 40_000
    assert relish.extras["train_seconds"] == pytest.approx(10 + 200)
    assert relish.extras["val_nrmse"] == pytest.approx(np.mean(ERRORS))
    assert place.adapters == {"lora": tuple(f"{seed}" * 64 for seed in range(3))}


def test_averaged_they_predict_the_mean_over_all_and_cost_them_all(tmp_path):
    sources, results = zip(
        *(
            write_tuning(tmp_path / f"t{seed}", seed, grid(relish1=ERRORS[seed]), status=status)
            for seed, status in ((0, None), (1, {("relish", 1, 2): "diverged"}))
        ),
        strict=True,
    )
    (place,) = load_places(sources, average=True)
    (entry,) = place.entries
    counted = [r.predictions[[cell.status == "ok" for cell in r.cells]] for r in results]
    np.testing.assert_allclose(entry.predictions, [np.concatenate(counted).mean(axis=0)])
    assert (entry.averaged_seeds, entry.seed_count, entry.parameters) == (5, 5, 5 * 2000 + 2 * 40_000)
    assert entry.extras["train_seconds"] == pytest.approx(5 * 10 + 100 + 200)
    assert entry.extras["val_nrmse"] == pytest.approx((3 * ERRORS[0] + 2 * ERRORS[1]) / 5)
    assert entry.extras["seconds_per_1000_rows"] is None
    assert np.isnan(entry.metrics["pearson"]["sd"])
    assert place.notes == ["tuning with seed 1: relish, L = 1 on lora, seed 2, does not count: diverged"]


def test_layers_are_chosen_by_the_mean_over_all_tunings(tmp_path):
    # Layer 22 is the better one for the first tuning alone.
    val = {("15", 0): 0.3, ("15", 1): 0.3, ("22", 0): 0.2, ("22", 1): 0.5}
    sources = [
        write_tuning(tmp_path / f"{layer}-{seed}", seed, grid(relish1=error), layer=layer)[0]
        for (layer, seed), error in val.items()
    ]
    (place,) = load_places(sources)
    (entry,) = place.entries
    assert (entry.layer, [other.layer for other in entry.rejected]) == ("15", ["22"])
    assert entry.extras["val_nrmse"] == pytest.approx(0.3)
    with pytest.raises(RunError, match=r"are of different adapters, .*, a report of each layer from each, "):
        load_places(sources[:3])


def test_a_tuning_may_have_several_reports_of_a_layer(tmp_path):
    sources = [
        write_tuning(tmp_path / f"{seed}-{number}", seed, cells)[0]
        for seed in (0, 1)
        for number, cells in enumerate((grid(relish1=ERRORS[seed]), grid(mlp=ERRORS[seed])))
    ]
    for source in sources:
        edit(source.path, lambda results: results["meta"].update({"training rows": 1000, "adapter rows": "900"}))
    (place,) = load_places(sources)
    assert [(e.method.label, e.seed_count) for e in place.entries] == [("mlp on lora", 6), ("relish, L = 1 on lora", 6)]
    assert place.notes == ["lora: the LLM was tuned on 900 rows, and heads on its states on 1,000"]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "another"},
        {"rows": "dev, 2b"},
        {"loss": "huber"},
        {"compute dtype": "bfloat16"},
        {"adapter seed": None},
    ],
)
def test_tunings_that_differ_in_more_are_refused_or_told_apart(tmp_path, change):
    first, _ = write_tuning(tmp_path / "a", 0)
    other, _ = write_tuning(tmp_path / "b", 1)
    edit(tmp_path / "b", lambda results: results["meta"].update(change))
    told = r"b and \S+a are of different adapters, all called lora \(\w+… and 0{12}…\); tell them apart by a third name"
    with pytest.raises(RunError, match=told):
        load_places([first, other])
    (place,) = load_places([first, Source(other.path, variant="2")])
    assert {entry.tunings for entry in place.entries} == {1}


@pytest.mark.parametrize("average", [False, True])
def test_the_order_of_the_reports_has_no_part_in_it(tmp_path, average):
    sources = [
        write_tuning(tmp_path / f"{layer}-{seed}", seed, layer=layer)[0] for layer in ("15", "22") for seed in range(3)
    ]
    first, other = (load_places(given, average=average)[0] for given in (sources, [*sources[:3], *sources[:2:-1]]))
    assert first.notes == other.notes
    for ours, theirs in zip(first.entries, other.entries, strict=True):
        assert (ours.method, ours.layer, ours.extras, ours.seeds) == (
            theirs.method,
            theirs.layer,
            theirs.extras,
            theirs.seeds,
        )
        np.testing.assert_array_equal(ours.predictions, theirs.predictions)


def test_a_tuning_whose_heads_all_diverged_is_one_still(tmp_path):
    first, _ = write_tuning(tmp_path / "a", 0, grid(relish1=0.5))
    cells = grid(relish1=0.7)
    other, _ = write_tuning(tmp_path / "b", 1, cells, status=dict.fromkeys(cells, "diverged"))
    (place,) = load_places([first, other])
    assert [(e.method.label, e.seed_count, e.tunings) for e in place.entries] == [("relish, L = 1 on lora", 3, 1)]
    assert place.notes[0] == "tuning with seed 1: relish, L = 1 on lora, seed 0, does not count: diverged"
    said = remarks(compare_reports([first, other], resamples=100))
    assert "stsb with tiny: fewer tunings than 2 stand behind relish, L = 1 on lora (1)." in said


@pytest.mark.parametrize("seed", [float("inf"), "first", True, [1]])
def test_a_damaged_seed_of_a_tuning_is_damage(tmp_path, seed):
    source, _ = write_tuning(tmp_path / "a", 0)
    edit(tmp_path / "a", lambda results: results["meta"].update({"adapter seed": seed}))
    with pytest.raises(RunError, match="the report .* cannot be used"):
        load_places([source])


def test_two_adapters_of_one_seed_are_no_two_seeds(tmp_path):
    sources = [write_tuning(tmp_path / name, 0, adapter=name * 64)[0] for name in "ab"]
    with pytest.raises(RunError, match=r"b and \S+a are of different adapters, all called lora \(b{12}… and a{12}…\)"):
        load_places(sources)


def test_what_must_be_known_of_several_tunings_is_said(tmp_path, run_cli):
    notes = [{("tuned-head", 0): {"note": "3 scores were clipped"}}, None]
    for seed in (0, 1):
        cells = {**grid(relish1=ERRORS[seed], mlp=0.9), ("tuned-head", 0, 0): 0.8}
        if seed:
            cells |= {("relish", 1, 1): 0.0}
            del cells["mlp", 0, 2]
        write_tuning(tmp_path / f"t{seed}", seed, cells, extras=notes[seed])
    write_report(tmp_path / "frozen", grid(relish1=0.8, ridge=1.2))
    sources = [Source(tmp_path / name) for name in ("frozen", "t0", "t1")]
    said = remarks(compare_reports(sources, resamples=100))
    where = "stsb with tiny"
    assert said == [
        f"{where}: methods on lora are of 2 tunings of the LLM that differ in the seed alone; each head on the states "
        "of each counts as a seed.",
        f"{where}: fewer seeds than 6 stand behind mlp on lora (5).",
        f"{where}: tuned-head on lora: tuning with seed 0: 3 scores were clipped.",
        f"{where}: relish, L = 1 on lora has no correlation: all predictions of seed 1 on the tuning with seed 1 are "
        "the same.",
    ]
    shown = run_cli("compare", *(source.path for source in sources), "--out", tmp_path / "c", "--resamples", 100)
    assert shown.exit_code == 0, shown.stderr
    figures = json.loads((tmp_path / "c/comparison.json").read_text(encoding="utf-8"))
    methods = {one["method"]: one for one in figures["places"][0]["methods"]}
    assert {name: one["seeds"] for name, one in methods.items()} == {
        "ridge": 1,
        "relish, L = 1": 3,
        "mlp on lora": 5,
        "tuned-head on lora": 2,
        "relish, L = 1 on lora": 6,
    }
    assert methods["tuned-head on lora"]["pearson"]["sd"] is not None
    duel = next(d for d in figures["tests"] if d["opponent"] == "tuned-head on lora" and d["metric"] == "nrmse")
    assert duel["difference"] == pytest.approx(duel["ours"] - duel["theirs"])


@pytest.mark.parametrize(("change", "one"), [({"seed": 1}, True), ({"lr": 5e-3}, False)])
def test_tunings_say_what_they_have_in_common(tuned, tune_settings, tiny_rows, tmp_path, run_cli, change, one):
    """From tuning to comparison, with a tiny LLM."""
    tune_adapter(tmp_path / "other", tune_settings(**change))
    for number, adapter in enumerate((tuned(), tmp_path / "other")):
        cache, runs, settings = tmp_path / f"c{number}", tmp_path / f"r{number}", tune_settings()
        data = {**settings.data, "test": tiny_rows(12, 2)}
        options = {"model": settings.model, "prompt": settings.prompt, "label_range": settings.label_range}
        extract_cache(cache, ExtractSettings(data=data, adapter=adapter, device="cpu", **options))
        train_heads(cache, runs, TrainSettings(heads=("linear",), seeds=(0, 1), epochs=1, device="cpu", threads=1))
        evaluate_runs(runs, out=tmp_path / f"report{number}")
    shown = run_cli("compare", *(f"film={tmp_path / name}" for name in ("report0", "report1")), "--format", "markdown")
    assert (shown.exit_code == 0) == one, shown.stderr
    if one:
        assert "methods on lora are of 2 tunings of the LLM that differ in the seed alone" in shown.stdout
    else:
        assert "are of different adapters, all called lora" in shown.stderr
