"""Processor threads: how many there may be, and how long they spin where they wait. Does not load PyTorch.

PyTorch cuts an operation into one part a thread and waits for the last. A waiting thread spins for about a millisecond,
which is the fastest where each has a core to itself. Where other work shares the cores, the threads that spin hold the
cores that the last part waits for, and generation by a small model is several times slower than on one thread. Where
they sleep at once, waking them costs as much as a small operation. So they spin for a few hundredths of it, and sleep.
"""

import math
import os
from pathlib import Path

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_SPINS = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""For GNU's OpenMP a number of looks; for LLVM's and Intel's milliseconds, of which 0 would be none."""
_COUNTING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def share_the_machine() -> None:
    """Have the threads of this process sleep where they wait for long, and be no more than the cores it may use.

    It works through the environment that PyTorch reads when it is loaded, so it is for programs and comes before the
    import: the command line calls it, the library does not. What the user has set stays; the number depends on the
    machine and the container alone, never on its load, so that a run on it gives the same bits each time.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ.update(_SPINS)
    quota = _cpu_quota()
    if quota is not None and not any(name in os.environ for name in _COUNTING):
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())


def usable_cores() -> int:
    """Cores that this process may use: those it may run on, or what its container's quota of time is worth, if less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The smallest quota, in cores, of this process's control group and those above it; None without one."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    quotas = []
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root  # version 1 has a tree for each controller
        folder = mount / path.lstrip("/")
        # In a container the path may be that of the host, and the container's own group is the root.
        for place in {folder, *folder.parents, mount} - set(mount.parents):
            quota = _quota_of(place)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{kind}_us").read_text().strip() for kind in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # none here, or "max"
        return None
