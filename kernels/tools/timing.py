"""Timing on one device, and what kernels are timed on and compared with.

Shape letters: N tokens, L latents, D width.
"""

import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from steersman.files import write_json

__all__ = ["Clock", "Table", "Times", "activations", "bare_product", "encode_error", "launches", "unit_rows"]


class Times(NamedTuple):
    """Milliseconds of a call, and what it allocates."""

    ms: float
    """Median."""
    p20: float
    p80: float
    memory_mb: float | None
    """Largest allocation beyond what was there before; None where the device does not say."""


class Clock:
    """Medians on one device."""

    def __init__(self, device: torch.device, seconds: float):
        """`seconds` is spent on measuring each call, after a first one and at least five times."""
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        """Until the device has done all that is queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[], Any]) -> Times:
        """The times of a call."""
        run()
        self.wait()
        memory = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            self.wait()
            memory = (torch.cuda.max_memory_allocated(self.device) - before) / 1e6
        times: list[float] = []
        stop = time.perf_counter() + self.seconds
        while len(times) < 5 or (time.perf_counter() < stop and len(times) < 1000):
            times.append(self._once(run))
        cuts = statistics.quantiles(times, n=5)
        return Times(statistics.median(times), cuts[0], cuts[3], memory)

    def _once(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def copy_bandwidth(self) -> float:
        """Bytes a second of a large copy, read and written."""
        a = torch.empty(1 << 29, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        return 2 * a.nbytes / (self.time(lambda: b.copy_(a)).ms * 1e-3)


def launches(run: Callable[[], Any], device: torch.device, calls: int = 5) -> list[dict[str, Any]]:
    """The kernels of one call of `run` on a GPU, the longest first: how often each is launched, and its milliseconds
    in all. `run` has been called before."""
    # `acc_events` keeps a warning away; there is one cycle.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        for _ in range(calls):
            run()
        torch.cuda.synchronize(device)
    rows = [
        {"kernel": e.key[:120], "launches": e.count / calls, "ms": e.self_device_time_total / 1e3 / calls}
        for e in trace.key_averages()
        if e.self_device_time_total
    ]
    return sorted(rows, key=lambda row: -row["ms"])


class Table:
    """Rows of numbers in a JSON file that is whole after each. Those that the file has are kept if they were measured
    in the same circumstances, so that a table can be filled in several calls."""

    def __init__(self, path: Path, about: dict[str, Any], names: tuple[str, ...]):
        """`about` says in which circumstances; `names` are the columns that name a row."""
        self.path, self.about, self._names = path, about, names
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            before = json.loads(path.read_text())
            if {key: before.get(key) for key in about} == about:
                self.rows = before["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """Write the table with one more row, in which it replaces an earlier one of the same name."""
        self.rows = [old for old in self.rows if any(old[name] != row[name] for name in self._names)] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.about | {"date": datetime.date.today().isoformat(), "rows": self.rows}, indent=1)


def activations(N: int, D: int, device: torch.device) -> Tensor:
    """Sums of a few of 2 D directions with some noise [N, D], so that a code is used as it is on real activations."""
    generator = torch.Generator(device).manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(2 * D, D, generator=generator, device=device), dim=1)
    chosen = torch.randint(0, 2 * D, (N, 16), generator=generator, device=device)
    x = torch.nn.functional.embedding_bag(chosen, atoms, mode="sum")
    return x + 0.05 * torch.randn(N, D, generator=generator, device=device)


def unit_rows(L: int, D: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random unit rows [L, D], drawn on the device."""
    W = torch.empty(L, D, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(1)
    for rows in W.split(65536):
        drawn = torch.randn(rows.shape, generator=generator, device=device)
        rows.copy_(torch.nn.functional.normalize(drawn, dim=1))
    return W


def bare_product(x: Tensor, W: Tensor) -> None:
    """x W^T by the device's library, in blocks of latents where the result would be too large to hold."""
    for rows in W.split(max(1, int(10e9) // len(x))):
        torch.mm(x, rows.T)


def encode_error(x: Tensor, W: Tensor, values: Tensor, indices: Tensor) -> float:
    """The largest error of the values of a few tokens against fp64, relative; raises if a larger value was left out."""
    some = torch.linspace(0, len(x) - 1, min(len(x), 16), device=x.device).long()
    Z = torch.cat([x[some].double() @ rows.double().T for rows in W.split(16384)], dim=1)
    best = Z.topk(values.shape[1], dim=1).values
    scale = Z.abs().max()
    chosen = Z.gather(1, indices[some].long())
    error = float((values[some] - chosen.relu()).abs().max() / scale)
    missed = float((best[:, -1:] - chosen).max() / scale)
    if not (error < 1e-3 and missed < 1e-3 and values.isfinite().all()):
        raise ValueError(f"encode is wrong: values off by {error:.2g}, latents missed by {missed:.2g}")
    return error
