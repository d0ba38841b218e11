"""`evaluate_runs`: heads, and what the LLM itself answered, on one split of a cache, to figures, files and a report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..cache.device import pick_device
from ..cache.errors import CacheError, DataError, RunError, require_extra
from ..cache.exact import exact_range
from ..cache.identity import Identity, refuse_differences
from ..cache.manifest import MANIFEST
from ..cache.reader import FeatureCache, Split, open_cache
from ..cache.readouts import readout_names
from ..cache.speed import seconds_per_1000_rows
from ..cache.validation import VALIDATION_NAMES
from ..train.data import Rows, open_split
from ..train.diverged import find_diverged
from ..train.loop import predict_rows
from ..train.metrics import score
from ..train.run import Run, find_runs, load_head
from ..train.settings import MIX, Layer
from .files import changing_report, check_report_folder, write_results
from .readouts import readout_cells
from .summary import BACKBONE_FILES, TRAINED_ON, VALIDATED_ON, CellPredictions, Results, group_label, summarise


def evaluate_runs(
    runs: str | Path,
    *,
    cache: str | Path | None = None,
    split: str = "test",
    out: str | Path | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Score every trained head of a folder on one split.

    Args:
        runs: folder that `relish train` wrote, or one run in it; or a cache, for what its LLM answered alone.
        cache: where the cache is; None for where it was when the heads were trained.
        split: the split to score.
        out: folder for results.json, results.csv, predictions.csv, report.html and the plots; None to write nothing.
        device: cuda, mps, cpu or auto.
        progress: called with heads scored and heads in all.

    Cells that diverged in training are listed with that status and count in no figure. What the LLM itself answered to
    the split (`relish extract --readouts`) is scored beside the heads.

    Returns:
        Figures per cell, and per head and depth over its seeds with bootstrap intervals.

    Raises:
        RunError: if there is no run, one is damaged, runs of different caches or trainings lie in the folder, or the
            report cannot be written, or `out` holds anything but an earlier report.
        CacheError: if the cache is missing, damaged, lacks the split, or its hidden states or label range are not those
            that the heads were trained on (its rows may be others); or if it was given alone, and its LLM was not asked
            about the split.
        DataError: if rows of the split have no label.
        MissingExtraError: if a report is asked for and matplotlib or jinja2 is not installed.
    """
    runs = Path(runs).absolute()  # so that a later chdir does not move it
    if out is not None:  # before the work, not after it
        out = Path(out).absolute()
        check_report_folder(out)
        for module in ("matplotlib", "jinja2"):
            require_extra(module, "report", "The report")
    found, opened = _open(runs, cache)
    layer = found[0].layer if found else opened.layers[0]
    rows = _labelled(open_split(opened, split, layer))
    where = pick_device(device)
    llm_seconds = seconds_per_1000_rows(opened.folder, opened.manifest, split)
    cells = []
    for run in found:
        cells.append(_predict(run, rows, where, llm_seconds))
        if progress is not None:
            progress(len(cells), len(found))
    for lost in find_diverged(runs):
        nothing = np.full(len(rows), np.nan)
        status = f"diverged in training: {lost.reason}"
        cells.append(CellPredictions(lost.head, lost.depth, lost.seed, lost.parameters, nothing, status))
    answered, left_out = readout_cells(opened, rows.split)
    if not found and not answered:
        raise CacheError(
            f"{opened.folder} is a cache whose LLM was not asked about {split}"
            + "".join(f" ({sentence.rstrip('.')})" for sentence in left_out)
            + f"; train heads from it: relish train {opened.folder} --out RUNS"
            + (", or ask with relish extract --readouts" if split != "train" else "")
        )
    answered, not_validated = _validated(answered, opened, layer, found[0] if found else None)
    results = summarise(
        split,
        opened.label_range,
        rows.split.ids,
        rows.split.row,
        rows.target,
        [*cells, *answered],
        {**_meta(found, opened), **({} if found else _answered_from(opened, split, answered))},
        [*left_out, *not_validated],
    )
    if out is not None:
        from .report import write_report

        with changing_report(out) as stage:
            write_results(results, stage)
            write_report(results, stage)
    return results


def _open(runs: str | Path, cache: str | Path | None) -> tuple[list[Run], FeatureCache]:
    """Heads and their cache; no heads where that alone was given."""
    if (Path(runs) / MANIFEST).exists():
        if cache is not None:
            raise RunError(f"{runs} is a cache itself; leave --cache out, or give the folder of its heads")
        return [], open_cache(runs)
    found = find_runs(runs)
    opened = open_cache(cache if cache is not None else _usual_cache(found[0]))
    check_cache(found, opened)
    return found, opened


def _predict(run: Run, rows: Rows, device: torch.device, llm_seconds: float | None) -> CellPredictions:
    head = load_head(run).to(device)
    started = time.perf_counter()
    values = predict_rows(head, rows, device)
    own_seconds = 1000 * (time.perf_counter() - started) / len(rows)
    val = run.metrics.get("val", {})
    return CellPredictions(
        run.head.name,
        run.head.depth,
        run.seed,
        run.parameters,
        values,
        val_nrmse=val.get("nrmse"),
        val_pearson=val.get("pearson"),
        train_seconds=run.metrics.get("seconds"),
        seconds_per_1000_rows=llm_seconds + own_seconds if llm_seconds is not None else None,
    )


def _validated(
    answered: list[CellPredictions], cache: FeatureCache, layer: Layer, run: Run | None
) -> tuple[list[CellPredictions], list[str]]:
    """The LLM's own answers with their figures on the validation rows, where it was asked about those too.

    And a sentence for each that has none all the same.
    """
    splits = cache.manifest.splits
    name = run.data["val_split"] if run is not None else _validation_split(cache)
    if not answered or name not in splits or not readout_names(cache.folder, name):
        return answered, []
    without = "Answers have no validation figures"
    if run is not None and splits[name].fingerprint != run.data["val"]:
        return answered, [f"{without}: the cache's split {name!r} has other rows than these heads were validated on."]
    try:
        val = _labelled(open_split(cache, name, layer))
    except (CacheError, DataError) as error:
        return answered, [f"{without}: {error}."]
    cells, wrong = readout_cells(cache, val.split)
    figures = {cell.head: score(val.target, cell.values, cache.label_range) for cell in cells}
    found = [
        replace(
            cell,
            val_nrmse=figures[cell.head]["nrmse"],
            val_pearson=None if np.isnan(figures[cell.head]["pearson"]) else figures[cell.head]["pearson"],
        )
        if cell.head in figures
        else cell
        for cell in answered
    ]
    return found, wrong


def check_cache(runs: Sequence[Run], cache: FeatureCache) -> None:
    """Refuse a cache that the heads were not trained on.

    Raises:
        RunError: if a head reads hidden states of another size, or the runs differ among themselves.
        CacheError: if the label range or anything else of the identity differs.
    """
    firsts: dict[str, Run] = {}
    for run in runs:
        first, same = runs[0], firsts.setdefault(run.head.name, run)
        if run.layer != first.layer or run.label_range != first.label_range:
            raise RunError(f"{run.path} was trained on another layer or label range than {first.path}; part them")
        if (run.data, run.train_rows) != (first.data, first.train_rows):
            raise RunError(
                f"{run.path} was trained or validated on other rows than {first.path}, and one table would not say so; "
                "put the one into another folder, and evaluate each"
            )
        # Runs of an earlier relish may lack a setting.
        other = [name for name, value in run.settings.items() if same.settings.get(name, value) != value]
        if other:
            raise RunError(
                f"{run.path} was trained with another {other[0]} than {same.path} ({run.settings[other[0]]} and "
                f"{same.settings[other[0]]}), and is no seed beside it; put the one into another folder, and evaluate "
                "each"
            )
        if run.head.hidden_size != cache.hidden_size:
            raise RunError(
                f"the head {run.path.name} reads hidden states of size {run.head.hidden_size}, and those of the cache "
                f"{cache.folder} have {cache.hidden_size}; give the cache it was trained on with --cache"
            )
        if run.label_range != cache.label_range:
            raise CacheError(
                f"the head {run.path.name} was trained on labels from {exact_range(run.label_range)}, and those of the "
                f"cache {cache.folder} go from {exact_range(cache.label_range)}; give the cache it was trained on with "
                "--cache"
            )
        refuse_differences(
            run.identity,
            cache.identity,
            what=f"the cache that {run.path.name} was trained on",
            advice="Give that cache with --cache.",
        )


def _usual_cache(run: Run) -> Path:
    if not run.cache.exists():
        raise RunError(f"the cache of these runs is no longer at {run.cache}; say where it is with --cache")
    return run.cache


def _labelled(split: Split) -> Rows:
    unlabelled = int(np.isnan(split.target).sum())
    if unlabelled:
        raise DataError(
            f"{unlabelled} of {len(split)} rows of the split {split.name!r} have no label to compare with; "
            "relish predict scores such rows"
        )
    return Rows(split, np.arange(len(split)))


_MADE_BY = {"parameters": "backbone parameters"}  # beside the head's recipe the bare word would be the head's


def _meta(runs: Sequence[Run], cache: FeatureCache) -> dict[str, object]:
    identity = cache.identity
    return {
        "task": cache.manifest.task,
        "adapter": identity.adapter,
        "model": identity.model,
        "revision": identity.revision,
        BACKBONE_FILES: _short_hashes(identity),
        **({"layer": runs[0].layer} if runs else {}),
        **_mixes(runs),
        "prompt": identity.prompt,
        "storage dtype": identity.dtype,
        "compute dtype": identity.compute_dtype,
        **(_learned_from(runs[0]) if runs else {}),
        **_recipe(runs),
        **{_MADE_BY.get(name, name.replace("_", " ")): value for name, value in cache.manifest.made_by.items()},
    }


def _short_hashes(identity: Identity) -> str:
    return ", ".join(f"{part} {getattr(identity, part)[:12]}" for part in ("weights", "config", "tokenizer"))


def _learned_from(run: Run) -> dict[str, object]:
    name, fingerprint = run.data["val_split"], run.data["val"][:16]
    held_out = f", all but {run.train_rows} rows" if name == "train" else ""
    return {
        "training rows": run.train_rows,
        TRAINED_ON: run.data["train"][:16],
        VALIDATED_ON: f"{name}, {fingerprint}{held_out}",
    }


def _answered_from(cache: FeatureCache, split: str, answered: Sequence[CellPredictions]) -> dict[str, object]:
    """Where no head was trained: the rows that examples of prompts are from, and those of validation figures."""
    splits, name = cache.manifest.splits, _validation_split(cache)
    found: dict[str, object] = {TRAINED_ON: splits["train"].fingerprint[:16]} if "train" in splits else {}
    if name != split and any(cell.val_nrmse is not None for cell in answered):
        found[VALIDATED_ON] = f"{name}, {splits[name].fingerprint[:16]}"
    return found


def _validation_split(cache: FeatureCache) -> str:
    return next((name for name in VALIDATION_NAMES if name in cache.manifest.splits), "")


def _recipe(runs: Sequence[Run]) -> dict[str, object]:
    """The settings; where heads have their own, those of each."""
    shown: dict[str, object] = {}
    # Runs of an earlier relish may lack a setting that others have.
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        of_head = {run.head.name: run.settings[name] for run in runs if run.settings.get(name) is not None}
        values = list(of_head.values())
        if not values:
            continue
        same = all(value == values[0] for value in values)
        text = values[0] if same else ", ".join(f"{head} {value}" for head, value in of_head.items())
        shown[name.replace("_", " ")] = text
    return shown


def _mixes(runs: Sequence[Run]) -> dict[str, str]:
    """The share of each layer in the mixes that heads learned, averaged over seeds; nothing if they read one layer."""
    shares: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if run.layer == MIX:
            shares.setdefault(group_label(run.head.name, run.head.depth), []).append(run.metrics["layer_mix"])
    shown = {}
    for label, mixes in shares.items():
        means = {layer: float(np.mean([mix[layer] for mix in mixes])) for layer in mixes[0]}
        shown[f"layer mix of {label}"] = ", ".join(f"{layer}: {mean:.2f}" for layer, mean in means.items())
    return shown
