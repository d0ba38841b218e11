"""Reports put side by side: those of one data set and LLM are joined, those that do not fit are refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..cache.errors import RunError, SettingsError
from ..cache.exact import exact, exact_range
from .compare_pool import pool_tunings
from .compare_read import Entry, Place, Source, load_report


def parse_source(text: str) -> Source:
    """`REPORT`, or `DATASET,BACKBONE,VARIANT=REPORT` with any of the names left out or empty.

    Raises:
        SettingsError: if it is neither.
    """
    names, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return Source(Path(text))
    parts = [part.strip() for part in names.split(",")]
    if len(parts) > 3 or not path:
        raise SettingsError(
            f"a report is given as REPORT, or as DATASET,BACKBONE,VARIANT=REPORT where names may be empty; got {text!r}"
        )
    return Source(Path(path), *parts)


def load_places(sources: Sequence[Source], *, average: bool = False) -> list[Place]:
    """Read reports and join those of one data set and LLM; in the order in which data sets and LLMs are first named.

    Where reports are of several tunings of the LLM that differ in the seed alone, the heads on all of them are seeds of
    one method.

    Where reports of several layers hold a method, the one with the best mean validation NRMSE stands for it, and a note
    says so: the layer is chosen for each method by itself, as its learning rate would be.

    Args:
        sources: the report folders.
        average: whether a method predicts the mean over its seeds.

    Raises:
        RunError: if there is none, one cannot be read, two of one data set score different rows or labels, or are of
            two LLMs or adapters of one name, or two hold the same method.
    """
    if not sources:
        raise RunError("there is no report to compare; make some with: relish evaluate RUNS --out REPORT")
    places: dict[tuple[str, str], Place] = {}
    firsts: dict[str, Place] = {}
    reports = [load_report(source, average=average) for source in sources]
    for report in reports:
        _refuse_other_rows(firsts.setdefault(report.dataset, report), report)
    for report in _pooled(reports, average=average):
        key = (report.dataset, report.backbone)
        places[key] = _join(places[key], report) if key in places else report
    datasets = list(firsts)
    backbones = list(dict.fromkeys(place.backbone for place in places.values()))
    found = sorted(places.values(), key=lambda p: (backbones.index(p.backbone), datasets.index(p.dataset)))
    named = {source.backbone for source in sources}
    return [_finished(place) for place in _told_apart(found, named)]


def _pooled(reports: Sequence[Place], *, average: bool) -> list[Place]:
    """The same reports, but those of tunings that differ in the seed alone are one for each layer."""
    groups: dict[object, dict[int, Place]] = {}
    for number, report in enumerate(reports):
        if report.tuning is None:
            groups[number] = {0: report}
            continue
        key = (report.dataset, report.backbone, *report.adapters, report.tuning.about)
        tunings, seed = groups.setdefault(key, {}), report.tuning.seed
        tunings[seed] = _join(tunings[seed], report) if seed in tunings else report
    return [
        pool_tunings(tunings, average=average) if len(tunings) > 1 else next(iter(tunings.values()))
        for tunings in groups.values()
    ]


def _told_apart(places: Sequence[Place], named: set[str]) -> list[Place]:
    """The same, with a note where reports call one LLM by two names, of which nobody gave the second."""
    names: dict[str, str] = {}
    found = []
    for place in places:
        first = names.setdefault(place.backbone_files, place.backbone) if place.backbone_files else place.backbone
        if first != place.backbone and place.backbone not in named:
            told = (
                f"this LLM has the files of {first}, and is compared apart from it; if they are one, name it alike: "
                f",{first}={place.source}"
            )
            place = replace(place, notes=[*place.notes, told])
        found.append(place)
    return found


def _finished(place: Place) -> Place:
    entries = sorted(place.entries, key=lambda entry: entry.method.order)
    chosen = [
        f"{e.method.label}: {e.layer} (not {', '.join(other.layer for other in e.rejected)})"
        for e in entries
        if e.rejected
    ]
    notes = [f"layers chosen by validation NRMSE: {'; '.join(chosen)}"] if chosen else []
    return replace(place, entries=entries, notes=[*dict.fromkeys(place.notes), *notes])


def _refuse_other_rows(first: Place, other: Place) -> None:
    both = f"{other.source} and {first.source} are both of {first.dataset}"
    way = f"if they are two data sets, name one of them: NAME={other.source}"
    if other.split != first.split:
        raise RunError(
            f"{both}, and score the splits {other.split} and {first.split}; evaluate the same split of both, or, {way}"
        )
    if other.label_range != first.label_range:
        ranges = f"{exact_range(other.label_range)} and from {exact_range(first.label_range)}"
        raise RunError(
            f"{both}, with labels from {ranges}, by which NRMSE divides; extract both with one --label-range, or, {way}"
        )
    fewer, more = sorted((other, first), key=lambda place: len(place.row))
    scored, asked = (list(zip(one.row, one.ids, one.target.tolist(), strict=True)) for one in (fewer, more))
    lacking = sorted({*asked} - {*scored})
    if len(lacking) == len(more.row) - len(fewer.row) > 0:
        row, name, _ = lacking[0]
        raise RunError(
            f"{both}, and {fewer.source} lacks {len(lacking):,} of the rows, such as row {row} (id {name!r}); if "
            "extraction left them out (--on-nonfinite skip), extract again with another --compute-dtype or --dtype, "
            f"or, {way}"
        )
    if len(other.row) != len(first.row):
        counts = f"{len(other.row):,} and {len(first.row):,}"
        raise RunError(f"{both}, and score {counts} rows; evaluate both on the same rows, or, {way}")
    for place in range(len(first.row)):
        theirs, ours = [(p.row[place], p.ids[place], float(p.target[place])) for p in (other, first)]
        if theirs != ours:
            raise RunError(
                f"{both}, and score different rows: line {place} of one is row {theirs[0]} (id {theirs[1]!r}, gold "
                f"{exact(theirs[2])}), of the other row {ours[0]} (id {ours[1]!r}, gold {exact(ours[2])}); {way}"
            )


def _refuse_other_adapter(place: Place, report: Place) -> None:
    for name, have in place.adapters.items():
        other = report.adapters.get(name, have)
        if other != have:
            hashes = " and ".join(", ".join(f"{one[:12]}…" for one in adapters) for adapters in (other, have))
            raise RunError(
                f"{report.source} and {place.source} are of different adapters, all called {name} ({hashes}); tell "
                f"them apart by a third name: ,,NAME={report.source}. Tunings are one method if nothing but the "
                "seed differs: the same recipes and rows, a report of each layer from each, and caches that were "
                "extracted by this version or a later one."
            )


def _refuse_other_backbone(place: Place, report: Place) -> None:
    known = "" not in (place.backbone_files, report.backbone_files)  # reports of an earlier relish do not say
    if known and report.backbone_files != place.backbone_files:
        raise RunError(
            f"{report.source} and {place.source} are of two LLMs, both called {place.backbone} "
            f"({report.backbone_files} and {place.backbone_files}); tell them apart by a second name: "
            f",NAME={report.source}"
        )


def _join(place: Place, report: Place) -> Place:
    _refuse_other_backbone(place, report)
    _refuse_other_adapter(place, report)
    entries = {entry.method.label: entry for entry in place.entries}
    for entry in report.entries:
        have = entries.get(entry.method.label)
        best = entry if have is None else _better(have, entry)
        if best is None:
            why = ""
            if have is not None and _validated_elsewhere(have, entry):
                why = f", validated on different rows ({have.validated_on} and {entry.validated_on})"
            raise RunError(
                f"{report.source} and {place.source} both hold {entry.method.label} on {place.dataset} with "
                f"{place.backbone}{why}; tell them apart by a third name: ,,NAME={report.source}"
            )
        entries[entry.method.label] = best
    different = [
        f"{name}: {have} and {report.learned_from[name]}"
        for name, have in place.learned_from.items()
        if name in report.learned_from and report.learned_from[name] != have
    ]
    told = f"{place.source} and {report.source} learned from different rows or prompts ({'; '.join(different)})"
    return replace(
        place,
        entries=list(entries.values()),
        notes=[*place.notes, *report.notes, *([told] if different else [])],
        learned_from={**report.learned_from, **place.learned_from},
        adapters={**report.adapters, **place.adapters},
        backbone_parameters=place.backbone_parameters or report.backbone_parameters,
        backbone_files=place.backbone_files or report.backbone_files,
    )


def _validated_elsewhere(first: Entry, second: Entry) -> bool:
    known = "" not in (first.validated_on, second.validated_on)  # reports of an earlier relish do not say
    return known and first.validated_on != second.validated_on


def _better(first: Entry, second: Entry) -> Entry | None:
    """The one of two entries of a method that stands for it, or None where nothing tells which."""
    mine, theirs = (entry.extras.get("val_nrmse") for entry in (first, second))
    if np.array_equal(first.predictions, second.predictions, equal_nan=True):
        # What a cache's LLM answers is in the report of each layer; it may have been asked about the validation split
        # in between.
        return second if mine is None and theirs is not None else first
    if mine is None or theirs is None or "" in (first.layer, second.layer):
        return None
    if second.layer in (first.layer, *(other.layer for other in first.rejected)) or _validated_elsewhere(first, second):
        return None
    best, other = (first, second) if mine <= theirs else (second, first)
    return replace(best, rejected=(*first.rejected, *second.rejected, replace(other, rejected=())))
