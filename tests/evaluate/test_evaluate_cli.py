import json
import sys

import pytest
from typer.testing import CliRunner

from relish.cli import app

from ..train.conftest import write_cache


def relish(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_table_the_report_and_the_other_formats(runs, tmp_path):
    shown = relish("evaluate", runs, "--out", tmp_path / "report")
    assert shown.exit_code == 0, shown.output
    assert "Pearson" in shown.output
    assert (tmp_path / "report/report.html").exists()
    assert relish("evaluate", runs, "--format", "markdown").output.startswith("| Head |")
    assert r"\begin{tabular}" in relish("evaluate", runs, "--format", "latex").output
    assert json.loads(relish("evaluate", runs, "--json").stdout)["split"] == "test"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "nope"], "has no split 'nope', only train, dev, test; add it with: relish extract"),
        (["--cache", "nowhere"], "is not a relish cache: it has no manifest.json"),
        (["--device", "tpu"], "the device 'tpu' is not available here; it may be one of auto, cpu, cuda, mps"),
    ],
)
def test_wrong_input_ends_with_code_2_and_one_sentence(runs, words, message):
    result = relish("evaluate", runs, *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_head_for_another_hidden_size(runs, tmp_path):
    other = write_cache(tmp_path / "other", hidden=16)
    result = relish("evaluate", runs, "--cache", other)
    assert result.exit_code == 2
    assert "the head relish-L1-seed0 reads hidden states of size 24, and those of the cache" in result.stderr
    assert result.stderr.endswith("have 16; give the cache it was trained on with --cache\n")


def test_a_file_where_a_folder_should_be_is_named(runs, tmp_path):
    (tmp_path / "report").touch()
    result = relish("evaluate", runs, "--out", tmp_path / "report")
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {tmp_path / 'report'} is a file; the report needs a folder\n",
    )


def test_a_cache_in_place_of_runs(cache):
    result = relish("evaluate", cache)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {cache} is a cache whose LLM was not asked about test; train heads from it: relish train {cache} "
        "--out RUNS, or ask with relish extract --readouts\n"
    )


def test_no_runs(tmp_path):
    result = relish("evaluate", tmp_path)
    assert result.exit_code == 2
    assert "there is no trained head in" in result.stderr


def test_a_report_without_matplotlib_names_the_pip_command_before_any_work(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = relish("evaluate", runs, "--out", tmp_path / "report")
    assert result.exit_code == 2
    assert "pip install 'relish-llm[report]'" in result.stderr
    assert not (tmp_path / "report").exists()
