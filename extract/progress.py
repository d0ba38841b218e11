"""Who hears of an extraction or a tuning."""

from typing import Protocol


class Progress(Protocol):
    """What `extract_cache` and `tune_adapter` report to while they work."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def begin(self, rows: int, tokens: int) -> None:
        """Passes begin; so much is to be read, all epochs and validations of a tuning together."""

    def advance(self, rows: int, tokens: int) -> None:
        """So much more is read."""
