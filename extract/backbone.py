"""The frozen LLM: its configuration and tokenizer first, its weights only when there is something to run."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..cache.device import pick_device
from ..cache.errors import BackboneError, SettingsError, require_extra
from .adapter import Adapter, merge_adapter
from .chat import chat_text, check_chat_template
from .files import BackboneFiles
from .heap import keep_freed_memory
from .start import Start, close, common_prefix, fork, worth_reading_once

_TOKENIZE_ROWS = 1000
_POSITIONS_AFTER_PADDING = {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"}
"""Architectures whose positions begin after the padding's, so that their context is shorter than their config says."""


class Backbone:
    """A causal LM or encoder without its LM head, truncated to the layers that are asked for."""

    def __init__(
        self,
        files: BackboneFiles,
        *,
        layers: Sequence[int | float],
        compute_dtype: str,
        device: str,
        trust_remote_code: bool,
        adapter: Adapter | None = None,
    ) -> None:
        """Load configuration and tokenizer; `load` loads the weights, and merges the adapter into them.

        Raises:
            BackboneError: if they cannot be read, or the model is neither a causal LM nor an encoder.
            SettingsError: if a layer is deeper than the backbone, or the device is not there.
        """
        import torch

        transformers: Any = require_extra("transformers", "extract", "Running a backbone")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self._transformers = transformers
        self.files = files
        self.adapter = adapter
        self.version: str = transformers.__version__
        self._options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if files.gguf_file is not None:
            self._options["gguf_file"] = files.gguf_file
        config = self._from_pretrained("AutoConfig")
        if getattr(config, "is_encoder_decoder", False):
            raise BackboneError(
                f"{files.name} is an encoder-decoder ({config.model_type}); a causal LM or an encoder is needed"
            )
        self.config = config
        """transformers' configuration."""
        self._text_config = config.get_text_config()
        self.depth: int = self._text_config.num_hidden_layers
        self.hidden_size: int = self._text_config.hidden_size
        self.layers = resolve_layers(layers, self.depth)
        self.tokenizer = self._from_pretrained("AutoTokenizer")
        self.tokenizer.truncation_side = "right"  # some cut the beginning, where the instructions are
        self.device = pick_device(device)
        if compute_dtype == "auto":
            stated = getattr(self._text_config, "dtype", None) or getattr(config, "dtype", None)
            own = stated if self.device.type == "cuda" else None
            self.compute_dtype = own if isinstance(own, torch.dtype) else torch.float32
        else:
            self.compute_dtype = getattr(torch, compute_dtype)
        self.parameters = 0
        """Of the whole backbone, without a head for its vocabulary; known once it is loaded."""
        self._model: Any = None
        self._caught: dict[int, Any] = {}
        self._start: Start | None = None

    @property
    def context(self) -> int | None:
        """Most tokens the backbone can read, None if it does not say."""
        positions = getattr(self._text_config, "max_position_embeddings", None)
        rope = getattr(self._text_config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            # Beyond it the longest row of a pass would change the positions of all its rows.
            positions = rope.get("original_max_position_embeddings", positions)
        if positions is not None and self._text_config.model_type in _POSITIONS_AFTER_PADDING:
            positions -= self._text_config.pad_token_id + 1
        limits = [n for n in (positions, self.tokenizer.model_max_length) if n is not None and n < 10**9]
        return min(limits, default=None)

    @property
    def default_batch_tokens(self) -> int:
        """Token slots of a forward pass that keep this kind of device busy."""
        import torch

        if self.device.type != "cpu":
            return 16384
        # Measured on two cores: 512 to 1,024 slots stay in the processor's caches, 2,048 do not.
        return min(4096, 512 * torch.get_num_threads())

    def tokenize(
        self, texts: Iterable[str], *, chat_template: bool, max_length: int, truncate: bool
    ) -> tuple[list[np.ndarray], int]:
        """Token ids of each text, special tokens included, never padded.

        Args:
            texts: N texts.
            chat_template: whether each becomes the user turn of a chat, ready for the answer.
            max_length: where rows are cut if `truncate`.
            truncate: whether to cut; if not, rows come out as long as they are.

        Returns:
            N arrays of int32, and how many were cut.

        Raises:
            BackboneError: if a chat template is asked for and the tokenizer has none.
        """
        if chat_template:
            check_chat_template(self.tokenizer, self.files.name)
            texts = [chat_text(self.tokenizer, [text]) for text in texts]
        texts = list(texts)
        rows = self.encode(texts, special_tokens=not chat_template)
        too_long = [number for number, tokens in enumerate(rows) if len(tokens) > max_length] if truncate else []
        for number in too_long:
            # The tokenizer truncates by itself here, since it knows which special tokens must stay at the end.
            cut = self.tokenizer(
                texts[number], add_special_tokens=not chat_template, truncation=True, max_length=max_length
            )
            rows[number] = np.array(cut["input_ids"], dtype=np.int32)
        return rows, len(too_long)

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[np.ndarray]:
        """Token ids of each text as it stands: N arrays of int32.

        Args:
            texts: N texts.
            special_tokens: whether to add what the tokenizer puts around a text; a chat template writes it itself.
        """
        rows: list[np.ndarray] = []
        for begin in range(0, len(texts), _TOKENIZE_ROWS):
            encoded = self.tokenizer(
                list(texts[begin : begin + _TOKENIZE_ROWS]),
                add_special_tokens=special_tokens,
                padding=False,
                truncation=False,
                return_attention_mask=False,
            )
            rows += [np.array(tokens, dtype=np.int32) for tokens in encoded["input_ids"]]
        return rows

    def load(self) -> None:
        """Load the weights onto the device, and drop the blocks above the highest layer that is asked for; once.

        Raises:
            BackboneError: if they cannot be loaded.
        """
        import torch

        if self._model is not None:
            return
        model = self.read_model("AutoModel")
        self.parameters = sum(weights.numel() for weights in model.parameters())
        if self.layers != (self.depth,):
            parent, name, blocks = _find_blocks(model, self.depth)
            setattr(parent, name, torch.nn.ModuleList(blocks[: max(self.layers[-1], 1)]))
            for layer in self.layers:
                if layer == 0:
                    blocks[0].register_forward_pre_hook(self._catch_input, with_kwargs=True)
                elif layer < self.depth:
                    blocks[layer - 1].register_forward_hook(self._catch_output(layer))
        self._model = self.place(model)

    def release(self) -> None:
        """Forget the weights; `load` loads them again."""
        self._model = self._start = None

    def read_start(self, rows: Sequence[np.ndarray]) -> int:
        """Read what rows begin with, once; `hidden_states` goes on from there wherever its rows begin so.

        A start is kept only if it is worth it, and if the longest and the shortest row come out as they do alone:
        encoders, whose tokens see those that come later, and architectures without a cache of keys and values read
        every row as a whole.

        Args:
            rows: N arrays of token ids, all that will be run.

        Returns:
            How many tokens are read once for all; 0 if none are.
        """
        from transformers import DynamicCache

        self.load()
        self._start = None
        shared = common_prefix(rows)
        if not worth_reading_once(shared, rows):
            return 0
        ends = [max(rows, key=len), min(rows, key=len)]
        try:
            whole = self.hidden_states(ends)
            # Without the configuration a cache keeps every token, of layers with a sliding window too.
            past = DynamicCache()
            self._start = Start(rows[0][:shared], past, self._states([rows[0][:shared]], past))
            states = self.hidden_states(ends)
            if all(close(states[n, :, : len(row)], whole[n, :, : len(row)]) for n, row in enumerate(ends)):
                return shared
        except Exception:
            # A model that cannot go on from a cache says so in whatever way its code does, remote code too. Nothing is
            # hidden by it: the rows are read whole then, and what is wrong with more than the start fails there again.
            pass
        self._start = None
        return 0

    def read_model(self, factory: str) -> Any:
        """A model with this backbone's weights, the adapter merged into them; frozen, in eval mode, on the CPU.

        Args:
            factory: "AutoModel", or "AutoModelForCausalLM" for one with its LM head.

        Raises:
            BackboneError: if they cannot be loaded.
            AdapterError: if the adapter does not fit them.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        # An adapter names the modules of the causal LM it was tuned on, whose body AutoModel gives alone.
        loaded = factory if self.adapter is None else "AutoModelForCausalLM"
        options = {"dtype": self.compute_dtype, "attn_implementation": "sdpa"}
        try:
            model = self._from_pretrained(loaded, **options)
        except BackboneError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model = self._from_pretrained(loaded, **{**options, "attn_implementation": "eager"})
        if self.adapter is not None:
            model = merge_adapter(self.adapter, model, self.files.name)
            if factory == "AutoModel":
                model = model.base_model
        return model.eval().requires_grad_(False)

    def pad_token(self, model: Any) -> int:
        """A token id that may fill rows up."""
        pad = self.tokenizer.pad_token_id
        # A pad token added to the tokenizer alone has no embedding. Padding is masked, so that any other does.
        return pad if pad is not None and pad < model.get_input_embeddings().num_embeddings else 0

    def place(self, model: Any) -> Any:
        """Move a model onto the device.

        Raises:
            BackboneError: if it does not fit.
        """
        import torch

        try:
            return model.to(self.device)
        except torch.OutOfMemoryError:
            raise BackboneError(
                f"{self.files.name} does not fit the memory of {self.device}; try --compute-dtype bfloat16 "
                "or another --device"
            ) from None

    def hidden_states(self, rows: Sequence[np.ndarray]) -> Any:
        """Run the backbone on B rows.

        Args:
            rows: B arrays of token ids.

        Returns:
            (B, K, T, D) tensor in the compute dtype on the device, T the longest row, rows padded on the right; what
            stands in the padding is undefined. Counted as transformers' `hidden_states`: the last layer comes after
            the final norm.
        """
        import torch

        self.load()
        start = self._start
        if start is None or not start.begins(rows):
            return self._states(rows)
        rest = self._states([row[len(start) :] for row in rows], fork(start.past, len(rows)))
        return torch.cat([start.states.expand(len(rows), -1, -1, -1), rest], dim=2)

    def _states(self, rows: Sequence[np.ndarray], past: Any = None) -> Any:
        """(B, K, T, D) of B rows that go on from what is in a cache, which grows."""
        import torch

        try:
            with torch.inference_mode():
                self._caught[self.depth], _ = self.last_states(self._model, rows, past)
                return torch.stack([self._caught[layer] for layer in self.layers], dim=1)
        finally:
            self._caught.clear()  # also when memory ran out: what is kept here could not be freed

    def last_states(self, model: Any, rows: Sequence[np.ndarray], past: Any = None) -> tuple[Any, Any]:
        """Run B rows through a model without LM head.

        Args:
            model: of `read_model`, placed.
            rows: B arrays of token ids.
            past: a DynamicCache of what comes before each of them, which grows; None if nothing does.

        Returns:
            (B, T, D) hidden states after the final norm, undefined in the padding; (B, T) bool mask, True = real token.
        """
        import torch

        input_ids, mask = self._pad(rows, self.pad_token(model))
        arguments: dict[str, Any] = {"use_cache": False} if hasattr(self._text_config, "use_cache") else {}
        seen = mask
        if past is not None:
            arguments = {"use_cache": True, "past_key_values": past}
            seen = torch.cat([mask.new_ones(len(rows), past.get_seq_length()), mask], dim=1)
        output = model(input_ids=input_ids, attention_mask=seen, **arguments)
        return output.last_hidden_state, mask.bool()

    def _pad(self, rows: Sequence[np.ndarray], pad: int) -> tuple[Any, Any]:
        import torch

        T = max(len(row) for row in rows)
        input_ids = np.zeros((len(rows), T), dtype=np.int64)
        mask = np.zeros((len(rows), T), dtype=np.int64)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        # Right padding whatever the tokenizer prefers: positions then count from the first real token, as they do for
        # a row alone.
        input_ids[mask == 0] = pad
        return torch.from_numpy(input_ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def _from_pretrained(self, factory: str, **options: Any) -> Any:
        try:
            return getattr(self._transformers, factory).from_pretrained(
                str(self.files.folder), **self._options, **options
            )
        except Exception as error:
            # Broken files raise whatever their library likes: safetensors and tokenizers have plain Exceptions.
            reason = " ".join(str(error).split())[:300]
            raise BackboneError(f"transformers cannot load {self.files.name} ({factory}): {reason}") from error

    def _catch_input(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._caught[0] = args[0] if args else kwargs["hidden_states"]

    def _catch_output(self, layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._caught[layer] = output[0] if isinstance(output, tuple) else output

        return hook


def resolve_layers(layers: Sequence[int | float], depth: int) -> tuple[int, ...]:
    """Indices of the layers in ascending order: int as it is, float as a fraction of the depth, () the last.

    Raises:
        SettingsError: if a layer is deeper than the backbone.
    """
    indices = {round(layer * depth) if isinstance(layer, float) else layer for layer in layers} or {depth}
    if max(indices) > depth:
        raise SettingsError(f"layer {max(indices)} was asked for, and the backbone has {depth} (0 is the embeddings)")
    return tuple(sorted(indices))


def _find_blocks(model: Any, depth: int) -> tuple[Any, str, Any]:
    import torch

    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == depth
        and not re.search("vision|visual|audio", path)
    ]
    # Lists inside the blocks, such as experts, are none of ours.
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise BackboneError(
            f"{type(model).__name__} has {len(outer)} lists of {depth} blocks where one was expected; of this "
            "architecture only the last layer can be extracted (--layers last)"
        )
    parent, _, name = outer[0].rpartition(".")
    return model.get_submodule(parent), name, model.get_submodule(outer[0])
