"""Time and memory of trainers' steps on the rows of a store: ours beside other libraries'.

Times are of steps in turn, in one process, on the same batches, which are in memory: forward, backward, optimiser,
counters. Ratios are medians over the rounds. Memory is what five steps add to a process of each trainer at its peak,
over what it holds with the data and every import done; it is known on Linux alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman import TrainConfig
from steersman.sae import SAEConfig
from steersman.train import ActivationStats, ActivationStore, HookView, Trainer, resolve
from study.peers import PeerConfig, peer_trainer, rows_again

OURS = "steersman"
NO_AUXK = "steersman without AuxK"
PRODUCT = "the encoder's product alone"
"""What every trainer that computes all pre-activations does at least."""
UNTIMED = 14
"""Steps before those that are timed: until features may count as dead, so that AuxK is part of a step."""
REFERENCES = Path("/proc/self/clear_refs")

Step = Callable[[Tensor], object]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is trained on, and how."""

    store: Path
    """Folder of the store."""
    hook: str
    """Hook point."""
    config: TrainConfig
    """Of our SAE, whose batches all take."""

    def source(self) -> HookView:
        """The rows."""
        return HookView(ActivationStore.open(self.store), self.hook)

    @property
    def batch_size(self) -> int:
        """Rows a step."""
        source = self.source()
        return resolve(self.config, source.d_in, source.n_batches(1)).batch_size

    def batches(self, n: int) -> Iterator[Tensor]:
        """The first n batches of the run [N, D]."""
        yield from islice(rows_again(self.source(), self.batch_size, self.config.seed), n)


def our_step(steps: Steps) -> Step:
    """A step of our trainer, as `train_sae` takes it."""
    source, config = steps.source(), steps.config
    x = torch.cat(list(steps.batches(4)))
    norms = x.norm(dim=1)
    stats = ActivationStats(
        mean=x.mean(dim=0), mean_norm=float(norms.mean()), median_norm=float(norms.median()),
        mean_squared_norm=float(norms.square().mean()), n_rows=len(x),
    )  # fmt: skip
    cfg = SAEConfig(
        d_in=source.d_in, d_sae=config.d_sae, k=config.k, architecture=config.architecture,
        group_sizes=config.group_sizes,
    )  # fmt: skip
    trainer = Trainer(config, resolve(config, source.d_in, source.n_batches(1)), stats, cfg)
    trainer.fit_encoder_scale(x[: steps.batch_size])
    return trainer.step


def product(steps: Steps) -> Step:
    """The product [N, L] of a batch with an encoder."""
    W = torch.randn(steps.config.d_sae, steps.source().d_in)
    Z = torch.empty(steps.batch_size, len(W))
    return lambda x: torch.mm(x, W.T, out=Z)


def compared(steps: Steps, peers: Sequence[PeerConfig], rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of each trainer, of ours without AuxK and of the bare product; rows a second; and how many
    times ours each takes."""
    without = replace(steps, config=replace(steps.config, aux_coefficient=0.0))
    takers: dict[str, Step] = {OURS: our_step(steps), NO_AUXK: our_step(without)}
    takers |= {one.library: peer_trainer(one, steps.source()).step for one in peers}
    takers[PRODUCT] = product(steps)
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    times: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in clocks} for name in takers}
    for number, x in enumerate(steps.batches(UNTIMED + rounds)):
        for name, step in takers.items():
            start = [now() for now in clocks.values()]
            step(x)
            if number >= UNTIMED:
                for (clock, now), then in zip(clocks.items(), start):
                    times[name][clock].append(now() - then)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": rounds, "batch_size": steps.batch_size}
    for clock in clocks:
        medians = {name: statistics.median(times[name][clock]) for name in takers}
        found[clock] = {
            name: {
                "ms": 1e3 * median,
                "rows_per_second": steps.batch_size / median,
                "ratio": statistics.median(t / ours for t, ours in zip(times[name][clock], times[OURS][clock])),
            }
            for name, median in medians.items()
        }
    return found


def peak_mb(steps: Steps, peer: PeerConfig | None) -> float | None:
    """MB that steps of a trainer, ours (None) or another library's, add to a process; None where it is not known."""
    if not REFERENCES.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_peak_mb, steps, peer, torch.get_num_threads()).result()


def _peak_mb(steps: Steps, peer: PeerConfig | None, threads: int) -> float:
    torch.set_num_threads(threads)
    batches = list(steps.batches(5))

    def begun(d_sae: int) -> Step:
        if peer is None:
            return our_step(replace(steps, config=replace(steps.config, d_sae=d_sae)))
        return peer_trainer(replace(peer, d_sae=d_sae), steps.source()).step

    begun(max(64, 2 * steps.config.k))(batches[0][:256])  # imports and threads are paid for
    REFERENCES.write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    step = begun(steps.config.d_sae)
    for x in batches:
        step(x)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """MB that the process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
