"""A small training problem for the fused update, and the same done with autograd and a dense optimiser."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.kernels import AuxRows, UpdateRule, UpdateState, reference


class Problem(NamedTuple):
    """Weights to start from, and the batches of each step."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    x: Tensor
    """[steps, N, D]"""
    k: int


def problem(steps: int, N: int = 24, L: int = 20, D: int = 6, k: int = 3, seed: int = 0) -> Problem:
    """Sparse mixtures of planted directions, and random weights."""
    g = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(L, D, generator=g), dim=1)
    code = torch.rand(steps, N, L, generator=g)
    code = code * (code > 0.9)
    W_dec = F.normalize(torch.randn(L, D, generator=g), dim=1)
    b_enc, b_dec = torch.randn(L, generator=g) * 0.1, torch.randn(D, generator=g) * 0.1
    return Problem(W_dec.clone(), W_dec, b_enc, b_dec, code @ atoms + 0.2, k)


def state_of(p: Problem, rule: UpdateRule, operands: torch.dtype = torch.float32) -> UpdateState:
    return UpdateState.of(p.W_enc.clone(), p.W_dec.clone(), p.b_enc.clone(), p.b_dec.clone(), rule, operands)


def aux_of(L: int, D: int, step: int) -> AuxRows:
    """Gradients of some latents beside the code's; the last row counts for nothing."""
    g = torch.Generator().manual_seed(step)
    latents = torch.cat([torch.randperm(L, generator=g)[:2], torch.tensor([L])])
    dW_enc, dW_dec = torch.randn(3, D, generator=g) * 0.01, torch.randn(3, D, generator=g) * 0.01
    return AuxRows(latents, dW_enc, torch.randn(3, generator=g) * 0.01, dW_dec)


def train(
    implementation: Any,
    p: Problem,
    rule: UpdateRule,
    lr: float,
    operands: torch.dtype = torch.float32,
    *,
    signed: bool = False,
    device: str = "cpu",
    grouped: bool = False,
) -> tuple[UpdateState, list[float]]:
    """All steps of the problem with an implementation's `backward_update`: the state after, and each step's loss. With
    `grouped`, latents of the upper half learn half the residual, from rows of their own."""
    p = p._replace(**{name: t.to(device) for name, t in p._asdict().items() if isinstance(t, Tensor)})
    state, losses = state_of(p, rule, operands), []
    rate = torch.tensor([lr], device=device)
    for step, x in enumerate(p.x):
        values, indices = reference.topk_encode(x, state.enc_rows, state.b_enc, p.k, state.b_dec, signed=signed)
        residual, squares, dots = reference.decode_and_dots(
            values, indices, state.dec_rows, state.b_dec, x, 1.0, operands
        )
        losses.append(float(squares.sum() / x.numel()))
        rows = None
        if grouped:
            upper = indices >= len(p.W_enc) // 2
            dots = torch.where(upper, dots / 2, dots)
            residual, tokens = torch.cat([residual, residual / 2]), torch.arange(len(x), device=device)[:, None]
            rows = tokens + upper * len(x)
        aux = AuxRows(*(t.to(device) for t in aux_of(len(p.W_enc), x.shape[1], step))) if step % 3 == 1 else None
        implementation.backward_update(
            state, rule, rate, rate * 2, residual, -2 / x.numel(), (x - state.b_dec).to(operands), values,
            indices, dots, aux, centred_by_b_dec=True, signed=signed, rows=rows,
        )  # fmt: skip
    return state, losses


def train_by_autograd(
    p: Problem, optimizer: Any, lr: float, *, signed: bool = False
) -> tuple[list[Tensor], list[float]]:
    """The same with dense autograd through the reference; optimizer makes one from parameter groups."""
    tensors = [t.clone().requires_grad_() for t in (p.W_enc, p.W_dec, p.b_enc, p.b_dec)]
    W_enc, W_dec, b_enc, b_dec = tensors
    stepper = optimizer([{"params": [W_enc, W_dec], "lr": lr}, {"params": [b_enc, b_dec], "lr": 2 * lr}])
    losses = []
    for step, x in enumerate(p.x):
        Z = reference.pre_activations(x, W_enc, b_enc, b_dec)
        _, indices = reference.topk_encode(x, W_enc.detach(), b_enc.detach(), p.k, b_dec.detach(), signed=signed)
        chosen = torch.zeros_like(Z).scatter(1, indices.long(), 1.0)
        loss = (((Z if signed else Z.relu()) * chosen) @ W_dec + b_dec - x).square().mean()
        stepper.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        if step % 3 == 1:
            aux = aux_of(len(W_enc), x.shape[1], step)
            there = aux.latents < len(W_enc)
            for parameter, extra in ((W_enc, aux.dW_enc), (b_enc, aux.db_enc), (W_dec, aux.dW_dec)):
                assert parameter.grad is not None
                parameter.grad.index_add_(0, aux.latents[there], extra[there])
        assert W_dec.grad is not None
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
        stepper.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    return [t.detach() for t in tensors], losses


class Signum(torch.optim.Optimizer):
    """Dense Signum with the textbook's two lines."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                m = self.state[parameter].setdefault("m", torch.zeros_like(parameter))
                m.mul_(0.9).add_(0.1 * parameter.grad)
                parameter -= group["lr"] * m.sign()
