"""speed.json: how long the LLM took for the rows of a cache. For cost tables only.

It holds wall times, so it is no part of what a cache promises: not sealed, not in the manifest, not looked at by
`verify`, not packed or merged; where it is missing or damaged, times are unknown, and nothing fails.
"""

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .fileio import read_whole
from .manifest import Manifest

SPEED = "speed.json"


@dataclass(frozen=True)
class Speed:
    """What one kind of device computed, summed over the extractions that ran to their end."""

    rows: int
    tokens: int
    seconds: float
    """From the first forward pass to the last commit."""


def add_speed(folder: Path, device: str, *, rows: int, tokens: int, seconds: float) -> None:
    """Add an extraction to a cache's speed.json; for the one who holds the folder's lock.

    Where it cannot be written, nothing is.
    """
    speeds = read_speeds(folder)
    before = speeds.get(device, Speed(0, 0, 0.0))
    speeds[device] = Speed(before.rows + rows, before.tokens + tokens, before.seconds + seconds)
    text = json.dumps({name: asdict(speed) for name, speed in speeds.items()}, indent=2)
    with suppress(OSError):
        (folder / SPEED).write_text(text + "\n", encoding="utf-8")


def read_speeds(folder: Path) -> dict[str, Speed]:
    """What is known of a cache, by the device's name; empty if nothing is."""
    try:
        speeds = {str(name): Speed(**speed) for name, speed in json.loads(read_whole(folder / SPEED)).items()}
        good = all(s.rows > 0 and s.tokens > 0 and 0 < s.seconds < math.inf for s in speeds.values())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return speeds if good else {}


def seconds_per_1000_rows(folder: Path, manifest: Manifest, split: str) -> float | None:
    """How long the LLM takes for 1,000 rows such as a split's, on the device that computed most; None if unknown.

    Seconds for each token, times the split's mean tokens: an extraction that went on after an interruption has seen
    the shortest rows alone, since the longest come first.
    """
    speeds = read_speeds(folder)
    if not speeds:
        return None
    most = max(speeds.values(), key=lambda speed: speed.tokens)
    record = manifest.splits[split]
    return 1000 * most.seconds / most.tokens * record.tokens / record.rows
