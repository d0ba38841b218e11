"""What is in a cache and what made it, as data; the command shows it on one screen."""

from collections.abc import Sequence
from typing import Any

from .archive import Archive
from .manifest import Manifest, ShardRecord, SplitRecord


def cache_info(manifest: Manifest) -> dict[str, Any]:
    """Figures of a cache: identity, label range, and for each split rows, tokens, bytes and padding overhead."""
    splits = {name: _split_info(split) for name, split in manifest.splits.items()}
    return {
        "identity": manifest.identity.to_json(),
        "task": manifest.task,
        "label_range": list(manifest.label_range),
        "made_by": manifest.made_by,
        "splits": splits,
        "bytes": sum(split["bytes"] for split in splits.values()),
    }


def packed_info(archive: Archive) -> dict[str, Any]:
    """The same of the cache that was packed, and how many shards of it are, in how many bytes."""
    planned = sum(len(split.shards) for split in archive.manifest.splits.values())
    packed = {"shards": planned - len(archive.missing), "planned": planned, "bytes": archive.bytes}
    return {**cache_info(archive.manifest), "packed": packed}


def padding_overhead(shards: Sequence[ShardRecord]) -> float:
    """Padded ÷ real token slots; 1 means no padding."""
    tokens = sum(shard.tokens for shard in shards)
    return sum(shard.rows * shard.T for shard in shards) / tokens if tokens else 1.0


def _split_info(split: SplitRecord) -> dict[str, Any]:
    return {
        "rows": split.rows,
        "tokens": split.tokens,
        "longest": split.longest,
        "truncated": split.truncated,
        "skipped": [{"row": row.row, "id": row.id, "why": row.why} for row in split.skipped],
        "shards": len(split.done),
        "planned": split.planned,
        "complete": split.complete,
        "bytes": sum(shard.bytes for shard in split.shards),
        "padding_overhead": round(padding_overhead(split.shards), 4),
    }
