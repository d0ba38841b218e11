"""Many texts that share their beginnings, through an LLM as one sequence: nothing shared is computed or kept twice.

A tree of tokens: the examples of a prompt, then each row's own text, then what may be answered to it. Each token sees
the tokens before it on its own path, at the position it has there, so that every path comes out as if it were alone.
There is no padding. (Known as tree attention from speculative decoding, Miao et al., SpecInfer, ASPLOS 2024.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ..cache.errors import BackboneError
from .batches import out_of_memory
from .start import common_prefix, fork

if TYPE_CHECKING:
    import torch

ALL = -1
"""As a row: a token before all rows. As branches: a token on every branch of its row."""
_BITS = 63  # of a word: the last is the sign's, and ALL's alone
_tested: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Tokens:
    """n tokens of a tree; each field is (n,) int64 but for the last."""

    ids: np.ndarray
    position: np.ndarray
    """How many tokens come before it on its path."""
    row: np.ndarray
    """Whose text it is in, or ALL."""
    branches: np.ndarray
    """(n, words) int64: the branches of that row it is on, as `branch_bits` gives them, or ALL in every word."""

    @classmethod
    def of(
        cls, ids: np.ndarray, *, position: np.ndarray, row: "int | np.ndarray", branches: "int | np.ndarray"
    ) -> "Tokens":
        """Make them; a single row, or word of branches, is that of all tokens; of (n,) words each has one."""
        position, row = (np.full(len(ids), value, dtype=np.int64) for value in (position, row))
        words = np.asarray(branches, dtype=np.int64)
        if words.ndim < 2:
            words = np.broadcast_to(words.reshape(-1, 1), (len(ids), 1))
        return cls(np.asarray(ids, dtype=np.int64), position, row, words)

    @classmethod
    def join(cls, pieces: "Sequence[Tokens]") -> "Tokens":
        """One after another."""
        words = max(piece.branches.shape[1] for piece in pieces)
        ids, position, row = (
            np.concatenate([getattr(piece, field) for piece in pieces]) for field in ("ids", "position", "row")
        )
        return cls(ids, position, row, np.concatenate([_widened(piece.branches, words) for piece in pieces]))


def branch_bits(members: np.ndarray) -> np.ndarray:
    """Branches by number as a bit of each.

    Args:
        members: (n, branches) bool, which of them each token is on.

    Returns:
        (n, words) int64, 63 in a word.
    """
    words = -(-members.shape[1] // _BITS)
    padded = np.zeros((len(members), words * _BITS), dtype=np.int64)
    padded[:, : members.shape[1]] = members
    return (padded.reshape(len(members), words, _BITS) << np.arange(_BITS)).sum(axis=2)


def _widened(branches: np.ndarray, words: int) -> np.ndarray:
    more = np.where(branches[:, :1] == ALL, ALL, 0)
    return np.concatenate([branches, *[more] * (words - branches.shape[1])], axis=1)


def plant(rows: Sequence[np.ndarray], begin: int = 0) -> tuple[Tokens, list[Tokens]]:
    """Rows as a tree.

    Args:
        rows: B arrays of token ids, each of one at least.
        begin: tokens that were read before them.

    Returns:
        What all of them begin with, which may be nothing, and the rest of each: one token at least.
    """
    shared = common_prefix(rows)
    trunk = Tokens.of(rows[0][:shared], position=np.arange(begin, begin + shared), row=ALL, branches=ALL)
    return trunk, [
        Tokens.of(ids[shared:], position=np.arange(begin + shared, begin + len(ids)), row=row, branches=ALL)
        for row, ids in enumerate(rows)
    ]


def last_tokens(trunk: Tokens, own: Sequence[Tokens]) -> list[int]:
    """Where each row of `plant` ends, once they are joined."""
    return (len(trunk.ids) + np.cumsum([len(rest.ids) for rest in own]) - 1).tolist()


def pack_size(device: str) -> int:
    """Tokens that are best run at once on a kind of device, where they have no long beginning in common.

    On the CPU more of them gain little and take memory. Elsewhere each is compared with all others of its batch, though
    it sees its own row only: more of them would cost more than they save.
    """
    return 1024 if device == "cpu" else 4096


class Seen:
    """What a model has read of a tree: keys and values, and whose they are."""

    def __init__(self, tokens: Tokens, past: Any) -> None:
        self.tokens = tokens
        self.past = past
        """A DynamicCache of transformers."""

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64 token ids."""
        return self.tokens.ids

    @property
    def length(self) -> int:
        """Tokens read."""
        return len(self.tokens.ids)

    def fork(self) -> "Seen":
        """A second one that may grow without changing this one; keys and values are shared until then."""
        return Seen(self.tokens, fork(self.past))


def read_prefix(model: Any, ids: np.ndarray) -> Seen:
    """Run what all rows begin with, once.

    Args:
        model: a causal LM of transformers.
        ids: (n,) token ids, n may be 0.
    """
    import torch
    from transformers import DynamicCache

    # Without the configuration a cache keeps every token, of layers with a sliding window too: the masks say what is
    # seen.
    seen = Seen(Tokens.of(ids, position=np.arange(len(ids)), row=ALL, branches=ALL), DynamicCache())
    if len(ids) and takes_trees(model):
        input_ids = torch.as_tensor(seen.ids, device=model.device)[None]
        model(input_ids=input_ids, past_key_values=seen.past, use_cache=True, logits_to_keep=1)
    return seen


def tree_logits(model: Any, tokens: Tokens, keep: Sequence[int], *, seen: Seen | None = None) -> "torch.Tensor":
    """Run n tokens of a tree.

    Args:
        model: a causal LM that `takes_trees`.
        tokens: the tokens; a token comes after those it sees.
        keep: of which of them the next token's logits are wanted.
        seen: what was read before; grows by these tokens. None to keep nothing, as in training.

    Returns:
        (len(keep), vocabulary) in the compute dtype.
    """
    import torch

    keys = Tokens.join([seen.tokens, tokens]) if seen is not None else tokens
    kept = torch.tensor(list(keep), device=model.device)
    more = {"past_key_values": seen.past, "use_cache": True} if seen is not None else {"use_cache": False}
    logits = _run(model, tokens, keys, logits_to_keep=kept, **more).logits[0]
    if seen is not None:
        seen.tokens = keys
    return logits if len(logits) == len(kept) else logits[kept]


def tree_states(model: Any, tokens: Tokens, keep: Sequence[int]) -> "torch.Tensor":
    """Run n tokens of a tree through a model without LM head.

    Args:
        model: the body of a causal LM that `takes_trees`.
        tokens: the tokens; a token comes after those it sees.
        keep: of which of them the state after the final norm is wanted.

    Returns:
        (len(keep), D) in the compute dtype.
    """
    return _run(model, tokens, tokens, use_cache=False).last_hidden_state[0, list(keep)]


def takes_trees(model: Any) -> bool:
    """Whether a model gives for a tree what it gives for each path alone; tried once on a few tokens.

    Recurrent layers, positions that are not told through `position_ids`, and GPT-Neo's windows, which count places in
    the pass, do not.

    Raises:
        BackboneError: if these few do not fit the memory.
    """
    if model not in _tested:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        windows = bool(getattr(config, "attention_types", None))  # GPT-Neo's, too wide for the few tokens of a try
        _tested[model] = kinds <= {"full_attention", "sliding_attention"} and not windows and _same_as_alone(model)
    return _tested[model]


def _same_as_alone(model: Any) -> bool:
    import torch

    size = model.get_input_embeddings().num_embeddings
    paths = [[(7 * n + 3) % size for n in range(first, first + 5)] for first in (0, 11)]
    paths[1][:2] = paths[0][:2]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            alone = [model(input_ids=torch.tensor([path], device=model.device)).logits[0, -1] for path in paths]
            _tested[model] = True  # so that the prefix is read
            seen = read_prefix(model, np.array(paths[0][:2]))
            for n in (2, 3, 4):
                step = Tokens.of(
                    np.array([path[n] for path in paths]), position=np.array([n, n]), row=np.arange(2), branches=1
                )
                logits = tree_logits(model, step, range(2), seen=seen)
        expected = torch.stack(alone).float()
        share = 1e-3 if logits.dtype == torch.float32 else 0.05
        return bool((logits.float() - expected).abs().max() <= share * expected.abs().max())
    except Exception as error:
        # A model that cannot take masks or positions of ours says so in whatever way its code does.
        if out_of_memory(error):
            raise BackboneError(
                "out of memory on ten tokens beside the LLM's weights; use a smaller --compute-dtype, or a device with "
                "more memory"
            ) from None
        return False
    finally:
        _tested.pop(model, None)  # not there yet if memory ran out at once
        for module, mode in modes:
            module.training = mode


def _run(model: Any, tokens: Tokens, keys: Tokens, **options: Any) -> Any:
    import torch

    from .tree_attention import attention_by_rows

    masks = _masks(model, tokens, keys)
    dense = list(masks.values()) if isinstance(masks, dict) else [masks]
    with attention_by_rows(tokens.row, keys.row, dense, everyone=ALL):
        return model(
            input_ids=torch.as_tensor(tokens.ids, device=model.device)[None],
            position_ids=torch.as_tensor(tokens.position, device=model.device)[None],
            attention_mask=masks,
            **options,
        )


def _masks(model: Any, queries: Tokens, keys: Tokens) -> Any:
    """(1, 1, n, n + seen): what each token sees. For layers of two kinds, one for each."""
    import torch

    config = model.config.get_text_config()

    def place(values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, device=model.device)

    distance = place(queries.position)[:, None] - place(keys.position)
    key_row = place(keys.row)
    sees = (key_row == ALL) | (key_row == place(queries.row)[:, None])
    together = torch.zeros_like(sees)
    for key, query in zip(keys.branches.T, _widened(queries.branches, keys.branches.shape[1]).T, strict=True):
        together |= (place(key) & place(query)[:, None]) != 0
    sees &= together
    sees &= distance >= 0

    def mask(seen: torch.Tensor) -> torch.Tensor:
        if config._attn_implementation == "eager":
            least = torch.finfo(model.dtype).min
            return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(~seen, least)[None, None]
        return seen[None, None]

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ({"sliding_attention"} if window else {"full_attention"}))
    if "sliding_attention" not in kinds or window is None or int(distance.max()) < window:
        return mask(sees)
    near = mask(sees & (distance < window))
    return {"full_attention": mask(sees), "sliding_attention": near} if len(kinds) > 1 else near
