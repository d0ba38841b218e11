"""Tables on the recipe, from the reports of a comparison: layers, losses, and learning rates of tuning."""

import json
from pathlib import Path
from typing import Any

from measure import table

STATES = ("frozen", "lora", "raft")
"""How the names begin of reports of heads."""
LOSS = "loss-report"
"""The report on the other loss, which is no part of the comparison."""


def recipe_tables(homes: list[Path], heads_shown: list[str]) -> str:
    """Markdown: the heads at each layer of the frozen and of the tuned LLM, and RELISH by either loss; validation /
    test NRMSE × 100.

    And validation NRMSE × 100 of the tuned LLM, by method and rate.
    """
    layers, losses, rates = [], [], []
    for home in homes:
        tuned = [json.loads(path.read_text()) for path in home.glob("*/tune.json")]
        for method in sorted({one["settings"]["method"] for one in tuned}):
            by_rate = {
                one["settings"]["lr"]: one["val"]["nrmse"]
                for one in tuned
                if (one["settings"]["method"], one["settings"]["seed"]) == (method, 0)
            }
            rates.append(
                [
                    home.name,
                    method,
                    "; ".join(f"{rate:g}: {100 * nrmse:.1f}" for rate, nrmse in sorted(by_rate.items())),
                ]
            )
        reports = {path.parent.name: json.loads(path.read_text()) for path in sorted(home.glob("*/results.json"))}
        if LOSS not in reports:
            continue  # what is kept is of other parts
        other = next((group for group in reports[LOSS]["groups"] if group["head"] == "relish"), None)
        if other is None:
            continue  # it diverged
        for name, report in reports.items():
            states, _, rest = name.partition("-")
            if states not in STATES or rest.startswith("seed"):
                continue  # no heads, or on a further tuning
            heads = {group["head"]: group for group in report["groups"] if group["depth"] in (0, other["depth"])}
            layer = report["meta"]["layer"]
            layers.append([home.name, states, layer, *(_figures(heads.get(head)) for head in heads_shown)])
            if states == "frozen" and layer == reports[LOSS]["meta"]["layer"] and "relish" in heads:
                figures = {report["meta"]["loss"]: heads["relish"], reports[LOSS]["meta"]["loss"]: other}
                losses.append(
                    [home.name, layer, other["depth"], *(_figures(figures[loss]) for loss in ("huber", "mse"))]
                )
    return (
        f"Validation / test NRMSE × 100, relish at the depth of the second table:\n\n"
        f"{table(['', 'LLM', 'layer', *heads_shown], layers)}\n\n"
        f"{table(['', 'layer', 'L', 'Huber', 'squared error'], losses)}\n\n"
        f"Validation NRMSE × 100 of the tuned LLM by its learning rate:\n\n{table(['', 'method', 'rates'], rates)}\n"
    )


def _figures(group: dict[str, Any] | None) -> str:
    if group is None:
        return "–"
    test, sd = 100 * group["nrmse"]["mean"], 100 * (group["nrmse"]["sd"] or 0)
    return f"{100 * group['val_nrmse']:.1f} / {test:.1f}" + (f" ± {sd:.1f}" if group["seeds"] > 1 else "")
