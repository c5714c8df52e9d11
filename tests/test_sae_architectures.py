"""What an architecture owns: its name, its rules, its training step; and that one from outside the package is like any
other."""

from typing import ClassVar

import pytest
import torch
from support.helpers import make_sae
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import sparse_decode, topk_encode, with_gradient
from steersman.kernels.torch_ops import batch_topk_encode
from steersman.sae import SAE, AuxTerm, BatchTopKSAE, ReLUSAE, SAEConfig, Step, TopKSAE, TrainingState


def seeded(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class SparseReLU(ReLUSAE):
    """A ReLU SAE from outside: an L1 penalty that grows, and how many latents are active, logged."""

    name = "sparse_relu"
    trainable = True
    defaults: ClassVar = {"l1": 0.1}

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        step = super().training_step(x, target, state)
        penalty = self.latents.total(step.code.values.sum())
        losses = step.losses | {"l1": self.options["l1"] * state.progress * penalty}
        return Step(step.code, losses, {"active": step.code.active.sum()})


# The training step


def todays_formula(sae: SAE, x: Tensor, aux: AuxTerm | None) -> Tensor:
    """The loss as the trainer wrote it before architectures owned theirs."""
    rows, bias = sae.W_enc.T, sae.b_dec
    if sae.name == "topk":
        values, order = topk_encode(x, rows, sae.b_enc, sae.cfg.k, bias)
    else:
        with torch.no_grad():
            values, indices, _ = batch_topk_encode(x, rows, sae.b_enc, sae.cfg.k, bias)
        values, order = with_gradient(x, rows, sae.b_enc, bias, values, indices)
    residual = x - sparse_decode(values, order, sae.W_dec, sae.b_dec)
    loss = residual.square().sum()
    if aux is not None:
        Z = torch.addmm(sae.b_enc[aux.candidates], x - bias.detach(), sae.W_enc.T[aux.candidates].T)
        Z = Z.masked_fill(aux.alive, float("-inf"))
        best, chosen = Z.topk(min(aux.k, len(aux.candidates)), dim=1, sorted=False)
        code = torch.zeros_like(Z).scatter(1, chosen, best.relu())
        rebuilt = code @ sae.W_dec[aux.candidates]
        loss = loss + aux.coefficient * (aux.weight * (rebuilt - residual.detach()).square().sum())
    return loss


@pytest.mark.parametrize("with_aux", [False, True])
@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_the_step_has_the_bits_that_it_always_had(name: str, with_aux: bool) -> None:
    x = seeded(50, 8)
    alive = torch.tensor([False, False, True, False, True, False])
    term = AuxTerm(torch.tensor([3, 60, 7, 11, 12, 40]), alive, torch.tensor(0.7), 2, 0.3)
    aux = term if with_aux else None
    was, now = make_sae(name), make_sae(name)
    want = todays_formula(was, x, aux)
    step = now.training_step(x, x, TrainingState(aux=aux))
    (want / x.numel()).backward()
    (step.loss / x.numel()).backward()
    assert torch.equal(step.loss, want)
    for mine, before in zip(now.parameters(), was.parameters(), strict=True):
        assert mine.grad is not None
        assert before.grad is not None
        assert torch.equal(mine.grad, before.grad)
    assert list(step.losses) == ["squared_error", "aux"][: 1 + with_aux]
    if with_aux:
        torch.testing.assert_close(step.losses["aux"], 0.3 * step.logged["aux"])


def test_the_threshold_follows_the_smallest_value_that_was_selected() -> None:
    sae = SAE(SAEConfig(d_in=8, d_sae=64, k=5, architecture="batch_topk"), torch.Generator().manual_seed(0))
    assert isinstance(sae, BatchTopKSAE)
    first = sae.training_step(seeded(50, 8), seeded(50, 8), TrainingState())
    sae.after_step(first, TrainingState())
    assert first.code.min_selected is not None
    assert torch.equal(sae.threshold, first.code.min_selected)
    second = sae.training_step(seeded(50, 8, seed=2), seeded(50, 8, seed=2), TrainingState())
    sae.after_step(second, TrainingState())
    assert second.code.min_selected is not None
    torch.testing.assert_close(sae.threshold, 0.99 * first.code.min_selected + 0.01 * second.code.min_selected)


def test_progress_goes_from_nothing_to_all() -> None:
    assert [TrainingState(step=step, n_steps=5).progress for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert TrainingState().progress == 0


# An architecture from outside


def test_a_loss_from_outside_has_its_gradients() -> None:
    cfg = SAEConfig(d_in=8, d_sae=32, architecture="sparse_relu", options={"l1": 0.5})
    sae = SAE(cfg, torch.Generator().manual_seed(0))
    assert isinstance(sae, SparseReLU)
    x = seeded(20, 8)
    step = sae.training_step(x, x, TrainingState(step=1, n_steps=3))
    step.loss.backward()
    got = [p.grad for p in sae.parameters()]
    for p in sae.parameters():
        p.grad = None
    f = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    want = {"squared_error": (x - f @ sae.W_dec - sae.b_dec).square().sum(), "l1": 0.25 * f.sum()}
    torch.testing.assert_close(step.losses, want)
    assert int(step.logged["active"]) == int((f > 0).sum())
    sum(want.values(), torch.zeros(())).backward()
    for mine, p in zip(got, sae.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-4)


def test_options_are_those_that_the_architecture_has() -> None:
    assert SAE(SAEConfig(d_in=8, d_sae=32, architecture="sparse_relu")).options == {"l1": 0.1}
    with pytest.raises(SteersmanError, match="architecture 'sparse_relu' has no option 'l2'; it has l1"):
        SAEConfig(d_in=8, d_sae=32, architecture="sparse_relu", options={"l2": 1.0})
    with pytest.raises(SteersmanError, match="'topk' has no option 'l1'"):
        SAEConfig(d_in=8, d_sae=32, k=2, options={"l1": 1.0})


def test_an_unknown_name_lists_those_that_are_known() -> None:
    with pytest.raises(SteersmanError, match="unknown architecture 'batchtopk'; have .*nearest is 'batch_topk'"):
        SAEConfig(d_in=8, d_sae=32, k=2, architecture="batchtopk")


def test_a_name_belongs_to_one_class() -> None:
    with pytest.raises(SteersmanError, match="architecture 'topk' is already that of .*TopKSAE; choose another"):
        type("Mine", (TopKSAE,), {"name": "topk"})
    before = dict(SAE.architectures)
    unnamed = type("Unnamed", (TopKSAE,), {})
    assert dict(SAE.architectures) == before
    assert type(unnamed(SAEConfig(d_in=4, d_sae=8, k=2))) is unnamed


def test_what_cannot_be_trained_says_what_can() -> None:
    for name in ("jumprelu", "gated", "matryoshka", "groupmax"):
        sae = make_sae(name)
        assert not sae.trainable
        with pytest.raises(SteersmanError, match=f"training of '{name}' SAEs is not supported; use one of .*topk"):
            sae.training_step(seeded(2, 8), seeded(2, 8), TrainingState())


# The old name


def test_the_old_name_of_the_architecture_still_works() -> None:
    with pytest.warns(DeprecationWarning, match=r"SAEConfig\(activation=...\) is architecture now"):
        cfg = SAEConfig(d_in=8, d_sae=32, activation="relu")  # pyright: ignore[reportCallIssue]
    assert cfg.architecture == "relu"
    with pytest.warns(DeprecationWarning, match="SAEConfig.activation is architecture now"):
        assert cfg.activation == "relu"  # pyright: ignore[reportAttributeAccessIssue]
    assert SAEConfig.from_record(cfg.record()) == cfg
    assert cfg.record()["activation"] == "relu"
