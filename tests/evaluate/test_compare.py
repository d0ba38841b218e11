import json
import math

import numpy as np
import pytest

from relish.cache.errors import SettingsError
from relish.evaluate.compare import compare_reports
from relish.evaluate.compare_duels import (
    BEST_FROZEN,
    BEST_RIVAL,
    Duel,
    choose,
    choose_contenders,
    correct,
    count_outcomes,
)
from relish.evaluate.compare_json import comparison_json
from relish.evaluate.compare_load import load_places, parse_source
from relish.evaluate.compare_methods import CONTENDERS, FAMILIES, Method
from relish.evaluate.compare_read import Entry, Source
from relish.evaluate.compare_words import headline, remarks
from relish.evaluate.significance import Difference, doubled_pairs, swapped_differences
from relish.train.metrics import METRICS, PAPER_METRICS

from .reports import grid, write_report

RELISH, HYBRID = CONTENDERS["relish"], CONTENDERS["hybrid"]


def compare(*folders, resamples=200, **options):
    return compare_reports([parse_source(str(folder)) for folder in folders], resamples=resamples, **options)


# Methods


def test_families_and_labels():
    found = {
        ("greedy-0shot", 0, ""): ("autoregressive", "greedy-0shot"),
        ("rail-samples-16shot", 0, ""): ("inference", "rail-samples-16shot"),
        ("mlp-last", 0, ""): ("heads", "mlp-last"),
        ("linear", 0, "lora"): ("tuned", "linear on lora"),
        ("rail-0shot", 0, "raft"): ("tuned", "rail-0shot on raft"),
        ("relish", 3, ""): ("relish", "relish, L = 3"),
        ("relish", 3, "raft"): ("hybrid", "relish, L = 3 on raft"),
    }
    for (head, depth, adapter), (family, label) in found.items():
        method = Method(head, depth, adapter)
        assert (method.family, method.label) == (family, label)
        assert family in FAMILIES
    assert Method("relish", 2, variant="mse").label == "relish, L = 2 (mse)"


# Choosing


def entry(head, depth=0, *, val=(None, None), mean=0.5):
    metrics = {name: {"mean": mean, "sd": math.nan, "ci95": (math.nan, math.nan)} for name in METRICS}
    extras = {"val_nrmse": val[0], "val_pearson": val[1], "train_seconds": None, "seconds_per_1000_rows": None}
    return Entry(Method(head, depth), (0,), np.zeros((1, 3)), metrics, 1, extras, 1, "", "")


def test_validation_decides_and_never_the_test_rows():
    good_on_test = entry("mlp", val=(0.3, 0.5), mean=0.9)
    good_on_val = entry("ridge", val=(0.2, 0.6), mean=0.1)
    for metric in PAPER_METRICS:
        choice = choose([good_on_test, good_on_val], metric)
        assert (choice.entry, choice.by) == (good_on_val, "validation")


def test_pearson_and_nrmse_may_choose_different_methods():
    one, other = entry("mlp", val=(0.3, 0.9)), entry("ridge", val=(0.2, 0.6))
    assert choose([one, other], "spearman").entry is one
    assert choose([one, other], "nrmse").entry is other


def test_a_method_without_validation_figures_stands_against_the_best_of_the_others_on_the_test_rows():
    known = [entry("mlp", val=(0.3, 0.5), mean=0.9), entry("ridge", val=(0.2, 0.6), mean=0.4)]
    answer = entry("greedy-0shot", mean=0.5)
    choice = choose([*known, answer], "pearson")
    assert (choice.entry, choice.by) == (answer, "test")
    assert choose([*known, answer], "nrmse").entry is known[1]  # 0.4 is the lower error
    undefined = entry("greedy-0shot", mean=math.nan)
    assert choose([*known, undefined], "pearson").entry is known[1]
    assert choose([answer], "pearson").by == "only"


def test_constant_validation_predictions_are_the_worst_and_not_unknown():
    good = entry("mlp", val=(0.2, 0.5), mean=0.3)
    constant = entry("linear", val=(0.4, None), mean=0.9)
    choice = choose([constant, good], "pearson")
    assert (choice.entry, choice.by) == (good, "validation")
    assert choose([constant, entry("ridge", val=(0.5, None))], "pearson").by == "validation"


def test_the_contenders_are_chosen_by_validation_nrmse(tmp_path):
    cells = grid(ridge=1.0, relish1=0.9, relish2=0.4, relish3=0.6)
    write_report(tmp_path / "r", cells, extras={("relish", 1): {"val_nrmse": 0.1}})
    (place,) = load_places([Source(tmp_path / "r")])
    assert {f: (c.entry.method.label, c.by) for f, c in choose_contenders(place).items()} == {
        "relish": ("relish, L = 1", "validation")
    }


def test_a_choice_by_test_figures_is_said(tmp_path):
    nothing = {"val_nrmse": None, "val_pearson": None}
    extras = {("relish", 1): nothing, ("relish", 2): nothing, ("greedy-0shot", 0): nothing}
    cells = {**grid(ridge=1.0, relish1=0.9, relish2=0.4), ("greedy-0shot", 0, 0): 0.8}
    write_report(tmp_path / "r", cells, extras=extras)
    found = remarks(compare(tmp_path / "r"))
    assert found[0].startswith(
        "stsb with tiny: relish, L = 2 was chosen by its test NRMSE, which favours it, since not"
    )
    assert found[1].startswith("The best rival was chosen with the help of test figures, which favours the rival")
    assert found[1].endswith("no validation figures: stsb with tiny.")


# Duels


def duel(p, value, metric="pearson", *, dataset="a", backbone="m", opponent="ridge"):
    difference = Difference(value, (math.nan, math.nan), p / 2, p)
    return Duel(dataset, backbone, RELISH, "relish, L = 1", opponent, "ridge", "", metric, 0.5, 0.4, difference)


def test_holm_goes_over_the_data_sets_of_one_llm_metric_and_opponent():
    ps = {"a": 0.01, "b": 0.02, "c": 0.04}
    duels = [duel(p, 0.1, dataset=name) for name, p in ps.items()]
    duels += [
        duel(0.04, 0.1, dataset="a", backbone="n"),
        duel(0.04, -0.1, "nrmse"),
        duel(0.03, 0.1, opponent=BEST_RIVAL),
        duel(math.nan, math.nan, opponent="greedy"),
    ]
    corrected = [one.p_holm for one in correct(duels)]
    assert corrected[:6] == pytest.approx([0.03, 0.04, 0.04, 0.04, 0.04, 0.03])
    assert math.isnan(corrected[6])
    drawn = [one.p_bootstrap_holm for one in correct(duels)]
    assert drawn == pytest.approx([p / 2 for p in corrected], nan_ok=True)


def test_wins_ties_and_losses_by_hand():
    duels = [
        duel(0.001, 0.1, dataset="a"),  # 0.003: win
        duel(0.020, -0.1, dataset="b"),  # 0.04: loss
        duel(0.060, 0.1, dataset="c"),  # 0.06: tie
        duel(0.010, -0.1, "nrmse", dataset="a"),  # a lower error is a win
        duel(0.010, 0.1, "nrmse", dataset="b"),
        duel(0.030, 0.1, "spearman", dataset="a"),  # 0.06 with the next: ties
        duel(0.040, 0.1, "spearman", dataset="b"),
        duel(math.nan, math.nan, "spearman", dataset="c"),  # counts nowhere
        duel(0.030, 0.1, dataset="a", backbone="n"),
    ]
    duels = correct(duels)
    assert [one.outcome for one in duels] == ["win", "loss", "tie", "win", "loss", "tie", "tie", "", "win"]
    counts = {(c.metric, c.backbone): (c.wins, c.ties, c.losses) for c in count_outcomes(duels)}
    assert counts == {
        ("pearson", None): (2, 1, 1),
        ("pearson", "m"): (1, 1, 1),
        ("pearson", "n"): (1, 0, 0),
        ("nrmse", None): (1, 0, 1),
        ("nrmse", "m"): (1, 0, 1),
        ("spearman", None): (0, 2, 0),
        ("spearman", "m"): (0, 2, 0),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two data sets with two LLMs: RELISH clearly first on stsb, clearly behind ridge on sick."""
    home = tmp_path_factory.mktemp("two")
    for model in ("small", "large"):
        write_report(home / f"stsb-{model}", grid(ridge=1.5, mlp=1.2, relish1=0.9, relish2=0.5), model=model)
        cells = grid(ridge=0.2, relish1=0.9, relish2=1.1)
        write_report(home / f"sick-{model}", cells, task="sick", model=model, data=1)
    return sorted(home.iterdir(), reverse=True)


@pytest.fixture(scope="module")
def compared(two):
    return compare(*two)


def test_clear_cases_are_won_and_lost(compared):
    assert (compared.datasets, compared.backbones) == (["stsb", "sick"], ["small", "large"])
    chosen = [choice["relish"].entry.method.label for choice in compared.choices]
    assert chosen == ["relish, L = 2", "relish, L = 1"] * 2
    assert [(d.dataset, d.metric, d.other, d.outcome) for d in compared.rivals if d.backbone == "small"] == [
        *[("stsb", metric, "mlp", "win") for metric in PAPER_METRICS],
        *[("sick", metric, "ridge", "loss") for metric in PAPER_METRICS],
    ]
    assert {d.by for d in compared.rivals} == {"validation", "only"}
    assert {(d.opponent, d.other) for d in compared.duels} == {("ridge", "ridge"), ("mlp", "mlp")}
    counts = {(c.opponent, c.metric, c.backbone): (c.wins, c.ties, c.losses) for c in compared.counts}
    assert counts[BEST_RIVAL, "pearson", None] == (2, 0, 2)
    assert counts["ridge", "nrmse", None] == (2, 0, 2)
    assert counts["mlp", "spearman", "large"] == (1, 0, 0)
    assert headline(compared) == (
        "2 data sets, 2 LLMs: RELISH has the best Pearson in 2 of 4, Spearman in 2 of 4, NRMSE in 2 of 4. "
        "Wins/ties/losses against the best rival: Pearson 2/0/2, Spearman 2/0/2, NRMSE 2/0/2."
    )


def test_the_figures_of_a_duel_are_those_of_the_reports(compared):
    place = compared.places[0]
    entries = {entry.method.label: entry for entry in place.entries}
    ours, ridge = entries["relish, L = 2"], entries["ridge"]
    against = {d.metric: d for d in compared.duels if (d.backbone, d.dataset, d.other) == ("small", "stsb", "ridge")}
    theirs = np.repeat(ridge.predictions, 3, axis=0)  # one prediction against each of three seeds
    expected = swapped_differences(doubled_pairs(place.target, ours.predictions, theirs), 5.0, np.zeros((1, 80)))[:, 0]
    for metric, value in zip(PAPER_METRICS, expected, strict=True):
        one = against[metric]
        assert one.difference.value == pytest.approx(value)
        assert (one.ours, one.theirs) == (ours.metrics[metric]["mean"], ridge.metrics[metric]["mean"])
        assert one.ours - one.theirs == pytest.approx(value)
        low, high = one.difference.ci95
        assert low < value < high
        # Holm over two data sets, both at the smallest p there is.
        assert (one.difference.p, one.p_holm) == (pytest.approx(1 / 201), pytest.approx(2 / 201))


def test_macro_averages_by_hand(compared):
    assert [macro.backbone for macro in compared.macros] == [None, "small", "large"]
    for macro in compared.macros:
        places = [place for place in compared.places if macro.backbone in (None, place.backbone)]
        assert macro.places == len(places)
        rows = {row.label: row for row in macro.rows}
        assert list(rows) == ["ridge", "relish, L = 1", "relish, L = 2", RELISH]
        for row in rows.values():
            for metric in PAPER_METRICS:
                means = []
                for place in places:
                    label = row.label
                    if label == RELISH:
                        label = "relish, L = 2" if place.dataset == "stsb" else "relish, L = 1"
                    means += [e.metrics[metric]["mean"] for e in place.entries if e.method.label == label]
                assert row.values[metric] == pytest.approx(np.mean(means))
    assert compared.macros[0].missing == {"mlp": ["sick with small", "sick with large"]}
    assert compared.macros[1].missing == {"mlp": ["sick"]}


def test_the_hybrid_is_a_contender_of_its_own(tmp_path):
    write_report(tmp_path / "frozen", grid(ridge=1.5, relish1=0.9))
    lora = {"adapter": "a" * 64, "adapter method": "lora"}
    write_report(tmp_path / "lora", grid(mlp=1.0, relish1=0.5, relish2=0.3), meta=lora)
    found = compare(tmp_path / "frozen", tmp_path / "lora")
    assert {f: c.entry.method.label for f, c in found.choices[0].items()} == {
        "relish": "relish, L = 1",
        "hybrid": "relish, L = 2 on lora",
    }
    fought = [(d.contender, d.opponent) for d in found.duels if d.metric == "pearson"]
    assert fought == [
        (RELISH, "ridge"),
        (RELISH, "mlp on lora"),
        (RELISH, HYBRID),
        (HYBRID, "ridge"),
        (HYBRID, "mlp on lora"),
        (HYBRID, RELISH),
    ]
    assert [(d.contender, d.opponent, d.other) for d in found.rivals if d.metric == "pearson"] == [
        (RELISH, BEST_RIVAL, "mlp on lora"),
        (HYBRID, BEST_RIVAL, "mlp on lora"),
        (RELISH, BEST_FROZEN, "ridge"),
    ]


def test_duels_with_the_best_rivals_stand_in_the_order_of_the_metrics(tmp_path):
    extras = {("mlp", 0): {"val_nrmse": 0.1, "val_pearson": 0.1}, ("ridge", 0): {"val_nrmse": 0.9, "val_pearson": 0.9}}
    write_report(tmp_path / "r", grid(relish1=0.5, ridge=1.0, mlp=1.5), extras=extras)
    assert [(d.metric, d.other) for d in compare(tmp_path / "r").rivals] == [
        ("pearson", "ridge"),
        ("spearman", "ridge"),
        ("nrmse", "mlp"),
    ]


def test_cells_that_diverged_and_notes_are_named_and_change_nothing_else(tmp_path):
    write_report(
        tmp_path / "r",
        {**grid(ridge=1.0, relish1=0.5), ("greedy-0shot", 0, 0): 1.2},
        status={("relish", 1, 2): "diverged in training: by step 32"},
        extras={("greedy-0shot", 0): {"note": "3 of 80 answers were no number."}},
    )
    found = compare(tmp_path / "r")
    assert remarks(found)[:2] == [
        "stsb with tiny: relish, L = 1, seed 2, does not count: diverged in training: by step 32.",
        "stsb with tiny: greedy-0shot: 3 of 80 answers were no number.",
    ]
    assert found.choices[0]["relish"].entry.seeds == (0, 1)


def test_a_constant_rival_is_undefined_in_correlation(tmp_path):
    write_report(tmp_path / "r", {**grid(relish1=0.5), ("greedy-0shot", 0, 0): 0})
    found = compare(tmp_path / "r")
    assert {d.metric: d.outcome for d in found.duels} == {"pearson": "", "spearman": "", "nrmse": "win"}
    assert "RELISH has the best Pearson in 1 of 1, Spearman in 1 of 1, NRMSE in 1 of 1." in headline(found)
    assert "stsb with tiny: greedy-0shot has no correlation: all predictions are the same." in remarks(found)


def test_relish_is_not_called_first_where_one_seed_of_a_better_rival_predicts_a_constant(tmp_path):
    write_report(tmp_path / "r", {**grid(relish1=2.0, mlp=0.1), ("mlp", 0, 1): 0})
    found = compare(tmp_path / "r")
    assert "RELISH has the best Pearson in 0 of 1, Spearman in 0 of 1, NRMSE in 0 of 1." in headline(found)
    assert "stsb with tiny: mlp has no correlation: all predictions of seed 1 are the same." in remarks(found)


def test_relish_is_not_called_first_where_it_has_no_correlation_itself(tmp_path):
    cells = {**grid(relish1=0.5), ("relish", 1, 1): 0, **dict.fromkeys(grid(mlp=1.0), 0)}
    write_report(tmp_path / "r", cells)
    assert "best Pearson in 0 of 1, Spearman in 0 of 1, NRMSE in" in headline(compare(tmp_path / "r"))


@pytest.mark.parametrize(("split", "said"), [("dev", True), ("train", True), ("test", False)])
def test_rows_that_heads_were_chosen_by_or_learned_from_are_said(tmp_path, split, said):
    write_report(tmp_path / "r", grid(relish1=0.5, ridge=1.0), split=split, meta={"validation data": "dev, 9801"})
    sentence = (
        f"stsb with tiny: figures on the split {split} flatter the heads, which learned from its rows or were chosen "
        "by them; evaluate a split that had no part in that."
    )
    assert (sentence in remarks(compare(tmp_path / "r"))) == said


@pytest.mark.parametrize(("rows", "said"), [("900", True), ("1,000", False)])
def test_an_llm_that_was_tuned_on_other_rows_than_its_heads_is_said(tmp_path, rows, said):
    meta = {"adapter": "aa", "adapter method": "lora", "adapter rows": rows, "training rows": 1000}
    write_report(tmp_path / "r", grid(relish1=0.5, ridge=1.0), meta=meta)
    sentence = "stsb with tiny: lora: the LLM was tuned on 900 rows, and heads on its states on 1,000."
    assert (sentence in remarks(compare(tmp_path / "r"))) == said


def test_json_has_everything_and_no_nan(compared, two):
    text = json.loads(json.dumps(comparison_json(compared, paper=True), allow_nan=False))
    assert (text["datasets"], text["backbones"], text["resamples"]) == (["stsb", "sick"], ["small", "large"], 200)
    ridge = text["places"][0]["methods"][1]
    assert (ridge["method"], ridge["pearson"]["sd"]) == ("ridge", None)
    assert text["places"][0]["methods"][2]["train_seconds"] == 10
    assert text["chosen"][0] == {
        "dataset": "stsb",
        "backbone": "small",
        "family": "relish",
        "method": "relish, L = 2",
        "by": "validation",
    }
    assert len(text["tests"]) == 3 * (2 + 1) * 2
    assert text["best_rival"][0]["opponent_by"] == "validation"
    assert text["best_rival"][0]["outcome"] == "win"
    assert {"contender", "opponent", "metric", "backbone", "wins", "ties", "losses"} == set(text["counts"][0])
    assert text["paper"][0] == {"method": "RELISH", "pearson": 0.763, "spearman": 0.74, "nrmse": 0.133}
    assert "paper" not in comparison_json(compared)


def test_without_relish_or_without_rivals(tmp_path):
    write_report(tmp_path / "a", grid(ridge=1.0))
    found = compare(tmp_path / "a")
    assert (found.duels, found.rivals, found.counts) == ([], [], [])
    assert headline(found) == "1 data set, 1 LLM; no RELISH head on the frozen LLM is among the methods."
    write_report(tmp_path / "b", grid(relish1=1.0))
    assert headline(compare(tmp_path / "b")) == "1 data set, 1 LLM; there is no other method than RELISH."


def test_progress_and_too_few_resamples(two):
    heard = []
    compare(two[0], progress=lambda done, total: heard.append((done, total)), resamples=100)
    assert heard == [(1, 2), (2, 2)]
    with pytest.raises(SettingsError, match="99 resamples are too few to tell a difference at 5 %; take 100 or more"):
        compare(two[0], resamples=99)
    with pytest.raises(SettingsError, match="100,001 resamples take too much memory; take 100,000 at most"):
        compare(two[0], resamples=100_001)


def test_resamples_that_no_correction_leaves_significant_are_refused(tmp_path):
    for number in range(6):
        write_report(tmp_path / str(number), grid(relish1=0.2, ridge=2.0), task=f"t{number}", data=number)
    reports = [Source(tmp_path / str(number)) for number in range(6)]
    with pytest.raises(SettingsError, match="118 resamples are too few .* on 6 data sets, .*; take 120 or more"):
        compare_reports(reports, resamples=118)
    assert {duel.outcome for duel in compare_reports(reports, resamples=120).rivals} == {"win"}
