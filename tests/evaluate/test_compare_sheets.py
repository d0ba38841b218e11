"""What the sheets of a comparison hold, and its remarks."""

import re

from relish.evaluate.compare import PAPER, compare_reports
from relish.evaluate.compare_load import parse_source
from relish.evaluate.compare_sheets import Figure, sheets
from relish.evaluate.compare_words import remarks

from .reports import grid, write_report


def table(comparison, title, **options) -> dict[str, list[Figure]]:
    """The lines of one sheet by their first cell."""
    (sheet,) = [sheet for sheet in sheets(comparison, **options) if sheet.title == title]
    return {line[0].text: line for _, lines in sheet.groups for line in lines}


def test_methods_by_data_sets(comparison):
    lines = table(comparison, "Pearson ↑, tiny")
    assert list(lines) == ["greedy-0shot", "mlp", "ridge", "relish, L = 1", "relish, L = 2"]
    means = {
        (place.dataset, entry.method.label): entry.metrics["pearson"]
        for place in comparison.places
        for entry in place.entries
    }
    for label, line in lines.items():
        for dataset, figure in zip(("stsb", "sick"), line[1:], strict=True):
            estimate = means.get((dataset, label))
            assert figure.text.rstrip("*†‡") == (f"{estimate['mean']:.3f}" if estimate else "–")
            assert figure.soft == (
                f"± {estimate['sd']:.3f}" if estimate and label not in ("ridge", "greedy-0shot") else ""
            )
    marks = {label: [figure.text.lstrip("–0123456789.") for figure in line[1:]] for label, line in lines.items()}
    assert marks == {
        "greedy-0shot": ["*", ""],
        "mlp": ["*", ""],
        "ridge": ["*", "†"],
        "relish, L = 1": ["", "‡"],
        "relish, L = 2": ["‡", ""],
    }
    assert [label for label, line in lines.items() if line[1].bold] == ["relish, L = 2"]
    assert [label for label, line in lines.items() if line[2].bold] == ["ridge"]


def test_medians_are_told_by_the_error_they_are_meant_for(comparison, tmp_path):
    assert not any(sheet.title.startswith("MAE") for sheet in sheets(comparison))
    write_report(tmp_path / "r", grid(relish1=0.5, rail_median_=0.6))
    found = compare_reports([parse_source(str(tmp_path / "r"))], resamples=100)
    (sheet,) = [sheet for sheet in sheets(found) if sheet.title == "MAE ↓, tiny"]
    lines = {line[0].text: line[1] for _, lines in sheet.groups for line in lines}
    for entry in found.places[0].entries:
        assert lines[entry.method.label].text.startswith(f"{entry.metrics['mae']['mean']:.3f}")
    assert sheet.caption.endswith("not tested.")


def test_families_are_headings(comparison):
    (sheet,) = [sheet for sheet in sheets(comparison) if sheet.title == "NRMSE ↓, tiny"]
    assert [name for name, _ in sheet.groups] == [
        "Autoregressive decoding",
        "Predictive heads, LLM frozen",
        "RELISH, LLM frozen",
    ]


def test_the_macro_average_is_in_hundredths_with_the_papers_own_below(comparison):
    lines = table(comparison, "Macro average, tiny", paper=True)
    macro = {row.label: row.values for row in comparison.macros[0].rows}
    assert list(lines) == [*macro, *PAPER]
    for label, values in macro.items():
        shown = [figure.text for figure in lines[label][1:]]
        assert shown == [f"{100 * values[name]:.1f}" for name in ("pearson", "spearman", "nrmse")]
    assert [figure.text for figure in lines["RELISH"][1:]] == ["76.3", "74.0", "13.3"]
    assert [figure.text for figure in lines["RAFT"][1:]] == ["71.5", "69.0", "16.6"]
    assert [figure.text for figure in lines["LoRA + MLP"][1:]] == ["64.8", "61.7", "16.7"]
    assert "RAFT" not in table(comparison, "Macro average, tiny")
    sheet = sheets(comparison)[0]
    assert sheet.caption == (
        "Figures × 100, mean over 2 data sets with equal weight. Left out: greedy-0shot (not on sick); mlp (not on "
        "sick)."
    )


def test_an_average_over_unequal_llms_says_that_it_is_of_pairs(tmp_path):
    for task, model in (("stsb", "a"), ("stsb", "b"), ("sick", "a")):
        write_report(tmp_path / f"{task}-{model}", grid(ridge=1.0, relish1=0.5), task=task, model=model)
    found = compare_reports([parse_source(str(path)) for path in sorted(tmp_path.iterdir())], resamples=100)
    captions = {sheet.title: sheet.caption for sheet in sheets(found) if sheet.title.startswith("Macro")}
    assert captions == {
        "Macro average": "Figures × 100, mean over 3 pairs of data set and LLM with equal weight.",
        "Macro average, a": "Figures × 100, mean over 2 data sets with equal weight.",
        "Macro average, b": "Figures × 100, mean over 1 data set with equal weight.",
    }


def test_the_best_rival_and_the_counts(comparison):
    (sheet,) = [sheet for sheet in sheets(comparison) if sheet.title == "RELISH against the best rival"]
    ((heading, lines),) = sheet.groups
    assert heading == "RELISH, chosen, against the best rival"
    assert [[line[0].text, line[1].text, line[2].soft, line[3].soft, line[6].text] for line in lines] == [
        *[["stsb", name, "relish, L = 2", "mlp", "win"] for name in ("Pearson", "Spearman", "NRMSE")],
        *[["sick", name, "relish, L = 1", "ridge", "loss"] for name in ("Pearson", "Spearman", "NRMSE")],
    ]
    assert lines[0][4].text.startswith("+0.")
    assert lines[2][4].text.startswith("−0.")
    assert re.fullmatch(r"\[0\.\d{3}, 0\.\d{3}\]", lines[0][4].soft)
    assert (lines[0][5].text, lines[0][5].soft) == (
        "0.010",
        "0.005 before correction; bootstrap 0.020",
    )
    counts = table(comparison, "Wins/ties/losses of RELISH")
    assert [figure.text for figure in counts["best rival"][1:]] == ["1/0/1"] * 3
    assert [figure.text for figure in counts["mlp"][1:]] == ["1/0/0"] * 3


def test_costs(comparison):
    lines = table(comparison, "Costs, tiny")
    shown = {label: [figure.text for figure in line[1:]] for label, line in lines.items()}
    assert shown["relish, L = 2"] == ["3", "3,000", "0.15 %", "3", "10"]
    assert shown["greedy-0shot"] == ["1", "0", "0 %", "3", "0"]


def test_of_parameters_the_largest_and_of_seconds_the_mean(tmp_path):
    for task, seconds, adapter in (("a", 10.0, "40,000"), ("b", 30.0, "40,002")):
        extras = {("ridge", 0): {"train_seconds": seconds, "seconds_per_1000_rows": seconds}}
        meta = {"adapter": "a" * 64, "adapter method": "lora", "adapter parameters": adapter, "adapter seconds": "100"}
        write_report(tmp_path / task, grid(ridge=1.0), task=task, extras=extras, meta=meta)
    found = compare_reports([parse_source(str(tmp_path / task)) for task in ("a", "b")])
    line = table(found, "Costs, tiny")["ridge on lora"]
    assert [figure.text for figure in line[2:]] == ["41,002", "2.05 %", "20", "120"]
    (costs,) = (sheet for sheet in sheets(found) if sheet.title == "Costs, tiny")
    assert costs.caption.endswith(" With a tuned LLM its adapter's are added, and the head that was tuned with it.")
    assert remarks(found)[0] == (
        "An adapter is one training of the LLM: deviations and tests are over heads on its states, seeds and rows, and "
        "say nothing of another training."
    )


def test_what_several_methods_note_is_said_once(tmp_path):
    notes = {(name, 0): {"note": "3 of 80 answers were no number."} for name in ("rail-0shot", "rail-median-0shot")}
    cells = {("rail-0shot", 0, 0): 1.0, ("greedy-0shot", 0, 0): 1.1, ("rail-median-0shot", 0, 0): 1.2}
    write_report(tmp_path / "r", cells, extras=notes)
    said = remarks(compare_reports([parse_source(str(tmp_path / "r"))]))
    assert said == ["stsb with tiny: rail-0shot, rail-median-0shot: 3 of 80 answers were no number."]


def test_unknown_costs_are_dashes(tmp_path):
    extras = {("ridge", 0): {"train_seconds": None, "seconds_per_1000_rows": None}}
    meta = {"adapter": "a" * 64, "backbone parameters": None}
    write_report(tmp_path / "r", grid(ridge=1.0), extras=extras, meta=meta)
    found = compare_reports([parse_source(str(tmp_path / "r"))])
    assert [figure.text for figure in table(found, "Costs, tiny")["ridge on tuned"][2:]] == ["–"] * 4
