"""What made the hidden states of a cache. Caches of one identity can be mixed; any difference is refused by name."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from .dtypes import STORAGE_DTYPES
from .errors import CacheError


@dataclass(frozen=True)
class Identity:
    """All that a hidden state depends on besides the text."""

    model: str
    """Hub id, or the name of the local folder or GGUF file (never a path)."""
    revision: str | None
    """Commit of the hub repository; None for local files, which their hashes tell apart."""
    weights: str
    """sha256 over the backbone's weights files."""
    config: str
    """sha256 over its configuration files."""
    tokenizer: str
    """sha256 over its tokenizer files."""
    prompt: str
    """The template each row's text is made with."""
    chat_template: bool
    """Whether the prompt goes through the tokenizer's chat template as a user turn."""
    max_length: int
    """Longest row in tokens."""
    truncate: bool
    """Whether longer rows are cut to max_length (otherwise they are refused)."""
    layers: tuple[int, ...]
    """Which hidden states, counted as transformers does: 0 the embeddings, the number of blocks the last."""
    hidden_size: int
    """D, the width of a hidden state."""
    trust_remote_code: bool
    """Whether Python code of the model's repository ran."""
    dtype: str
    """Storage type: bfloat16, float16 or float32."""
    compute_dtype: str
    """Type the backbone ran in."""
    transformers: str
    """Version of transformers that ran it."""
    adapter: str | None = None
    """sha256 over the files of the adapter that was merged into the backbone; None without one."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Identity":
        """Read what `to_json` wrote.

        Raises:
            CacheError: if a field is missing or unknown.
            ValueError: if one is not of its type.
        """
        known = {field.name for field in fields(cls)}
        value = {"adapter": None, **value}  # caches from before there were adapters do not name it
        if set(value) != known:
            raise CacheError(
                "the cache's identity has other fields than this version of relish knows, "
                f"{sorted(set(value) ^ known)}; install the relish that wrote it"
            )
        for field in fields(cls):
            given, kind = value[field.name], field.type
            if field.name == "layers":
                good = bool(given) and all(type(layer) is int for layer in given)
            else:
                good = isinstance(given, kind) and (kind is not int or (type(given) is int and given > 0))  # pyright: ignore[reportArgumentType]
            if not good or (field.name == "dtype" and given not in STORAGE_DTYPES):
                raise ValueError(f"identity.{field.name} is {given!r}")
        return cls(**{**value, "layers": tuple(value["layers"])})

    def to_json(self) -> dict[str, Any]:
        """A plain dict for the manifest."""
        return {**asdict(self), "layers": list(self.layers)}

    def differences(self, other: "Identity") -> list[tuple[str, Any, Any]]:
        """(field, own value, other's value) of each difference that makes hidden states differ.

        The name of local files is not one: their hashes say whether they are the same.
        """
        found = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            renamed = field.name == "model" and self.revision is None and other.revision is None
            if mine != theirs and not renamed:
                found.append((field.name, mine, theirs))
        return found


def refuse_differences(have: Identity, want: Identity, *, what: str, advice: str) -> None:
    """Compare two identities.

    Args:
        have: the identity on disk.
        want: the identity asked for.
        what: whose identity `have` is, to start the sentence: "the cache my-cache".
        advice: what to do next, to end it.

    Raises:
        CacheError: naming each field that differs with both values.
    """
    different = have.differences(want)
    if different:
        raise CacheError(f"{what} was made with something else: {name_differences(different)}. {advice}")


def name_differences(differences: list[tuple[str, Any, Any]]) -> str:
    """Of each (field, value there, value here) a clause, long values shortened."""
    return "; ".join(f"{name} is {_short(there)} there and {_short(here)} here" for name, there, here in differences)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 90 else f"{text[:60]}…{text[-20:]}"
