"""Matryoshka SAEs in training: the losses are those of the definition, and what is nested in one is an SAE."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stopping import stopped_before
from support.training import HOOK, assert_equal_weights, logged, mixture, trainer_of
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae import SAE, MatryoshkaSAE, MatryoshkaTopKSAE, SAEConfig
from steersman.sae.architectures.matryoshka import Groups, NestedSAE
from steersman.sae.training import AuxTerm, TrainingState
from steersman.train import ActivationStore, TrainConfig, Trainer, train_sae
from steersman.train.run.optim import FusedUpdater
from steersman.train.run.recipe import nested_widths

CONFIG = TrainConfig(
    d_sae=64, k=3, batch_size=128, seed=3, device="cpu", tokens=12_800, dead_after=128 * 4, architecture="matryoshka",
)  # fmt: skip
KINDS = ["matryoshka", "matryoshka_topk"]


def dense_losses(
    sae: NestedSAE, x: Tensor, target: Tensor, widths: tuple[int, ...], aux: AuxTerm | None
) -> dict[str, Tensor]:
    """The definition, with every prefix decoded from a dense code and every dead latent's activation in full."""
    Z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    with torch.no_grad():
        code = sae.encode_training(x)
        chosen = torch.zeros_like(Z).scatter_add_(1, code.order.indices.long(), code.active.float()) > 0
    f = torch.where(chosen, Z, torch.zeros_like(Z))
    residuals = [target - f[:, :m] @ sae.W_dec[:m] - sae.b_dec for m in widths]
    errors = [residual.square().sum() for residual in residuals]
    losses = {"squared_error": errors[-1], "nested": torch.stack(errors[:-1]).sum()}
    if aux is not None:
        centred = x - sae.b_dec.detach()
        dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
        dead[aux.candidates[~aux.alive]] = True
        Z_aux = (centred @ sae.W_enc + sae.b_enc).masked_fill(~dead, float("-inf"))
        top = Z_aux.topk(min(aux.k, int(dead.sum())), dim=1)
        f_aux = torch.zeros_like(Z).scatter(1, top.indices, top.values.relu())
        starts = (0, *widths[:-1])
        losses["aux"] = aux.coefficient * aux.weight * torch.stack([
            (f_aux[:, a:b] @ sae.W_dec[a:b] - r.detach()).square().sum() for a, b, r in zip(starts, widths, residuals)
        ]).sum()  # fmt: skip
    return losses


def aux_term(k: int) -> AuxTerm:
    """Dead latents in three of four groups, and candidates that are alive."""
    candidates = torch.tensor([40, 1, 9, 33, 12, 60, 50, 2])
    alive = torch.tensor([False, False, False, True, False, False, True, False])
    return AuxTerm(candidates, alive, torch.tensor(0.7), k, 0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("aux_k", "drawn"), [(0, 0), (2, 0), (8, 5)])
def test_losses_and_gradients_are_those_of_the_definition(kind: str, aux_k: int, drawn: int) -> None:
    cfg = SAEConfig(
        d_in=16,
        d_sae=64,
        k=4,
        architecture=kind,
        group_sizes=(4, 12, 16, 32),
        options={"drawn": drawn} if drawn else {},
    )
    sae, x = SAE(cfg, torch.Generator().manual_seed(1)), mixture(300)
    assert isinstance(sae, NestedSAE)
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * x.mean(dim=0))
        sae.b_enc.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    state = TrainingState(step=7, aux=aux_term(aux_k) if aux_k else None, config=CONFIG)
    widths = sae.prefixes(state)
    assert widths[-1] == 64
    assert len(widths) == (drawn or 4)
    target = (x + 0.1).requires_grad_()  # as where a skip connection has its part of it
    step, want = sae.training_step(x, target, state), dense_losses(sae, x, target, widths, state.aux)
    assert step.losses.keys() == want.keys()
    for name, loss in want.items():
        torch.testing.assert_close(step.losses[name], loss, rtol=1e-5, atol=1e-4)
    weights = torch.rand(len(want), generator=torch.Generator().manual_seed(0))  # each loss for itself
    found, expected = (
        torch.autograd.grad((torch.stack(list(losses.values())) * weights).sum(), [*sae.parameters(), target])
        for losses in (step.losses, want)
    )
    for mine, grad in zip(found, expected):
        torch.testing.assert_close(mine, grad, rtol=1e-4, atol=1e-3)


def test_without_a_count_candidates_are_multiplied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which is not asked how many candidates each group has."""
    g = torch.Generator().manual_seed(0)
    candidates, ends = torch.randperm(30, generator=g)[:9], torch.tensor([4, 4, 20, 30])
    code, rows, grad = (torch.randn(*shape, generator=g) for shape in ((5, 9), (9, 3), (4, 5, 3)))
    counted, whole = Groups(candidates, ends), Groups(candidates, ends)
    monkeypatch.setattr(whole, "_order", None)
    for one, other in zip(*(
        (groups.products(code, rows), groups.to_code(grad, rows), groups.to_rows(code, grad))
        for groups in (counted, whole)
    )):  # fmt: skip
        torch.testing.assert_close(one, other)


def train(config: TrainConfig, steps: int) -> tuple[Trainer, list[dict[str, float]]]:
    trainer, metrics, x = trainer_of(config), [], mixture(128 * steps, seed=1)
    trainer.fit_encoder_scale(x[:128])
    for part in x.split(128):
        trainer.step(part)
        metrics.append(trainer.read_metrics())
    return trainer, metrics


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "matryoshka_topk"},
        {"optimizer": "adam_touched", "options": {"drawn": 4}},
        {"architecture": "matryoshka_topk", "grad_accumulation": 2},
    ],
    ids=["topk", "drawn", "parts"],
)
def test_fused_steps_equal_the_ordinary_ones(options: dict[str, Any]) -> None:
    config = replace(CONFIG, **options)
    fused, metrics = train(replace(config, fused_update=True, grad_accumulation=1), 20)
    ordinary, want = train(config, 20)
    assert isinstance(fused.updater, FusedUpdater)
    assert not isinstance(ordinary.updater, FusedUpdater)
    assert want[-1]["aux"] > 0
    for mine, theirs in zip(metrics, want):
        assert mine == pytest.approx(theirs, rel=2e-3)
        assert mine["loss"] == pytest.approx(mine["fvu"] + mine["nested"] + 0.25 * mine["aux"], rel=1e-5)
    torch.testing.assert_close(fused.sae.W_dec, ordinary.sae.W_dec, rtol=0, atol=5e-3)


def test_it_resumes_to_the_same_bits_and_is_saved_as_saelens_knows_it(tmp_path: Path) -> None:
    """Prefixes are drawn by the seed and the step."""
    store = ActivationStore.from_tensors(mixture(3000).split(1000), tmp_path / "acts", HOOK, dtype="float32")
    config = replace(CONFIG, tokens=128 * 20, checkpoint_every=8, options={"drawn": 4}, matryoshka_widths=(8, 24, 64))
    whole = train_sae(store, config, tmp_path / "whole")
    with stopped_before(13):
        train_sae(store, config, tmp_path / "cut")
    assert_equal_weights(whole, train_sae(store, config, tmp_path / "cut"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")
    loaded = SAE.load(tmp_path / "whole")
    assert isinstance(loaded, MatryoshkaSAE)
    assert loaded.cfg.group_sizes == (8, 16, 40)
    assert float(loaded.threshold) > 0
    first, x = loaded.nested(2), mixture(200, seed=2)
    assert torch.equal(first.encode(x), loaded.encode(x)[:, :24])


def test_drawn_prefixes_follow_from_seed_and_step() -> None:
    cfg = SAEConfig(d_in=4, d_sae=4096, k=2, architecture="matryoshka", group_sizes=(1, 4095), options={"drawn": 10})
    sae = SAE(cfg)
    assert isinstance(sae, NestedSAE)
    drawn = [sae.prefixes(TrainingState(step=step, config=CONFIG)) for step in range(300)]
    assert len(set(drawn)) == 300
    assert drawn[5] == sae.prefixes(TrainingState(step=5, config=CONFIG))
    assert drawn[5] != sae.prefixes(TrainingState(step=5, config=replace(CONFIG, seed=4)))
    assert all(len(set(widths)) == 10 and widths[-1] == 4096 for widths in drawn)
    share = sum(m <= 4096 // 4 for widths in drawn for m in widths[:-1]) / (300 * 9)
    assert share == pytest.approx(0.5, abs=0.05)  # the root of a quarter


def hierarchy(n: int, seed: int) -> Tensor:
    """Eight parents, each with eight children that are active only with it: [n, 32]."""
    fixed, g = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(72, 32, generator=fixed), dim=1)
    parent = torch.rand(n, 8, generator=g).topk(2, dim=1).indices
    child = 8 + 8 * parent + torch.randint(0, 8, (n, 2), generator=g)
    strength = 1 + 0.2 * torch.rand(n, 4, generator=g)
    return (atoms[torch.cat([parent, child], dim=1)] * strength[..., None]).sum(dim=1)


def test_the_first_group_alone_is_a_better_sae_than_the_first_features_of_another() -> None:
    x, heldout, errors = hierarchy(256 * 120, 1), hierarchy(2000, 2), {}
    for kind in ("matryoshka", "batch_topk"):
        widths = (8, 72) if kind == "matryoshka" else ()
        config = TrainConfig(
            d_sae=72, k=4, batch_size=256, device="cpu", architecture=kind, matryoshka_widths=widths, tokens=len(x)
        )
        trainer = trainer_of(config, x)
        trainer.fit_encoder_scale(x[:256])
        for part in x.split(256):
            trainer.step(part)
        sae = trainer.finish()
        code, W_dec = sae.encode(heldout), sae.W_dec.detach()
        for width in (8, 72):
            rebuilt = code[:, :width] @ W_dec[:width] + sae.b_dec.detach()
            errors[kind, width] = float((heldout - rebuilt).square().sum() / (heldout - heldout.mean(0)).square().sum())
    assert errors["matryoshka", 8] < 0.75 * errors["batch_topk", 8]
    assert errors["matryoshka", 8] < 0.6
    assert errors["matryoshka", 72] < 0.3


def test_the_prefixes_of_a_run_are_checked_before_it_begins() -> None:
    assert nested_widths(65536) == (2048, 6144, 14336, 30720, 65536)
    assert nested_widths(8) == (1, 3, 8)
    assert replace(CONFIG, matryoshka_widths=(16, 64)).group_sizes == (16, 48)
    assert sum(CONFIG.group_sizes) == 64
    for widths in ((16, 32), (32, 16, 64), (16, 16, 64), (0, 64), (16, 64, 128)):
        with pytest.raises(SteersmanError, match="must rise and end at d_sae = 64, such as 2 6 14 30 64"):
            replace(CONFIG, matryoshka_widths=widths)
    with pytest.raises(SteersmanError, match="belong to architecture matryoshka or matryoshka_topk, not to 'topk'"):
        replace(CONFIG, architecture="topk", matryoshka_widths=(16, 64))
    with pytest.raises(SteersmanError, match="option drawn must be a number of prefixes"):
        trainer_of(replace(CONFIG, options={"drawn": 2.5}))


def test_a_graph_holds_steps_whose_prefixes_stay() -> None:
    topk = replace(CONFIG, architecture="matryoshka_topk")
    sae = trainer_of(topk).sae
    assert isinstance(sae, MatryoshkaTopKSAE)
    assert sae.host_free
    assert not trainer_of(replace(topk, options={"drawn": 3})).sae.host_free
    assert not trainer_of(CONFIG).sae.host_free
