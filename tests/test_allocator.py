"""The allocator's setting: large temporaries are reused."""

import subprocess
import sys

import pytest

CHILD = """
import resource, sys
from steersman.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
block = bytearray(48_000_000)
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(48_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_large_blocks_are_used_again() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", CHILD, how], capture_output=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    assert faults["keep"] < faults["leave"] / 10
