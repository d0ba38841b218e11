import platform
import subprocess
import sys

import pytest

from relish.extract import heap

SCRIPT = """
import resource
import torch
from relish.extract.heap import keep_freed_memory

def faults():
    # Several at a time, freed in another order, as in a forward pass; larger than what malloc learns to keep by itself.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [torch.ones(10 * 2**20) for _ in range(4)]
        del blocks[1], blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if KEEP:
    keep_freed_memory()
faults()
print(faults())
"""


def faults(keep: bool) -> int:
    code = SCRIPT.replace("KEEP", str(keep))
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    assert faults(keep=True) < 0.05 * faults(keep=False)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: pytest.fail("it was asked"))
    heap.keep_freed_memory()
