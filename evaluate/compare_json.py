"""comparison.json: a comparison for scripts."""

from typing import Any

from ..train.metrics import METRICS
from .compare import PAPER, Comparison
from .compare_duels import Duel
from .compare_read import Place
from .files import plain
from .significance import ALPHA


def comparison_json(comparison: Comparison, *, paper: bool = False) -> dict[str, Any]:
    """The content of comparison.json, in the units of results.json; NaN becomes None.

    Args:
        comparison: what to write.
        paper: whether the paper's own averages are added.
    """
    content: dict[str, Any] = {
        "datasets": comparison.datasets,
        "backbones": comparison.backbones,
        "resamples": comparison.resamples,
        "average_seeds": comparison.average_seeds,
        "alpha": ALPHA,
        "places": [_place(place) for place in comparison.places],
        "chosen": [
            {
                "dataset": place.dataset,
                "backbone": place.backbone,
                "family": family,
                "method": choice.entry.method.label,
                "by": choice.by,
            }
            for place, chosen in zip(comparison.places, comparison.choices, strict=True)
            for family, choice in chosen.items()
        ],
        "best_rival": [_duel(duel) for duel in comparison.rivals],
        "tests": [_duel(duel) for duel in comparison.duels],
        "counts": [vars(count) for count in comparison.counts],
        "macro": [
            {
                "backbone": macro.backbone,
                "places": macro.places,
                "methods": [{"method": row.label, "family": row.family, **row.values} for row in macro.rows],
                "missing": macro.missing,
            }
            for macro in comparison.macros
        ],
    }
    if paper:
        content["paper"] = [{"method": name, **values} for name, values in PAPER.items()]
    return plain(content)


def _place(place: Place) -> dict[str, Any]:
    return {
        "dataset": place.dataset,
        "backbone": place.backbone,
        "split": place.split,
        "rows": len(place.row),
        "label_range": place.label_range,
        "backbone_parameters": place.backbone_parameters,
        "methods": [
            {
                "method": entry.method.label,
                "family": entry.method.family,
                "head": entry.method.head,
                "depth": entry.method.depth,
                "adapter": entry.method.adapter or None,
                "variant": entry.method.variant or None,
                "seeds": entry.seed_count,
                **({"tunings": entry.tunings} if entry.tunings > 1 else {}),
                "parameters": entry.parameters,
                **{name: entry.metrics[name] for name in METRICS},
                **entry.extras,
                **({"note": entry.note} if entry.note else {}),
            }
            for entry in place.entries
        ],
        "notes": place.notes,
    }


def _duel(duel: Duel) -> dict[str, Any]:
    return {
        "dataset": duel.dataset,
        "backbone": duel.backbone,
        "contender": duel.contender,
        "method": duel.method,
        "opponent": duel.opponent,
        "opponent_method": duel.other,
        **({"opponent_by": duel.by} if duel.by else {}),
        "metric": duel.metric,
        "ours": duel.ours,
        "theirs": duel.theirs,
        "difference": duel.difference.value,
        "ci95": duel.difference.ci95,
        "p_bootstrap": duel.difference.p_bootstrap,
        "p_bootstrap_holm": duel.p_bootstrap_holm,
        "p": duel.difference.p,
        "p_holm": duel.p_holm,
        "outcome": duel.outcome or None,
    }
