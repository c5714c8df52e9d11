"""Planted data and trainers on it, for the modules that test training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.parallel import Ranks
from steersman.sae import SAE, SAEConfig, Side
from steersman.train import ActivationStats, TrainConfig, Trainer, resolve
from steersman.train.run.initial import InitialSAE
from steersman.train.run.inputs import make_inputs
from steersman.train.store.statistics import StatsSums, row_norms

HOOK = "blocks.0.hook_resid_post"


TRAINABLE = {
    name: kind
    for name, kind in SAE.architectures.items()
    if kind.trainable and kind.__module__.startswith("steersman.")  # tests register others
}
"""The architectures of the package that are trained, by name."""


def dictionary(d_in: int = 16, atoms: int = 40) -> Tensor:
    """The planted unit vectors, [atoms, d_in]."""
    fixed = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(atoms, d_in, generator=fixed), dim=1)


def mixture(n: int, d_in: int = 16, atoms: int = 40, seed: int = 0) -> Tensor:
    """Sparse mixtures of planted unit vectors, [n, d_in]."""
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(n, atoms, generator=g).topk(3, dim=1).indices
    strength = torch.rand(n, 3, generator=g) + 0.5
    return (dictionary(d_in, atoms)[active] * strength[..., None]).sum(1) + 0.5


def stats_of(rows: Tensor) -> ActivationStats:
    sums = StatsSums(rows.shape[1])
    sums.add(rows, row_norms(rows))
    return sums.stats()


def trainer_of(config: TrainConfig, rows: Tensor | None = None, ranks: Ranks | None = None) -> Trainer:
    """A trainer that knows the statistics of `rows`; without any, those of 4000 rows of the mixture of 60,000. A
    crosscoder's first side has 6 columns."""
    n = 60_000 if rows is None else len(rows)
    rows = mixture(4000) if rows is None else rows
    d_in = rows.shape[1]
    cfg = SAEConfig(
        d_in=d_in, d_sae=config.d_sae, k=config.k, architecture=config.architecture, options=config.options,
        group_sizes=config.group_sizes,
        sides=tuple(Side(hook_name=HOOK, width=width) for width in (6, d_in - 6)) if crosses(config) else (),
    )  # fmt: skip
    parts = [stats_of(part) for part in (rows.split([6, d_in - 6], dim=1) if crosses(config) else [rows])]
    centred = rows.double() - stats_of(rows).mean
    inputs = make_inputs(cfg, config, parts, centred.T @ centred / len(rows) if config.whiten else None)
    initial = None if config.init is None else InitialSAE(config.init, cfg)
    return Trainer(config, resolve(config, d_in, n), parts, cfg, ranks, inputs, initial)


def crosses(config: TrainConfig) -> bool:
    """Whether the architecture reads hook points side by side."""
    return SAE.architectures[config.architecture].side_by_side


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without its speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def weight_bytes(run: Path) -> bytes:
    return (run / "sae_weights.safetensors").read_bytes()


def assert_equal_weights(a: SAE, b: SAE) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def assert_same_sae(a: Path, b: Path, tolerance: float = 2e-3, of_metrics: float = 1e-3) -> None:
    """The SAEs of two run folders are equal up to the order in which ranks add."""
    one, other = SAE.load(a), SAE.load(b)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=tolerance, atol=tolerance)
    assert one.feature_stats is not None
    assert other.feature_stats is not None
    assert one.feature_stats.n_tokens == other.feature_stats.n_tokens
    for name in ("max_act", "density", "mean_act"):
        torch.testing.assert_close(
            getattr(other.feature_stats, name), getattr(one.feature_stats, name), rtol=1e-2, atol=5e-3
        )
    heldout = [sae.cfg.metadata["heldout"] for sae in (one, other)]
    assert heldout[1] == pytest.approx(heldout[0], rel=of_metrics, abs=1e-6)
