"""How many CPU cores there are to train on."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """CPU cores that this process may use: those it is bound to, fewer where its container has a quota of their time.

    Of quotas torch, as `os.cpu_count`, knows nothing: on a machine of 64 cores it starts 64 threads to share two.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, _quota() or bound)


def _quota() -> int | None:
    """Cores' worth of time that a container may use, rounded up (docker's --cpus, a pod's limit); None without."""
    try:
        if (both := CGROUP / "cpu.max").exists():
            quota, period = map(int, both.read_text().split())
        else:
            quota, period = (int((CGROUP / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):  # no container, no Linux; "max" is no number
        return None
    return -(-quota // period) if quota > 0 else None  # -1: none
