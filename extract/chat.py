"""Chat templates: turns as the text that a tokenizer makes of them."""

from collections.abc import Sequence
from typing import Any

from ..cache.errors import BackboneError

_LLAMA3_DATE = "26 Jul 2024"  # what its template writes where no clock is


def check_chat_template(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that has no chat template, or one that changes from day to day.

    Args:
        tokenizer: of transformers.
        name: what messages call the LLM.

    Raises:
        BackboneError: saying which of the two.
    """
    if not tokenizer.chat_template:
        raise BackboneError(f"the tokenizer of {name} has no chat template; leave --chat-template out")
    if "strftime_now" in tokenizer.chat_template and "date_string" not in tokenizer.chat_template:
        raise BackboneError(
            f"the chat template of {name} writes today's date into every prompt, so hidden states "
            "would change from day to day; leave --chat-template out and write the turn into --prompt"
        )


def chat_text(tokenizer: Any, turns: Sequence[str], *, answered: bool = False) -> str:
    """The text of a chat.

    Args:
        tokenizer: of transformers, with a chat template.
        turns: the user's and the assistant's turns, in turn, beginning with the user.
        answered: whether the last turn is the assistant's; if not, the text is ready for the answer.
    """
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=not answered, tokenize=False, date_string=_LLAMA3_DATE
    )


def chat_border(tokenizer: Any) -> tuple[str, str]:
    """What the template puts before an assistant's answer, after the text that is ready for it, and what after it.

    The first is empty for most templates, and an empty thought for LLMs that think first.
    """
    question, answer = "0-question", "0-answer"
    ready, whole = chat_text(tokenizer, [question]), chat_text(tokenizer, [question, answer], answered=True)
    before, _, after = whole.rpartition(answer)
    return before.removeprefix(ready) if before.startswith(ready) else "", after
