"""Architectures from outside the package are trained, logged, resumed, saved and loaded as those within it are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import architectures  # noqa: F401 - registers them
from support.ranks import run_ranks
from support.sharded_jobs import train_with
from support.stopping import stopped_before
from support.training import HOOK, assert_equal_weights, assert_same_sae, logged, mixture, trainer_of, weight_bytes

from steersman.errors import SteersmanError
from steersman.sae import SAE
from steersman.sae.metrics import measure_reconstruction
from steersman.train import ActivationStore, TrainConfig, train_sae
from steersman.train.run.checkpoints import checkpoint_to_sae

CONFIG = TrainConfig(
    d_sae=64, architecture="p_annealed_relu", batch_size=128, tokens=128 * 60, seed=3, device="cpu",
    checkpoint_every=20, timeout_seconds=20, options={"sparsity": 0.05},
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "p_annealed_relu": {"options": {"sparsity": 0.05}},
    "gained_relu": {"options": {"sparsity": 0.05}},
    "jumprelu": {"target_l0": 3.0},
    "relu": {},
    "gated": {"target_l0": 4.0},
    "abs_topk": {"k": 4},
}
KINDS = ["p_annealed_relu", "gained_relu", "jumprelu", "relu", "gated"]
PENALTIES = {
    "p_annealed_relu": ("sparsity",),
    "gained_relu": ("sparsity",),
    "jumprelu": ("l0_penalty", "aux"),
    "relu": ("penalty", "aux"),
    "gated": ("penalty", "gate_error", "aux"),
}
"""What of the log is part of the loss beside the unexplained variance."""


def config_of(kind: str, **others: Any) -> TrainConfig:
    return replace(CONFIG, **({"architecture": kind, "options": {}} | SETTINGS[kind] | others))


MODULES = ("support.architectures",)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("data") / "acts"
    return ActivationStore.from_tensors(mixture(9000).split(1000), out, HOOK, dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_logs_its_losses_and_comes_back_from_disk(kind: str, store: ActivationStore, tmp_path: Path) -> None:
    config = config_of(kind, tokens=128 * 300)
    sae = train_sae(store, config, tmp_path / "run")
    lines = logged(tmp_path / "run")
    assert lines[-1]["fvu"] < 0.6 * lines[0]["fvu"]
    if "sparsity" in config.options:
        assert lines[-1]["l0"] < lines[0]["l0"], "the penalty makes the code sparse"
    for line in lines:
        penalty = sum(line[name] * (config.aux_coefficient if name == "aux" else 1) for name in PENALTIES[kind])
        assert line["loss"] == pytest.approx(line["fvu"] + penalty, rel=1e-5)
    assert type(sae) is SAE.architectures[kind]
    assert sae.cfg.options == config.options
    if config.target_l0 is not None:
        assert sae.cfg.metadata["heldout"]["l0"] == pytest.approx(config.target_l0, rel=0.05)
    x = mixture(500, seed=2)
    loaded = SAE.load(tmp_path / "run")
    assert_equal_weights(sae, loaded)
    assert torch.equal(sae.encode(x), loaded.encode(x))
    heldout = measure_reconstruction(loaded, [x])
    assert heldout.fvu == pytest.approx(sae.cfg.metadata["heldout"]["fvu"], abs=0.05)


def test_a_coefficient_changes_with_the_progress_of_the_run() -> None:
    """The same batch and weights, at the first and the last step."""
    x, penalties = mixture(128), []
    for step in (0, 59):
        trainer = trainer_of(CONFIG)
        trainer.n_steps_done = step
        trainer.recipe = replace(trainer.recipe, n_steps=60)
        trainer.step(x)
        penalties.append(trainer.read_metrics()["sparsity"])
    assert penalties[1] != pytest.approx(penalties[0], rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_to_the_same_bytes(kind: str, store: ActivationStore, tmp_path: Path) -> None:
    config = config_of(kind, ema=0.9)
    train_sae(store, config, tmp_path / "whole")
    with stopped_before(43):
        train_sae(store, config, tmp_path / "cut")
    train_sae(store, config, tmp_path / "cut")
    assert weight_bytes(tmp_path / "whole") == weight_bytes(tmp_path / "cut")
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")
    (tmp_path / "cut" / "cfg.json").unlink()
    averaged = checkpoint_to_sae(tmp_path / "cut")
    assert type(averaged) is SAE.architectures[kind]


@pytest.mark.parametrize("kind", ["gained_relu", "jumprelu", "abs_topk"])
@pytest.mark.parametrize("latent", [2, 1], ids=["shards", "replicas"])
def test_two_ranks_give_the_sae_of_one_process(kind: str, latent: int, store: ActivationStore, tmp_path: Path) -> None:
    config = config_of(kind, dead_after=512)
    train_sae(store, config, tmp_path / "one")
    sharded = replace(config, latent_shards=latent)
    args = (MODULES, str(store.path), sharded, str(tmp_path / "two"))
    found = run_ranks(2, train_with, *args, "preempt", 31, 1)
    assert [ended for ended, _, _ in found] == ["PreemptedError"] * 2, found
    assert [ended for ended, _, _ in run_ranks(2, train_with, *args)] == ["done"] * 2
    assert_same_sae(tmp_path / "one", tmp_path / "two", tolerance=1e-2, of_metrics=1e-2)
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-2, abs=1e-4)


def test_abs_topk_learns_features_of_both_signs(store: ActivationStore, tmp_path: Path) -> None:
    config = replace(CONFIG, architecture="abs_topk", k=3, options={}, tokens=128 * 300)
    sae = train_sae(store, config, tmp_path / "run")
    assert sae.cfg.metadata["heldout"]["fvu"] < 0.4
    assert sae.cfg.metadata["heldout"]["l0"] == pytest.approx(3)
    code = sae.encode_sparse(mixture(500, seed=2))
    assert bool((code.values < 0).any())
    assert bool((code.values > 0).any())


def test_what_it_cannot_do_is_refused_with_the_remedy(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="p_annealed_relu has a loss of its own: use fused_update=False"):
        replace(CONFIG, fused_update=True)
    with pytest.raises(SteersmanError, match="has no option 'sparsty'; it has sparsity"):
        train_sae(store, replace(CONFIG, options={"sparsty": 1.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SteersmanError, match="unknown architecture 'p_anealed_relu'.* 'p_annealed_relu'"):
        replace(CONFIG, architecture="p_anealed_relu")
