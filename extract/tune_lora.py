"""The low-rank adapter that `relish tune` trains: peft's layers, with a forward pass of our own that takes less time.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

import warnings
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.errors import BackboneError
from .tune_settings import TuneSettings

_ADAPTER = "default"


def add_adapter(peft: Any, model: Any, settings: TuneSettings) -> Any:
    """Put a fresh LoRA adapter on all linear layers of a causal LM but its LM head; the model is changed in place.

    Raises:
        BackboneError: if peft does not take its architecture.
    """
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
    )
    with warnings.catch_warnings():
        # GPT-2's layers keep their weights the other way round: peft says so and does the right thing.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.simplefilter("ignore", FutureWarning)  # of what peft calls in transformers
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:  # of architectures that peft refuses, such as Mamba's
            why = str(error).partition(". ")[0]
            raise BackboneError(
                f"peft puts no LoRA adapter on an LLM of the kind {model.config.model_type} ({why}); tune another LLM"
            ) from None
    for module in adapted.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            # Not the module itself, which would then keep itself, and the LLM, in memory.
            module.forward = partial(lora_forward, weakref.proxy(module), dropout=settings.dropout)
    return adapted


def lora_forward(layer: Any, x: Tensor, *, dropout: float) -> Tensor:
    """W x + α/r · B A dropout(x), in bfloat16 where x is; float16 is too narrow for the gradients of A and B.

    peft computes the second term in float32, the dtype of the weights A and B, for which it casts every layer's input
    and output; autocast, too, leaves float32 to the weights alone.

    Args:
        layer: a LoraLayer of peft.
        x: (…, in) input.
        dropout: of the input of the low-rank products, while `layer` is in training mode.

    Returns:
        (…, out).
    """
    a, b = (part[_ADAPTER].weight for part in (layer.lora_A, layer.lora_B))
    kind = x.dtype if x.dtype == torch.bfloat16 else torch.float32
    read = drop(x, dropout) if layer.training else x
    low = nn.functional.linear(read.to(kind), a.to(kind))
    return layer.base_layer(x) + nn.functional.linear(low, (b * layer.scaling[_ADAPTER]).to(kind)).to(x.dtype)


def drop(x: Tensor, share: float) -> Tensor:
    """Dropout: each value is 0 with the probability `share`, to 16 bits, and divided by 1 − share otherwise."""
    if x.device.type != "cpu" or share == 0:
        return nn.functional.dropout(x, share)
    # On the CPU torch draws a mask's values one by one, which took a sixth of a step: here four come of one draw.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    kept = bits >= min(round(share * 2**16), 2**16 - 1) - 2**15
    return x * (kept.to(x.dtype) / (1 - share))
