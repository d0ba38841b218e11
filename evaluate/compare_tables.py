"""The sheets of a comparison on the terminal, in Markdown and in LaTeX."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .compare_sheets import Figure, Sheet
from .tables import fit, latex

if TYPE_CHECKING:
    from rich.console import Console


def sheets_to_markdown(title: str, sheets: Sequence[Sheet], remarks: Sequence[str]) -> str:
    """One document: a heading and a GitHub table for each sheet; its families as lines of their own."""
    parts = [title, ""]
    for sheet in sheets:
        aligned = [" --- " if number < sheet.texts else " ---: " for number in range(len(sheet.columns))]
        columns = [_escaped(column) for column in sheet.columns]
        parts += [f"## {_escaped(sheet.title)}", "", _row(columns), f"|{'|'.join(aligned)}|"]
        for name, lines in sheet.groups:
            parts.append(_row([f"*{_escaped(name)}*", *[""] * (len(sheet.columns) - 1)]))
            parts += [_row([_markdown(figure) for figure in line]) for line in lines]
        parts += ["", sheet.caption.replace("*", "\\*"), ""]
    if remarks:
        parts += ["## Remarks", "", *(f"- {remark}" for remark in remarks), ""]
    return "\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(figure: Figure) -> str:
    text = _escaped(figure.text)
    text = f"**{text}**" if figure.bold else text
    return f"{text} {_escaped(figure.soft)}" if figure.soft else text


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def sheets_to_latex(sheets: Sequence[Sheet], remarks: Sequence[str]) -> str:
    """A booktabs tabular for each sheet, its title and caption as comments above it."""
    parts = [r"% needs \usepackage{booktabs}"]
    for sheet in sheets:
        width = len(sheet.columns)
        parts += [
            "",
            f"% {sheet.title}",
            f"% {sheet.caption}",
            rf"\begin{{tabular}}{{{'l' * sheet.texts}{'r' * (width - sheet.texts)}}}",
            r"\toprule",
            " & ".join(map(latex, sheet.columns)) + r" \\",
        ]
        for name, lines in sheet.groups:
            parts += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\textit{{{latex(name)}}}}} \\"]
            parts += [" & ".join(map(_latex_figure, line)) + r" \\" for line in lines]
        parts += [r"\bottomrule", r"\end{tabular}"]
    parts += ["", *(f"% {remark}" for remark in remarks)] if remarks else []
    return "\n".join([*parts, ""])


def _latex_figure(figure: Figure) -> str:
    text = latex(figure.text)
    text = rf"\textbf{{{text}}}" if figure.bold else text
    return rf"{text} {{\scriptsize {latex(figure.soft)}}}" if figure.soft else text


def _printed(sheet: Sheet) -> list[Sheet]:
    """The sheet itself, or a sheet for each group where columns of words leave no room for headings among them."""
    if sheet.texts == 1:
        return [sheet]
    last = len(sheet.groups) - 1
    return [
        replace(sheet, title=f"{sheet.title}: {name}", groups=[("", lines)], caption=sheet.caption * (number == last))
        for number, (name, lines) in enumerate(sheet.groups)
    ]


def print_sheets(title: str, sheets: Sequence[Sheet], remarks: Sequence[str], console: "Console") -> None:
    """Print the sheets one below the other, without what stands smaller beside a figure where they hold numbers alone.

    The names of methods are kept, since a line against the best rival says nothing without them.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def shown(text: str) -> str:
        return fit(text, console)

    console.print(Text(shown(title)))
    for sheet in [part for whole in sheets for part in _printed(whole)]:
        console.print()
        console.print(Text(shown(sheet.title), style="bold"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
        table.caption = Text(shown(sheet.caption)) if sheet.caption else None
        for number, column in enumerate(sheet.columns):
            fold = number == 0 or sheet.texts > 1  # or a figure would be cut, which reads as another one
            justify = "left" if number < sheet.texts else "right"
            table.add_column(shown(column), justify=justify, overflow="fold", no_wrap=not fold)
        for name, lines in sheet.groups:
            if name:
                table.add_row(Text(shown(name), style="italic dim"))
            for line in lines:
                cells = []
                for figure in line:
                    cell = Text(shown(figure.text), style="bold" if figure.bold else "")
                    if figure.soft and sheet.texts > 1:
                        cell.append(f"\n{shown(figure.soft)}", style="not bold dim")
                    cells.append(cell)
                table.add_row(*cells)
        console.print(table)
    for remark in remarks:
        console.print(Text(shown(remark)))
