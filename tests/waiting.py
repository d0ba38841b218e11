"""Waiting for what another process does, but not for ever."""

import time
from collections.abc import Callable


def wait_until(happened: Callable[[], bool], seconds: float = 120) -> None:
    """Come back once it has happened; fail if it does not in that time, as when the process has died."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"it did not happen within {seconds} seconds"
        time.sleep(0.01)
