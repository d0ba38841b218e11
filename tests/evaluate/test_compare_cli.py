import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from relish.evaluate.compare import compare_reports
from relish.evaluate.compare_load import parse_source
from relish.evaluate.compare_report import plot_depths, save_comparison
from relish.evaluate.compare_sheets import Figure, Sheet, sheets
from relish.evaluate.compare_tables import print_sheets, sheets_to_latex, sheets_to_markdown
from relish.evaluate.compare_words import headline, remarks
from relish.evaluate.results import evaluate_runs
from relish.train.grid import train_heads
from relish.train.settings import TrainSettings

from ..disk import fill, small_disk
from ..train.conftest import write_cache
from .conftest import SMALL
from .reports import grid, write_report
from .test_report import Page, squeezed

DRAWS = ("--resamples", "100")


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """Reports of `relish evaluate` on two data sets, whose caches have no task."""
    home = tmp_path_factory.mktemp("trained")
    evaluate_runs(runs, out=home / "first")
    cache = write_cache(home / "cache", sizes={"train": 96, "dev": 32, "test": 50})
    train_heads(cache, home / "runs", TrainSettings(heads=("relish", "ridge"), depths=(1, 2), seeds=(0, 1), **SMALL))
    evaluate_runs(home / "runs", out=home / "second")
    return home / "first", home / "second"


# The command


def test_reports_of_real_runs_become_a_comparison(trained, tmp_path, run_cli):
    names = [f"{name},tiny={path}" for name, path in zip(("one", "two"), trained, strict=True)]
    shown = run_cli("compare", *names, "--out", tmp_path / "c", *DRAWS)
    assert shown.exit_code == 0, shown.stderr
    assert f"comparison: {tmp_path / 'c' / 'comparison.html'}" in shown.stdout
    assert "2 data sets, 1 LLM: RELISH has the best Pearson in " in shown.stdout
    names_of_files = ["comparison.html", "comparison.json", "comparison.md", "depth.png"]
    assert sorted(path.name for path in (tmp_path / "c").glob("[!.]*")) == names_of_files
    figures = json.loads((tmp_path / "c/comparison.json").read_text(encoding="utf-8"))
    for place, folder in zip(figures["places"], trained, strict=True):
        groups = json.loads((folder / "results.json").read_text(encoding="utf-8"))["groups"]
        for method, group in zip(place["methods"], groups, strict=True):
            assert (method["head"], method["depth"], method["seeds"]) == (group["head"], group["depth"], group["seeds"])
            for name in ("pearson", "nrmse", "val_nrmse", "train_seconds", "parameters"):
                assert method[name] == group[name]
            assert method["val_nrmse"] > 0
            assert method["train_seconds"] > 0
            assert method["seconds_per_1000_rows"] is None  # the LLM's share is not known: there was none
    again = run_cli("compare", *names, *DRAWS, "--json")
    assert json.loads(again.stdout) == figures
    assert run_cli("compare", *names, "--out", tmp_path / "c", *DRAWS).exit_code == 0


@pytest.mark.parametrize(("form", "mark"), [("markdown", "| Method | one |"), ("latex", r"\begin{tabular}{lrr}")])
def test_the_other_formats(trained, run_cli, form, mark):
    result = run_cli("compare", f"one={trained[0]}", f"two={trained[1]}", "--format", form, *DRAWS)
    assert result.exit_code == 0, result.stderr
    assert mark.partition(" two")[0] in result.stdout


def test_wrong_input_ends_with_code_2_and_one_sentence(trained, reports, tmp_path, run_cli):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for words, message in (
        (
            [trained[0]],
            f"error: {trained[0] / 'results.json'} does not say what its data set is called; name it: NAME=",
        ),
        (
            ["nowhere"],
            "error: nowhere is no report folder: it has no results.json; make one with: relish evaluate RUNS",
        ),
        ([trained[1].parent / "runs"], f"make one with: relish evaluate {trained[1].parent / 'runs'} --out REPORT"),
        ([reports[0], f"stsb={reports[1]}"], "are both of stsb, and score different rows: line 0 of one is row 0"),
        ([reports[0], "--resamples", "5"], "error: 5 resamples are too few to tell a difference at 5 %; take 100 or"),
        (["a,b,c,d=e"], "error: a report is given as REPORT, or as DATASET,BACKBONE,VARIANT=REPORT where names may"),
        ([reports[0], "--out", tmp_path / "full"], "holds other files than a comparison's, such as notes.txt; choose"),
    ):
        result = run_cli("compare", *words)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert message in result.stderr


def test_a_disk_that_is_full_costs_no_table(reports, tmp_path, run_cli):
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk, 8192)
        result = run_cli("compare", reports[0], *DRAWS, "--format", "markdown", "--out", disk / "c")
    assert result.exit_code == 2
    assert "cannot be written (No space left on device)" in result.stderr
    assert "| Method |" in result.stdout


def test_without_the_extra_nothing_is_computed(reports, tmp_path, run_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run_cli("compare", reports[0], "--out", tmp_path / "c")
    assert result.exit_code == 2
    assert "pip install 'relish-llm[report]'" in result.stderr
    assert not (tmp_path / "c").exists()


def test_help_says_how_reports_are_named(run_cli):
    shown = run_cli("compare", "--help").stdout
    assert "DATASET,BACKBONE,VARIANT=REPORT" in shown
    assert "relish compare report-stsb report-sick --out comparison" in shown


# The forms of the tables


def test_markdown_is_well_formed(comparison):
    text = sheets_to_markdown(headline(comparison), sheets(comparison, paper=True), remarks(comparison))
    widths: list[int] = []
    for line in text.splitlines():
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(set(widths)) <= 1
            widths = []
    assert "| Method | stsb | sick |" in text
    assert re.search(r"\| relish, L = 2 \| \*\*0\.\d{3}‡\*\* ± 0\.\d{3} \| 0\.\d{3} ± 0\.\d{3} \|", text)
    assert re.search(r"\| ridge \| 0\.\d{3}\\\* \| \*\*0\.\d{3}†\*\* \|", text)
    assert "- stsb with tiny: greedy-0shot: 3 answers were no number." in text


def test_latex_has_a_tabular_for_each_sheet(comparison):
    found = sheets(comparison)
    text = sheets_to_latex(found, remarks(comparison))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(found)
    lines = [line.replace("$^*$", "") for line in text.splitlines() if not line.startswith("%")]
    assert set("↑↓±−–†‡*") & set("".join(lines)) == set()
    assert r"\textbf{" in text
    for line in text.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) in {len(sheet.columns) - 1 for sheet in found}


def test_everything_from_outside_is_escaped_in_markdown():
    sheet = Sheet("t*", ("a|b", "c*"), [("x|y", [[Figure("p|q"), Figure("1*", bold=True)]])])
    text = sheets_to_markdown("t", [sheet], [])
    assert "| p\\|q | **1\\*** |" in text
    assert "## t\\*\n\n| a\\|b | c\\* |\n| --- | ---: |\n| *x\\|y* |" in text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_terminal_takes_any_encoding_and_markup_in_names(comparison, encoding):
    class Terminal(io.StringIO):
        pass

    Terminal.encoding = encoding
    file = Terminal()
    sheet = Sheet("[bold]x", ("a", "b"), [("[red]y", [[Figure("[i]z"), Figure("–")]])])
    tables = [*sheets(comparison, paper=True), sheet]
    print_sheets(headline(comparison), tables, remarks(comparison), Console(file=file, width=100))
    text = file.getvalue()
    assert text.isascii() == (encoding == "ascii")
    for words in ("[bold]x", "[red]y", "[i]z", "relish, L = 2", "1/0/1", "before correction"):
        assert words in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_narrow_terminal_loses_nothing(comparison):
    file = io.StringIO()
    rivals = next(sheet for sheet in sheets(comparison) if sheet.texts > 1)
    print_sheets("", [rivals], [], Console(file=file, width=80))
    text = file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    for _, lines in rivals.groups:
        for figure in (figure for line in lines for figure in line):
            assert figure.text in text
            assert all(word in text for word in figure.soft.split())


# The page


def test_the_page_holds_its_figures_and_loads_nothing(comparison, tmp_path):
    save_comparison(comparison, tmp_path / "c", paper=True)
    html = (tmp_path / "c/comparison.html").read_text("utf-8")
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("img") == 1
    text = squeezed(page)
    assert headline(comparison) in text
    for sheet in sheets(comparison, paper=True):
        assert sheet.title in text
        assert sheet.caption in text
        for _, lines in sheet.groups:
            for line in lines:
                assert all(figure.text in text and figure.soft in text for figure in line)
    for remark in remarks(comparison):
        assert remark in text
    bare = re.sub(r'"data:[^"]*"', "", html)
    assert "http" not in bare
    assert not re.search(r"url\(|@import|<script|<link|src=(?!\s)\"", bare)
    assert "nan" not in bare.lower().replace("dominant", "")


def test_names_from_outside_are_escaped_on_the_page(tmp_path):
    evil = "<img src=x onerror=alert(1)>&\"'"
    write_report(tmp_path / "r", grid(ridge=1.0, relish1=0.5), task=evil, model=evil)
    save_comparison(compare_reports([parse_source(str(tmp_path / "r"))], resamples=100), tmp_path / "c")
    page = Page((tmp_path / "c/comparison.html").read_text("utf-8"))
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert evil in page.text


def test_depth_has_a_line_for_each_data_set(comparison, tmp_path, monkeypatch):
    from relish.evaluate import compare_report

    drawn = []
    monkeypatch.setattr(compare_report, "save_figure", lambda figure, path: drawn.append(figure))
    assert plot_depths(comparison, tmp_path / "depth.png") is True
    (figure,) = drawn
    assert len(figure.axes) == 3
    for axes, metric in zip(figure.axes, ("pearson", "spearman", "nrmse"), strict=True):
        lines = {container.get_label(): container.lines[0] for container in axes.containers}
        assert list(lines) == ["stsb", "sick"]
        for place in comparison.places:
            means = [e.metrics[metric]["mean"] for e in place.entries if e.method.head == "relish"]
            assert lines[place.dataset].get_xdata().tolist() == [1, 2]
            assert lines[place.dataset].get_ydata().tolist() == means


def test_depths_are_drawn_at_one_layer(tmp_path, monkeypatch):
    from relish.evaluate import compare_report

    write_report(tmp_path / "15", grid(relish1=0.9, relish2=0.1), meta={"layer": "15"})
    write_report(tmp_path / "mix", grid(relish1=0.8, relish2=0.7, relish3=0.6), meta={"layer": "mix"})
    comparison = compare_reports([parse_source(str(tmp_path / layer)) for layer in ("15", "mix")], resamples=100)
    assert [entry.layer for entry in comparison.places[0].entries] == ["mix", "15", "mix"]
    drawn = []
    monkeypatch.setattr(compare_report, "save_figure", lambda figure, path: drawn.append(figure))
    assert plot_depths(comparison, tmp_path / "depth.png") is True
    shown = drawn[0].axes[2].containers[0].lines[0].get_ydata()
    (mixed,) = compare_reports([parse_source(str(tmp_path / "mix"))], resamples=100).places
    assert shown.tolist() == [entry.metrics["nrmse"]["mean"] for entry in mixed.entries]


def test_one_depth_is_no_plot_and_an_old_one_does_not_stay(comparison, tmp_path):
    save_comparison(comparison, tmp_path / "c")
    assert (tmp_path / "c/depth.png").exists()
    write_report(tmp_path / "r", grid(ridge=1.0, relish1=0.5))
    save_comparison(compare_reports([parse_source(str(tmp_path / "r"))], resamples=100), tmp_path / "c")
    assert not (tmp_path / "c/depth.png").exists()


def test_comparing_imports_neither_torch_nor_transformers(reports, tmp_path):
    import subprocess

    code = (
        "import sys\n"
        "from relish.cli import main\n"
        f"sys.argv = ['relish', 'compare', {str(reports[0])!r}, '--resamples', '100', '--json']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit(str({'torch', 'transformers'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(tmp_path))
    assert done.stderr.strip() == ""
