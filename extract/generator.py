"""The LLM with its LM head: what it answers, greedily, by sampling, or over candidates; and what its own head predicts.

Samples that are the same so far are one path of a tree, which is read once.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..cache.errors import BackboneError
from .backbone import Backbone
from .batches import against_nan, out_of_memory
from .candidates import score_candidates
from .tree import Seen, Tokens, last_tokens, plant, read_prefix, takes_trees, tree_logits

if TYPE_CHECKING:
    import torch

    from .regression import RegressionHead

NEW_TOKENS = 16
"""Tokens of a decoded answer at most; it ends at a new line, or at a special token behind its first text."""
_SAMPLED = 1 << 24  # probabilities that are summed up at once


def refuse_encoder(
    backbone: Backbone, advice: str = "which answers nothing; leave --readouts out, or give a causal LM"
) -> None:
    """Refuse an LLM that cannot answer.

    Args:
        backbone: the LLM.
        advice: the end of the sentence.

    Raises:
        BackboneError: if it is no causal LM.
    """
    from transformers.models.auto import modeling_auto as auto

    kind = backbone.config.model_type
    own_code = "AutoModelForCausalLM" in (getattr(backbone.config, "auto_map", None) or {})
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or not (
        own_code or kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        raise BackboneError(f"{backbone.files.name} is an encoder ({kind}), {advice}")


class Generator:
    """A causal LM that reads what all prompts begin with once, and all prompts of a batch without padding."""

    def __init__(self, backbone: Backbone) -> None:
        """Load the weights, from the files, in the type and on the device of a backbone.

        Raises:
            BackboneError: if it is no causal LM, or cannot be loaded.
        """
        refuse_encoder(backbone)
        self._backbone = backbone
        self._tokenizer = backbone.tokenizer
        self._name = backbone.files.name
        model = backbone.read_model("AutoModelForCausalLM")
        self._pad = backbone.pad_token(model)
        self.model = backbone.place(model)
        stop = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        stops = stop if isinstance(stop, list) else [stop]
        self._stops = {token for token in (*stops, self._tokenizer.eos_token_id) if token is not None}
        self._special = frozenset(self._tokenizer.all_special_ids)
        self._breaks: dict[int, bool] = {}

    @property
    def one_by_one(self) -> bool:
        """Whether every sequence goes through the LLM alone, since its architecture allows nothing else."""
        return not takes_trees(self.model)

    def read_prefix(self, ids: np.ndarray) -> Seen:
        """Read what all rows begin with, once, to the end; (n,) token ids, n may be 0.

        Raises:
            BackboneError: if memory runs out.
        """
        import torch

        try:
            with torch.inference_mode():
                seen = read_prefix(self.model, ids)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise BackboneError(
                f"out of memory on the {len(ids):,} tokens that all prompts begin with; use fewer --shots, a smaller "
                "--compute-dtype, or a device with more memory"
            ) from None
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # so that its time is not that of what comes next
        return seen

    def greedy(self, rows: Sequence[np.ndarray], prefix: Seen) -> list[str]:
        """The most likely answer, token by token.

        Args:
            rows: B arrays of token ids, without those of the prefix.
            prefix: what they all begin with.

        Returns:
            B texts: the answers' first line.

        Raises:
            BackboneError: if the LLM gives NaN.
        """

        def choose(logits: "torch.Tensor", place: np.ndarray, _alive: list[tuple[int, int]], _step: int) -> np.ndarray:
            return logits.argmax(-1).cpu().numpy()[place]

        return [answers[0] for answers in self._decode(rows, prefix, 1, choose)]

    def samples(self, rows: Sequence[np.ndarray], prefix: Seen, uniform: np.ndarray) -> list[list[str]]:
        """Answers drawn at temperature 1 from the whole distribution.

        Args:
            rows: B arrays of token ids, without those of the prefix.
            prefix: what they all begin with.
            uniform: (B, samples, NEW_TOKENS) in [0, 1): what each token is drawn with, so that batch mates do not
                change an answer.

        Returns:
            B lists of texts.

        Raises:
            BackboneError: if the LLM gives NaN.
        """
        import torch

        def choose(logits: torch.Tensor, place: np.ndarray, alive: list[tuple[int, int]], step: int) -> np.ndarray:
            draws = torch.tensor([uniform[row, branch, step] for row, branch in alive])
            lines = torch.from_numpy(place).to(logits.device).split(max(1, _SAMPLED // logits.shape[1]))
            pieces = zip(lines, draws.split(len(lines[0])), strict=True)
            return torch.cat([_draw(logits[line], draw) for line, draw in pieces]).cpu().numpy()

        return self._decode(rows, prefix, uniform.shape[1], choose)

    def candidates(
        self, rows: Sequence[np.ndarray], prefix: Seen, candidates: Sequence[np.ndarray]
    ) -> list[list[float]]:
        """log p(candidate | prompt).

        Args:
            rows: B arrays of token ids, without those of the prefix.
            prefix: what they all begin with.
            candidates: C arrays of token ids.

        Returns:
            B lists of C.

        Raises:
            BackboneError: if one is NaN or infinite.
        """
        import torch

        with torch.inference_mode():
            scores = score_candidates(self.model, rows, candidates, prefix=prefix, pad=self._pad)
        self._refuse(not scores.isfinite().all())
        return scores.double().cpu().tolist()

    def regression(self, rows: Sequence[np.ndarray], head: "RegressionHead") -> list[float]:
        """What a head predicts that was trained with the adapter, for B arrays of token ids.

        Raises:
            BackboneError: if a prediction is NaN or infinite.
        """
        import torch

        from .regression import regress

        with torch.inference_mode():
            scores = regress(head.to(self.model.device), self.model, self._backbone, rows)
        self._refuse(not scores.isfinite().all())
        return scores.double().cpu().tolist()

    def _decode(
        self,
        rows: Sequence[np.ndarray],
        prefix: Seen,
        branches: int,
        choose: "Callable[[torch.Tensor, np.ndarray, list[tuple[int, int]], int], np.ndarray]",
    ) -> list[list[str]]:
        """`branches` answers to each row; `choose` picks a token for each, by the line of logits that is its own."""
        import torch

        answers: list[list[list[int]]] = [[[] for _ in range(branches)] for _ in rows]
        alive = [(row, branch) for row in range(len(rows)) for branch in range(branches)]
        read = self._one_by_one if self.one_by_one else self._by_tree
        with torch.inference_mode():
            step_logits = read(rows, prefix)
            for step in range(NEW_TOKENS):
                nodes, place = _distinct(alive, answers)
                logits = step_logits(nodes)
                self._refuse(bool(logits.isnan().any()))
                for (row, branch), token in zip(alive, choose(logits, place, alive, step).tolist(), strict=True):
                    answers[row][branch].append(token)
                alive = [(row, branch) for row, branch in alive if not self._ended(answers[row][branch])]
                if not alive:
                    break
        return [[self._text(tokens) for tokens in of_row] for of_row in answers]

    def _by_tree(self, rows: Sequence[np.ndarray], prefix: Seen) -> "Callable[[list[_Node]], torch.Tensor]":
        seen, begin = prefix.fork(), prefix.length
        trunk, own = plant(rows, begin)
        ends = last_tokens(trunk, own)

        def logits(nodes: "list[_Node]") -> "torch.Tensor":
            if not nodes[0].answer:
                return tree_logits(self.model, Tokens.join([trunk, *own]), ends, seen=seen)
            last = Tokens.of(
                np.array([node.answer[-1] for node in nodes]),
                position=np.array([begin + len(rows[node.row]) + len(node.answer) - 1 for node in nodes]),
                row=np.array([node.row for node in nodes]),
                branches=np.array([node.branches for node in nodes]),
            )
            return tree_logits(self.model, last, range(len(nodes)), seen=seen)

        return logits

    def _one_by_one(self, rows: Sequence[np.ndarray], prefix: Seen) -> "Callable[[list[_Node]], torch.Tensor]":
        """For architectures that cannot take trees: each sequence whole and alone, slow and plain."""
        import torch

        def one(node: _Node) -> torch.Tensor:
            ids = np.concatenate([prefix.ids, rows[node.row], np.array(node.answer, dtype=np.int64)])
            input_ids = torch.as_tensor(ids.astype(np.int64), device=self.model.device)[None]
            return self.model(input_ids=input_ids, use_cache=False).logits[0, -1]

        return lambda nodes: torch.stack([one(node) for node in nodes])

    def _ended(self, tokens: list[int]) -> bool:
        last = tokens[-1]
        if last in self._stops or (last in self._special and self._whole(tokens).strip()):
            return True
        if last not in self._breaks:
            self._breaks[last] = "\n" in self._tokenizer.decode([last])
        return self._breaks[last] and "\n" in self._whole(tokens).lstrip()

    def _whole(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _text(self, tokens: list[int]) -> str:
        return self._whole(tokens).lstrip().partition("\n")[0].rstrip()

    def _refuse(self, broken: bool) -> None:
        if broken:
            dtype = self.model.dtype
            name = str(dtype).removeprefix("torch.")
            raise BackboneError(f"{self._name} gives NaN or infinity in {name}; try {against_nan(dtype)}")


class _Node(NamedTuple):
    """The last token of an answer as far as it goes, of all the answers to a row that have been the same so far."""

    row: int
    answer: tuple[int, ...]
    branches: int
    """A bit for each of those answers."""


def _distinct(alive: list[tuple[int, int]], answers: list[list[list[int]]]) -> tuple[list[_Node], np.ndarray]:
    """The nodes that answers end in, each once, and the place among them of each answer's."""
    bits: dict[tuple[int, tuple[int, ...]], int] = {}
    keys = [(row, tuple(answers[row][branch])) for row, branch in alive]
    for key, (_, branch) in zip(keys, alive, strict=True):
        bits[key] = bits.get(key, 0) | 1 << branch
    number = {key: place for place, key in enumerate(bits)}
    return [_Node(*key, branches) for key, branches in bits.items()], np.array([number[key] for key in keys])


def _draw(logits: "torch.Tensor", uniform: "torch.Tensor") -> "torch.Tensor":
    """One token for each line: where the running sum of the probabilities passes a uniform draw."""
    import torch

    kind = torch.float32 if logits.device.type == "mps" else torch.float64  # which mps has not
    total = logits.float().softmax(-1).to(kind).cumsum(-1)
    place = (uniform.to(kind).to(logits.device) * total[:, -1])[:, None]
    return torch.searchsorted(total, place, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
