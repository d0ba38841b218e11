"""Candidate scores: which numbers an LLM may answer, how they are written, and how likely it finds each of them.

Regression-aware inference (RAIL, Lukasik et al., EMNLP Findings 2024) averages over such a grid, and RAFT trains
through it.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from .tree import Seen, Tokens, branch_bits, plant, takes_trees, tree_logits

if TYPE_CHECKING:
    import torch

_WRITTEN, _TRAINED = 101, 21  # values of a grid at most; each costs the LLM its tokens, for every row


def candidate_scores(label_range: tuple[float, float]) -> list[float]:
    """All scores that `format_score` writes: what examples answer is among what an LLM is asked about.

    An even grid over the label range of at most 101 values: [0, 5] and [1, 5] in steps of 0.1, [0, 100] of 1. The ends
    of a range are always in, as `format_score` writes them, also where they are no multiples of the step.
    """
    return _grid(label_range, _step(label_range, _WRITTEN, (1,)))


def trained_scores(label_range: tuple[float, float]) -> list[float]:
    """The scores that RAFT trains through, and that an LLM tuned by it is asked about: a coarser grid.

    The multiples of the smallest nice step (1, 2 or 5 times a power of ten) with at most 21 values, and the ends: an
    LLM that is tuned learns to answer on any grid, and a step of training costs three passes over all of it.
    """
    return _grid(label_range, _step(label_range, _TRAINED, (1, 2, 5)))


def _grid(label_range: tuple[float, float], step: Decimal) -> list[float]:
    low, high = (Decimal(repr(float(end))) for end in label_range)
    first = -(-low // step)
    if first * step < low:  # Decimal's // rounds towards zero
        first += 1
    values = [low, *(number * step for number in range(int(first), int(high / step) + 2)), high]
    written = {float(format_score(float(value), label_range)) for value in values if low <= value <= high}
    return sorted(written)


def format_score(value: float, label_range: tuple[float, float]) -> str:
    """A score as a prompt and an answer write it: "3.5", "3", "67".

    Rounded to the power of ten with at most 101 multiples in the range: 0.1 on [0, 5], 1 on [0, 100], 0.01 on [0, 1].
    Zeros behind the point are left out, as people and LLMs do.
    """
    decimals = -int(_step(label_range, _WRITTEN, (1,)).as_tuple().exponent)
    text = f"{round(value, decimals):.{max(decimals, 0)}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def answer_ids(
    tokenizer: Any, text_before: str, answer: str, *, lead: str | None = None, end: str = "\n", after: str = ""
) -> np.ndarray:
    """Tokens of an answer with its end marker, without which "1" would be as likely as all answers that begin with it.

    Prompt and answer are tokenised together, and what comes after the prompt's tokens is the answer's. Where the
    answer's first characters would melt into the prompt's last token, the prompt's tokens stay as they are and the
    answer is tokenised alone: a prompt has the same tokens whatever is answered.

    Args:
        tokenizer: the LLM's.
        text_before: the prompt, or at least its end.
        answer: as `format_score` writes it.
        lead: what stands between the two; None for a space, or nothing where the prompt ends in white space.
        end: what comes after an answer: a new line, the blank line between examples, or the end of a chat's turn. Its
            first token is the end marker.
        after: how what follows the end begins, where anything does. A tokenizer may cut an end that goes on in another
            way than one where the text stops: two new lines apart, say, in place of both in one.

    Returns:
        (n,) int32, the end marker last.
    """
    if lead is None:
        lead = "" if text_before[-1:].isspace() else " "
    text = lead + answer
    before = _ids(tokenizer, text_before)
    bare, whole = _ids(tokenizer, text_before + text), _ids(tokenizer, text_before + text + end)
    if whole[: len(before)] != before or len(whole) == len(before):
        before, text_before = [], ""
        bare, whole = _ids(tokenizer, text), _ids(tokenizer, text + end)
    if whole[: len(bare)] == bare:
        going_on = _ids(tokenizer, text_before + text + end + after)
        whole = (going_on if going_on[: len(bare)] == bare else whole)[: len(bare) + 1]
    return np.array(whole[len(before) :], dtype=np.int32)


def answer_nodes(candidates: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    """The tree of candidates as the LLM reads it behind each prompt: a node for each beginning, shorter ones first.

    The last token of a candidate is predicted and never read.
    """
    beginnings = {tuple(c[:n].tolist()) for c in candidates for n in range(1, len(c))}
    return sorted(beginnings, key=lambda node: (len(node), node))


def score_candidates(
    model: Any,
    prompts: Sequence[np.ndarray],
    candidates: Sequence[np.ndarray],
    *,
    prefix: Seen | None = None,
    pad: int,
) -> "torch.Tensor":
    """log p(candidate | prompt), every token of a candidate scored in full; differentiable.

    One forward pass for all: what the prompts begin with, and then the rest of each, followed by the tree of its
    candidates, which share the tokens that they begin with. Each token sees its own prompt and its own candidate only.
    Of architectures that cannot take such masks, one pass per candidate.

    Args:
        model: a causal LM of transformers, with or without peft's adapters.
        prompts: B arrays of token ids, each of one token at least.
        candidates: C arrays of token ids, the same for each prompt; none the beginning of another.
        prefix: what the model has read already and all prompts go on from, see `read_prefix`.
        pad: a token id that fills rows up where that is needed.

    Returns:
        (B, C) float32 on the model's device.
    """
    import torch

    from .token_scores import token_scores

    if not takes_trees(model):
        return _one_by_one(model, prompts, candidates, prefix, pad)
    nodes = answer_nodes(candidates)
    number = {node: place for place, node in enumerate([(), *nodes])}
    members = np.array([[tuple(c[: len(node)].tolist()) == node for c in candidates] for node in nodes], dtype=bool)
    members = branch_bits(members.reshape(len(nodes), len(candidates)))
    begin = prefix.length if prefix is not None else 0
    trunk, own = plant(prompts, begin)
    pieces = [trunk]
    keep: list[int] = []
    total = len(trunk.ids)
    for row, rest in enumerate(own):
        end = begin + len(prompts[row])
        pieces.append(rest)
        pieces.append(
            Tokens.of(
                np.array([node[-1] for node in nodes], dtype=np.int64),
                position=np.array([end + len(node) - 1 for node in nodes], dtype=np.int64),
                row=row,
                branches=members,
            )
        )
        last = total + len(rest.ids) - 1
        keep += range(last, last + 1 + len(nodes))
        total += len(rest.ids) + len(nodes)
    seen = prefix.fork() if prefix is not None else None
    logits = tree_logits(model, Tokens.join(pieces), keep, seen=seen)
    steps = [
        (place, (number[tuple(c[:n].tolist())], int(c[n]))) for place, c in enumerate(candidates) for n in range(len(c))
    ]
    edges = sorted({edge for _, edge in steps})
    at, token = torch.tensor(edges, device=logits.device).T
    rows = torch.arange(len(prompts), device=logits.device)[:, None] * (1 + len(nodes)) + at
    log_p = token_scores(logits, rows.flatten(), token.repeat(len(prompts))).view(len(prompts), -1)
    place = torch.tensor([place for place, _ in steps], device=logits.device)
    through = torch.tensor([edges.index(edge) for _, edge in steps], device=logits.device)
    return log_p.new_zeros(len(prompts), len(candidates)).index_add(1, place, log_p[:, through])


def _one_by_one(
    model: Any, prompts: Sequence[np.ndarray], candidates: Sequence[np.ndarray], prefix: Seen | None, pad: int
) -> "torch.Tensor":
    import torch

    before = prefix.ids if prefix is not None else np.zeros(0, dtype=np.int64)
    columns = []
    for candidate in candidates:
        rows = [np.concatenate([before, prompt, candidate]) for prompt in prompts]
        input_ids = np.full((len(rows), max(map(len, rows))), pad, dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        logits = model(
            input_ids=torch.from_numpy(input_ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            use_cache=False,
        ).logits
        scores = []
        for number, row in enumerate(rows):
            begin = len(row) - len(candidate)
            log_p = logits[number, begin - 1 : len(row) - 1].float().log_softmax(-1)
            token = torch.as_tensor(candidate.astype(np.int64), device=log_p.device)
            scores.append(log_p.gather(1, token[:, None]).sum())
        columns.append(torch.stack(scores))
    return torch.stack(columns, dim=1)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _step(label_range: tuple[float, float], most: int, digits: tuple[int, ...]) -> Decimal:
    """The smallest of these digits times a power of ten that gives a grid of so many values at most."""
    low, high = (Decimal(repr(float(end))) for end in label_range)
    power = (high - low).adjusted() - 2
    while True:
        for digit in digits:
            step = Decimal(digit).scaleb(power)
            ends = sum(end % step != 0 for end in (low, high))
            first, last = (int(end / step) for end in (low, high))
            inside = last - first + 1 - (low > first * step) - (high < last * step)
            if inside + ends <= most:
                return step.normalize()
        power += 1
