"""Prompts with solved examples: which examples, how a prompt and an answer are written, how many fit the context."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cache.errors import DataError
from ..cache.manifest import TRAIN
from .backbone import Backbone
from .candidates import answer_ids, format_score
from .chat import chat_border, chat_text, check_chat_template
from .generator import NEW_TOKENS
from .prompt import fill, prompt_fields
from .rows import SplitData

SEED = 0
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Example:
    """A solved example."""

    text: str
    """The filled prompt."""
    answer: str
    """Its gold score, as `format_score` writes it."""


def choose_examples(train: SplitData | None, count: int, label_range: tuple[float, float]) -> list[Example]:
    """Draw examples from the labelled rows of the training split, the same for every row that is asked about.

    They are drawn at random (seed 0), so that their labels are spread as the training split's are; fewer examples are
    the first of more.

    Args:
        train: the training split, None if it was not given.
        count: how many; all rows where there are fewer.
        label_range: of the scores.

    Raises:
        DataError: if examples are asked for and there is none.
    """
    if count == 0:
        return []
    if train is None:
        raise DataError(
            f"--shots {count} takes its examples from a split called {TRAIN}, which was not given; add "
            f"--data {TRAIN}=FILE"
        )
    labelled = np.flatnonzero(~np.isnan(train.targets))
    if not len(labelled):
        raise DataError(f"no row of the split {TRAIN} has a label, so it has no examples for --shots {count}")
    drawn = np.random.default_rng(SEED).permutation(labelled)[:count].tolist()
    return [Example(train.texts[row], format_score(float(train.targets[row]), label_range)) for row in drawn]


def closing_tokens(backbone: Backbone) -> int:
    """How many special tokens the tokenizer puts after a text, after which an LLM would begin another one."""
    plain, whole = (backbone.encode(["a"], special_tokens=special)[0].tolist() for special in (False, True))
    added = len(whole) - len(plain)
    return added - next((n for n in range(added + 1) if whole[n : n + len(plain)] == plain), added)


class Prompts:
    """How a row's filled prompt becomes what the LLM reads, with any number of examples before it.

    Each example is its filled prompt, a space (none after white space) and its answer, with a blank line after it; in a
    chat, a turn of the user and one of the assistant.
    """

    def __init__(self, backbone: Backbone, examples: Sequence[Example], *, chat_template: bool) -> None:
        self._backbone = backbone
        self._examples = list(examples)
        self._chat = chat_template
        self._closing = 0 if chat_template else closing_tokens(backbone)
        self._thought, self._lead, self._chat_end = "", None, ""
        if chat_template:
            check_chat_template(backbone.tokenizer, backbone.files.name)
            lead, self._chat_end = chat_border(backbone.tokenizer)
            # What an LLM that thinks writes before its answer is put into the prompt; white space it writes itself.
            self._thought, self._lead = (lead, "") if lead.strip() else ("", lead)

    def text(self, row: str, shots: int) -> str:
        """What the LLM reads.

        Args:
            row: a filled prompt.
            shots: how many of the examples come before it.
        """
        chosen = self._examples[:shots]
        if self._chat:
            turns = [turn for example in chosen for turn in (example.text, example.answer)]
            return chat_text(self._backbone.tokenizer, [*turns, row]) + self._thought
        solved = (f"{e.text}{'' if e.text[-1:].isspace() else ' '}{e.answer}{_BLANK_LINE}" for e in chosen)
        return "".join(solved) + row

    def border(self, shots: int) -> dict[str, Any]:
        """What `answer_ids` must know of what comes before and after an answer: `lead` and `end`."""
        if self._chat:
            return {"lead": self._lead, "end": self._chat_end or self._backbone.tokenizer.eos_token}
        return {"lead": None, "end": _BLANK_LINE if shots else "\n"}

    def candidates(
        self, template: str, scores: Sequence[float], label_range: tuple[float, float], shots: int
    ) -> list[np.ndarray]:
        """The token ids of each candidate score as an answer, as the answers of the examples have them.

        Args:
            template: the prompt, not filled.
            scores: the candidates.
            label_range: smallest and largest possible score.
            shots: how many examples come before a row.
        """
        # Any row would do: the tokens of a prompt stay as they are, whatever is answered.
        before = self.text(fill(template, {field: field for field in prompt_fields(template)}), 0)
        border = self.border(shots) | {"after": before if shots and not self._chat else ""}
        written = [format_score(score, label_range) for score in scores]
        return [answer_ids(self._backbone.tokenizer, before, answer, **border) for answer in written]

    def tokens(self, rows: Sequence[str], shots: int) -> list[np.ndarray]:
        """Token ids of each prompt, int32, with the special tokens that begin a text and without those that end one."""
        encoded = self._backbone.encode([self.text(row, shots) for row in rows], special_tokens=not self._chat)
        return [tokens[: len(tokens) - self._closing] for tokens in encoded]

    def fitting(self, split: str, rows: Sequence[str], limit: int, shots: int) -> int:
        """The largest number of examples with which every row, and an answer to it, fits the context.

        Args:
            split: what messages call the rows.
            rows: the filled prompts.
            limit: tokens of the context.
            shots: examples at most.

        Raises:
            DataError: if a row does not fit without any, or examples are asked for and not one fits.
        """
        room = limit - NEW_TOKENS
        lengths = [len(tokens) for tokens in self.tokens(rows, 0)]
        longest = int(np.argmax(lengths))
        if lengths[longest] > room:
            raise DataError(
                f"row {longest} of {split} has {lengths[longest]} tokens, which with {NEW_TOKENS} for the answer do "
                f"not fit the context of {limit}; leave --readouts out, or take an LLM of a longer context"
            )

        def length(examples: int) -> int:
            return len(self.tokens([rows[longest]], examples)[0])

        # Another row may take a token more beside the examples than alone, so a few are left over.
        fits = bisect_right(range(1, min(shots, len(self._examples)) + 1), room - 2, key=length)
        if shots and not fits:
            raise DataError(
                f"not one example fits the context of {limit} tokens beside the longest row of {split} "
                f"({lengths[longest]} tokens); leave --shots out"
            )
        return fits

    def hash(self, shots: int) -> str | None:
        """sha256 over the examples, None without any."""
        if not shots:
            return None
        digest = hashlib.sha256()
        for example in self._examples[:shots]:
            digest.update(f"{example.text}\0{example.answer}\0".encode())
        return digest.hexdigest()
