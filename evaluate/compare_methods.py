"""The methods of a comparison and the families they belong to."""

from dataclasses import dataclass

from ..train.settings import CLOSED_FORM, HEADS
from .summary import group_label

FAMILIES = {
    "autoregressive": "Autoregressive decoding",
    "inference": "Regression-aware inference",
    "heads": "Predictive heads, LLM frozen",
    "tuned": "LLM fine-tuned",
    "relish": "RELISH, LLM frozen",
    "hybrid": "RELISH, LLM fine-tuned (hybrid)",
}
"""Every family in the order of the tables, and its heading."""

CONTENDERS = {"relish": "RELISH, chosen", "hybrid": "RELISH hybrid, chosen"}
"""Families of which one method in each place is chosen and compared with all others, and what the chosen are called."""


@dataclass(frozen=True)
class Method:
    """One row of the tables: a head of one depth, or a way to read an answer, on one kind of hidden states."""

    head: str
    depth: int
    """0 where there is none."""
    adapter: str = ""
    """What the LLM was fine-tuned with; empty for the frozen LLM."""
    variant: str = ""
    """What the user calls the report it is from, where two would hold the same method."""

    @property
    def family(self) -> str:
        """A key of FAMILIES."""
        if self.head == "relish":
            return "hybrid" if self.adapter else "relish"
        if self.adapter:
            return "tuned"
        return {"greedy": "autoregressive", "rail": "inference"}.get(self.head.partition("-")[0], "heads")

    @property
    def has_seeds(self) -> bool:
        """Whether it is a head that is trained anew for each seed."""
        return self.head in HEADS and self.head not in CLOSED_FORM

    @property
    def states(self) -> str:
        """What the LLM was fine-tuned with, as `label` says it; empty for the frozen LLM."""
        return name_states(self.adapter, self.variant) if self.adapter else ""

    @property
    def label(self) -> str:
        """How tables and text call it; no two methods of a comparison have the same."""
        on = f" on {self.adapter}" if self.adapter else ""
        return group_label(self.head, self.depth) + on + (f" ({self.variant})" if self.variant else "")

    @property
    def order(self) -> tuple[int, str, str, str, int]:
        """Sorts methods as the tables show them."""
        return list(FAMILIES).index(self.family), self.adapter, self.variant, self.head, self.depth


def name_states(adapter: str, variant: str) -> str:
    """`lora (variant)`."""
    return f"{adapter} ({variant})" if variant else adapter
