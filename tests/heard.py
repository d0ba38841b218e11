"""A listener for extractions and tunings."""


class Heard:
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.begun: list[tuple[int, int]] = []
        self.rows = self.tokens = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, rows: int, tokens: int) -> None:
        self.begun.append((rows, tokens))

    def advance(self, rows: int, tokens: int) -> None:
        self.rows += rows
        self.tokens += tokens
