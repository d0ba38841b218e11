"""`--readouts`: what the LLM itself answers to the rows of a cache, written beside its hidden states."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache.errors import CacheError, DataError
from ..cache.lock import lock_folder
from ..cache.manifest import TRAIN, load_manifest
from ..cache.readouts import REGRESSION, Readout, part_rows, pending_parts, save_part
from .backbone import Backbone
from .batches import CUT, Budget, run_in_batches
from .candidates import answer_nodes, candidate_scores, trained_scores
from .generator import NEW_TOKENS, Generator, refuse_encoder
from .rows import SplitData
from .settings import ExtractSettings
from .shots import Prompts, choose_examples
from .sources import TextData
from .start import common_prefix
from .tree import Seen, pack_size

if TYPE_CHECKING:
    from .progress import Progress
    from .regression import RegressionHead

SAMPLES = 16
SEED = 0


@dataclass(frozen=True)
class ReadoutSummary:
    """One readout of one split."""

    split: str
    name: str
    rows: int
    shots: int
    """Examples that were asked for."""
    shots_used: int
    """Examples that fitted."""
    computed: int
    """Rows that were asked about this time."""
    seconds: float
    """Computing those took that long, as if no other readout shared the reading of what all prompts begin with."""


@dataclass(frozen=True)
class Questions:
    """What the LLM will be asked."""

    prompts: Prompts
    fitting: dict[tuple[str, int], int]
    """For each split and number of shots, how many examples fit."""


def plan_questions(data: TextData, backbone: Backbone, settings: ExtractSettings, max_length: int) -> Questions:
    """Say what will be asked, and refuse readouts that cannot be, before the work.

    Args:
        data: the texts.
        backbone: the LLM; only its tokenizer is used.
        settings: which readouts, with how many shots.
        max_length: where the cache's rows are cut, if they are.

    Raises:
        BackboneError: for an encoder, or where the chat template that is asked for is missing or cannot show answers.
        AdapterError: if an adapter's own head is to predict, and it has none; or if one of RAFT is to be asked about
            candidates, and was tuned on those of another label range.
        DataError: if there are no splits to ask about, examples are asked for and there are none, a row was cut, or
            leaves no room for an answer.
    """
    refuse_encoder(backbone)
    if REGRESSION in settings.readouts:
        _own_head(backbone)
    if "candidates" in settings.readouts and backbone.adapter is not None:
        backbone.adapter.refuse_other_candidates(data.label_range)
    if set(data.splits) <= {TRAIN}:
        raise DataError(
            f"readouts are of all splits but {TRAIN}, and no other was given; add one such as --data test=FILE"
        )
    examples = choose_examples(data.splits.get(TRAIN), max(settings.shots), data.label_range)
    prompts = Prompts(backbone, examples, chat_template=settings.chat_template)
    fitting: dict[tuple[str, int], int] = {}
    for name, split in data.splits.items():
        if name == TRAIN or not set(settings.readouts) - {REGRESSION}:
            continue
        _refuse_cut(name, split, backbone, settings, max_length)
        for shots in settings.shots:
            fitting[name, shots] = prompts.fitting(name, split.texts, backbone.context or max_length, shots)
    return Questions(prompts, fitting)


def _refuse_cut(name: str, split: SplitData, backbone: Backbone, settings: ExtractSettings, max_length: int) -> None:
    if not settings.truncate:
        return
    _, cut = backbone.tokenize(split.texts, chat_template=settings.chat_template, max_length=max_length, truncate=True)
    if cut:
        raise DataError(
            f"{cut} rows of {name} are cut by --truncate, and what they ask with them; leave --readouts out, or "
            "extract whole rows with a larger --max-length"
        )


def add_readouts(
    folder: Path,
    data: TextData,
    questions: Questions,
    backbone: Backbone,
    settings: ExtractSettings,
    progress: "Progress | None",
) -> tuple[ReadoutSummary, ...]:
    """Ask the LLM about every row of the given splits but the training split, and write its answers into the cache.

    What is there already is kept, and an interrupted readout goes on at the first part that is not there.

    Args:
        folder: a cache that holds the splits.
        data: the texts.
        questions: of `plan_questions`.
        backbone: the LLM.
        settings: which readouts, with how many shots.
        progress: hears of notes and progress; None for silence.

    Raises:
        CacheError: if the cache holds readouts of other settings, or one cannot be written.
        BackboneError: if the LLM cannot be loaded, gives NaN or infinity, or does not fit the memory.
    """
    with lock_folder(folder, CacheError):
        jobs = [
            job
            for split in data.splits
            if split != TRAIN
            for job in _plan_split(folder, split, data, questions, backbone, settings)
        ]
        pending = [job for job in jobs if job.pending]
        if pending:
            if progress is not None:
                compute = str(backbone.compute_dtype).removeprefix("torch.")
                progress.note(f"loading {backbone.files.name} with its LM head ({compute}, {backbone.device})")
            generator = Generator(backbone)
            if generator.one_by_one and any(job.head is None for job in pending) and progress is not None:
                progress.note(
                    "note: of this architecture every answer is computed from its first token on, which is slow"
                )
            asked: dict[tuple[str, int | None], _Asked] = {}
            for job in pending:
                key = job.readout.split, job.readout.shots_used if job.head is None else None
                if key not in asked:
                    asked.clear()  # keys and values of many examples are large
                    asked[key] = _ask(data.splits[job.readout.split], questions.prompts, job, generator, backbone)
                _run(folder, job, asked[key], generator, backbone, settings, progress)
    return tuple(job.summary(len(data.splits[job.readout.split].texts)) for job in jobs)


@dataclass
class _Job:
    """One readout to be made of one split."""

    readout: Readout
    pending: list[int]
    tokens: list[np.ndarray]
    """Of each candidate; empty for other kinds."""
    head: "RegressionHead | None" = None
    """What predicts, where the LLM is not asked anything."""
    computed: int = 0
    seconds: float = 0.0

    def summary(self, rows: int) -> ReadoutSummary:
        one = self.readout
        return ReadoutSummary(
            one.split, one.name, rows, one.shots, one.shots_used, self.computed, round(self.seconds, 3)
        )


def _plan_split(
    folder: Path, split: str, data: TextData, questions: Questions, backbone: Backbone, settings: ExtractSettings
) -> list[_Job]:
    asked = [kind for kind in settings.readouts if kind != REGRESSION]
    jobs = []
    for shots in settings.shots if asked else ():
        jobs += _plan(folder, split, data, questions, asked, shots, backbone)
    if REGRESSION in settings.readouts:
        manifest = load_manifest(folder)
        head, sha256 = _own_head(backbone)
        readout = Readout(
            identity=manifest.identity,
            split=split,
            fingerprint=manifest.splits[split].fingerprint,
            kind=REGRESSION,
            shots=0,
            shots_used=0,
            settings={"head": sha256},
        )
        jobs.append(_Job(readout, pending_parts(folder, readout, len(data.splits[split].texts)), [], head))
    return jobs


def _own_head(backbone: Backbone) -> "tuple[RegressionHead, str]":
    from .regression import load_regression_head

    assert backbone.adapter is not None  # the settings see to it
    return load_regression_head(backbone.adapter)


def _plan(
    folder: Path,
    split: str,
    data: TextData,
    questions: Questions,
    kinds: list[str],
    shots: int,
    backbone: Backbone,
) -> list[_Job]:
    manifest = load_manifest(folder)
    prompts, used = questions.prompts, questions.fitting[split, shots]
    plan = Readout(
        identity=manifest.identity,
        split=split,
        fingerprint=manifest.splits[split].fingerprint,
        kind="",
        shots=shots,
        shots_used=used,
        settings={"examples": prompts.hash(used)},
    )
    jobs = []
    for kind in kinds:
        more: dict[str, Any] = {"new_tokens": NEW_TOKENS}
        tokens = []
        if kind == "samples":
            more |= {"samples": SAMPLES, "temperature": 1.0, "seed": SEED}
        elif kind == "candidates":
            raft = backbone.adapter is not None and backbone.adapter.method == "raft"
            scores = (trained_scores if raft else candidate_scores)(data.label_range)
            tokens = prompts.candidates(data.prompt, scores, data.label_range, used)
            more = {"candidates": scores, "end_token": int(tokens[0][-1])}
        readout = replace(plan, kind=kind, settings={**plan.settings, **more})
        jobs.append(_Job(readout, pending_parts(folder, readout, len(data.splits[split].texts)), tokens))
    return jobs


@dataclass(frozen=True, eq=False)
class _Asked:
    """The prompts of a split, for all readouts of it with so many examples; or its texts, as the cache has them."""

    split: SplitData
    prefix: Seen
    """What all of them begin with."""
    rows: list[np.ndarray]
    """The tokens of each after that."""
    seconds: float
    """Reading the prefix took that long. Each readout is said to have taken it, as it would alone."""


def _ask(split: SplitData, prompts: Prompts, job: _Job, generator: Generator, backbone: Backbone) -> _Asked:
    if job.head is not None:
        made = job.readout.identity
        texts, _ = backbone.tokenize(
            split.texts, chat_template=made.chat_template, max_length=made.max_length, truncate=made.truncate
        )
        return _Asked(split, generator.read_prefix(np.zeros(0, dtype=np.int64)), texts, 0.0)
    tokens = prompts.tokens(split.texts, job.readout.shots_used)
    shared = 0 if generator.one_by_one else common_prefix(tokens)
    started = time.perf_counter()
    prefix = generator.read_prefix(tokens[0][:shared])
    return _Asked(split, prefix, [row[shared:].copy() for row in tokens], time.perf_counter() - started)


def _run(
    folder: Path,
    job: _Job,
    asked: _Asked,
    generator: Generator,
    backbone: Backbone,
    settings: ExtractSettings,
    progress: "Progress | None",
) -> None:
    readout, rows, shared = job.readout, asked.rows, asked.prefix.length
    parts = [part_rows(len(rows), number) for number in job.pending]
    if progress is not None:
        how = ", by the adapter's own head" if job.head is not None else ""
        how = f", {shared:,} tokens read once for all rows" if shared else how
        progress.note(f"asking about {readout.split}: {readout.name}{how}")
        progress.begin(sum(map(len, parts)), sum(len(rows[row]) for part in parts for row in part))
    default = pack_size(backbone.device.type)
    budget = Budget(settings.batch_tokens or min(max(default, shared), backbone.default_batch_tokens))
    started = time.perf_counter() - (asked.seconds if 0 in job.pending else 0.0)  # not again in each run
    for part in parts:
        answers = _answer(job, [rows[row] for row in part], part, generator, asked.prefix, budget, progress)
        seconds = time.perf_counter() - started
        ids = tuple(asked.split.ids[row] for row in part)
        save_part(folder, replace(readout, rows=tuple(part), ids=ids, answers=tuple(answers), seconds=seconds))
        job.computed += len(part)
        job.seconds += seconds
        started = time.perf_counter()


def _answer(
    job: _Job,
    rows: Sequence[np.ndarray],
    numbers: range,
    generator: Generator,
    prefix: Seen,
    budget: Budget,
    progress: "Progress | None",
) -> list[Any]:
    """The answers to some rows, in their order."""
    more = 0 if job.head is not None else len(answer_nodes(job.tokens)) or NEW_TOKENS
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    lengths = [len(rows[row]) + more for row in order]
    read = [prefix.length + len(rows[row]) for row in order]
    shorten = CUT if job.head is not None else "fewer --shots" if job.readout.shots_used else ""
    answers: list[Any] = [None] * len(rows)

    def forward(batch: range) -> list[Any]:
        chosen = [order[place] for place in batch]
        tokens = [rows[row] for row in chosen]
        if job.head is not None:
            return generator.regression(tokens, job.head)
        if job.readout.kind == "greedy":
            return generator.greedy(tokens, prefix)
        if job.readout.kind == "samples":
            return generator.samples(tokens, prefix, np.stack([_uniform(numbers[row]) for row in chosen]))
        return [[round(value, 6) for value in row] for row in generator.candidates(tokens, prefix, job.tokens)]

    for batch, found in run_in_batches(lengths, budget, forward, tokens=read, shorten=shorten):
        for place, answer in zip(batch, found, strict=True):
            answers[order[place]] = answer
        if progress is not None:
            progress.advance(len(batch), sum(len(rows[order[place]]) for place in batch))
    return answers


def _uniform(row: int) -> np.ndarray:
    return np.random.default_rng((SEED, row)).random((SAMPLES, NEW_TOKENS))
