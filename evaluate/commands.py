"""`relish evaluate | compare | predict | demo`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..extract.options import AsJson, BatchTokens, Device, GgufFile, Revision, TrustRemoteCode


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(no_args_is_help=True)(evaluate)
    app.command(no_args_is_help=True)(compare)
    app.command(no_args_is_help=True)(predict)
    app.command()(demo)


class Format(str, Enum):
    """How tables are printed."""

    table = "table"
    markdown = "markdown"
    latex = "latex"


def evaluate(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="Folder that relish train wrote; or a cache.")],
    cache: Annotated[Path | None, typer.Option(help="The cache; default where it was at training.")] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "test",
    out: Annotated[
        Path | None,
        typer.Option(metavar="REPORT_DIR", help="Folder for results, predictions, plots and report.html."),
    ] = None,
    format_: Annotated[Format, typer.Option("--format", help="How the table is printed.")] = Format.table,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")] = False,
) -> None:
    """Score every trained head on a split: figures per head and depth over the seeds, with 95 % intervals.

    What the LLM itself answered (relish extract --readouts) is scored beside them; of a cache, that alone.

    Examples:

    \b
    relish evaluate runs --out report
    relish evaluate runs --split dev --format markdown
    relish evaluate sts-cache
    """
    from .files import results_json
    from .results import evaluate_runs
    from .tables import print_table, table_console, to_latex, to_markdown

    with _Bar("evaluate", "heads") as bar:
        results = evaluate_runs(runs, cache=cache, split=split, out=out, device=device, progress=bar.show)
    if as_json:
        typer.echo(json.dumps(results_json(results), indent=2))
        return
    if format_ is Format.table:
        print_table(results, table_console())
    else:
        typer.echo(to_markdown(results) if format_ is Format.markdown else to_latex(results))
    if out is not None:
        typer.echo(f"report: {out / 'report.html'}", err=format_ is not Format.table)


def compare(
    reports: Annotated[
        list[str],
        typer.Argument(
            metavar="REPORT...",
            help="Folders that relish evaluate --out wrote; DATASET,BACKBONE,VARIANT=REPORT names their parts.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for comparison.json, comparison.md, comparison.html and the plot."),
    ] = None,
    resamples: Annotated[
        int, typer.Option(help="Draws of the bootstrap, and of the permutation test, for each pair of methods.")
    ] = 2000,
    average_seeds: Annotated[
        bool, typer.Option("--average-seeds", help="Each method predicts the mean over its seeds.")
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="Show the paper's own averages below the macro average.")
    ] = False,
    format_: Annotated[Format, typer.Option("--format", help="How the tables are printed.")] = Format.table,
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json instead of tables.")] = False,
) -> None:
    """Put reports of several data sets, LLMs and adapters into one comparison, with tests on the same rows.

    RELISH, its depth chosen by validation figures, against every other method: paired bootstrap and permutation tests,
    Holm's correction over data sets, wins, ties and losses, macro averages, costs.

    A report says its data set (the task of its cache) and its LLM. Names before an = replace them; a third one tells
    reports apart that hold the same methods, such as those of two losses. Any of the three may be empty. Of reports of
    several layers each method is taken at the one with the best validation NRMSE.

    Examples:

    \b
    relish compare report-stsb report-sick --out comparison
    relish compare essays=report-essays stsb,SmolLM2=report-stsb stsb,SmolLM2,huber=report-huber --format markdown
    """
    from .compare import compare_reports
    from .compare_json import comparison_json
    from .compare_load import parse_source
    from .compare_report import check_comparison_folder, save_comparison
    from .compare_sheets import sheets
    from .compare_tables import print_sheets, sheets_to_latex, sheets_to_markdown
    from .compare_words import headline, remarks
    from .tables import table_console

    sources = [parse_source(report) for report in reports]
    if out is not None:
        check_comparison_folder(out)
    with _Bar("compare", "pairs") as bar:
        comparison = compare_reports(sources, average_seeds=average_seeds, resamples=resamples, progress=bar.show)
    tables, said, title = sheets(comparison, paper=paper), remarks(comparison), headline(comparison)
    if as_json:
        typer.echo(json.dumps(comparison_json(comparison, paper=paper), indent=2))
    elif format_ is Format.table:
        print_sheets(title, tables, said, table_console())
    else:
        markdown = format_ is Format.markdown
        typer.echo(sheets_to_markdown(title, tables, said) if markdown else sheets_to_latex(tables, said))
    if out is not None:  # after what a full disk must not lose
        save_comparison(comparison, out, paper=paper)
        if not as_json:
            typer.echo(f"comparison: {out / 'comparison.html'}", err=format_ is not Format.table)


def predict(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders, such as runs/relish-L3-seed0; several are averaged."),
    ],
    model: Annotated[str, typer.Option("--model", help="The backbone the head was trained on.")],
    data: Annotated[Path, typer.Option("--data", help="CSV, TSV, JSONL or Parquet with the prompt's columns.")],
    out: Annotated[Path, typer.Option("--out", help="CSV to write: the input's columns and score.")],
    gguf_file: GgufFile = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Folder of the adapter that the head's cache was extracted with.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Refuse unless this is the head's prompt.")] = None,
    layer: Annotated[str | None, typer.Option(help="Refuse unless this is the head's layer, or mix.")] = None,
    device: Device = "auto",
    batch_tokens: BatchTokens = None,
    as_json: AsJson = False,
) -> None:
    """Score new texts with trained heads and their backbone.

    Of several heads each score is the mean of theirs (an ensemble): seeds as a rule predict better together than one by
    one, and the backbone reads a text once all the same.

    Examples:

    \b
    relish predict runs/relish-L3-seed0 --model HuggingFaceTB/SmolLM2-135M-Instruct --data new.csv --out scores.csv
    relish predict runs/relish-L3-seed* --model HuggingFaceTB/SmolLM2-135M-Instruct --data new.csv --out scores.csv
    """
    from ..train.settings import parse_layer
    from .predict import predict_scores

    with _Bar("predict", "rows") as bar:
        rows = predict_scores(
            runs,
            model=model,
            data=data,
            out=out,
            gguf_file=gguf_file,
            revision=revision,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
            prompt=prompt,
            layer=parse_layer(layer),
            device=device,
            batch_tokens=batch_tokens,
            note=bar.note,
            progress=bar.show,
        )
    several = len({run.resolve() for run in runs})
    if as_json:
        typer.echo(json.dumps({"scores": str(out), "rows": rows, "runs": several}))
        return
    typer.echo(f"{out}: {rows:,} scores" + (f", each the mean of {several} runs" if several > 1 else ""))


def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to work.")] = Path("relish-demo"),
) -> None:
    """Run the whole pipeline on SmolLM2-135M-Instruct and 2,600 tweets that people rated; no hub needed.

    Example: relish demo
    """
    from rich.console import Console

    from ..extract.live import ExtractBar
    from ..train.live import LiveTable
    from .demo import run_demo
    from .tables import print_table, table_console

    console = Console(stderr=True)
    with ExtractBar() as bar, LiveTable() as table:
        results = run_demo(
            folder,
            say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
            progress=bar,
            listener=table,
        )
    print_table(results, table_console())
    typer.echo(f"report: {folder / 'report' / 'report.html'}")


class _Bar:
    """Progress with rate and time left, on stderr; not shown before there is any, so that errors come alone."""

    def __init__(self, what: str, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}, {{task.fields[rate]:,.1f}} per second"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,  # on a pipe it would leave blank lines
        )

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.tasks:
            self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, done: int, total: int) -> None:
        if not self._bar.tasks:
            self._bar.add_task("", total=total, rate=0.0)
            self._bar.start()
        self._bar.update(self._bar.tasks[0].id, completed=done, rate=self._bar.tasks[0].speed or 0.0)
