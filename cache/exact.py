"""Numbers in messages, where six digits could show two different ones as the same."""

from collections.abc import Sequence


def exact(value: float) -> str:
    """A number as short as it can be without being another one: 5, not 5.0, and 4.800000190734863."""
    short_one = f"{value:g}"
    return short_one if float(short_one) == value else repr(float(value))


def exact_range(bounds: Sequence[float]) -> str:
    """A label range: 1 to 5."""
    return f"{exact(bounds[0])} to {exact(bounds[1])}"
