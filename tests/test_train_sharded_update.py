"""The update rules where ranks share the latents: each moves its own, as one process moves all of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.sharded_jobs import train, train_on_every_mesh, trained
from support.training import assert_equal_weights, mixture
from support.updates import aux_of, problem, state_of
from torch import Tensor

from steersman.kernels import AuxRows, UpdateRule, UpdateState, reference, triton_update, update
from steersman.kernels.update import RuleName, StateDtype
from steersman.train import ActivationStore, TrainConfig, train_sae

RULES: list[tuple[RuleName, StateDtype]] = [
    ("adam", "float32"),
    ("adam_touched", "int8"),
    ("adam", "bfloat16"),
    ("signum", "int8"),
]


def part_of(state: UpdateState, rule: UpdateRule, start: int, stop: int) -> UpdateState:
    """A copy of the state's latents start..stop, as a rank holds them."""
    W_enc, W_dec, b_enc = (tensor[start:stop].clone() for tensor in (state.W_enc, state.W_dec, state.b_enc))
    part = UpdateState.of(W_enc, W_dec, b_enc, state.b_dec.clone(), rule, state.enc_rows.dtype, start)
    for name, tensor in part.state().items():
        whole = state.state()[name]
        tensor.copy_(whole[start:stop] if len(whole) == len(state.W_enc) else whole)
    return part


def code_of(values: Tensor, indices: Tensor, dots: Tensor, start: int, stop: int) -> list[Tensor]:
    """What of a code [N, K] belongs to the latents start..stop, on their rank."""
    here = (indices >= start) & (indices < stop)
    return [
        torch.where(here, tensor, torch.zeros_like(tensor)) for tensor in (values, (indices - start).clamp_min(0), dots)
    ]


@pytest.mark.parametrize(
    ("implementation", "name", "state_dtype"),
    [(update, *rule) for rule in RULES] + [(triton_update, *rule) for rule in RULES[1:3]],
)
def test_the_update_of_some_latents_is_their_part_of_the_whole(
    implementation: Any, name: RuleName, state_dtype: StateDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, after two steps with AuxK: weights, moments and random bits; and b_dec from the joined parts."""
    if torch.cuda.is_available() and implementation is triton_update:
        pytest.skip("the interpreter's part: tensors on the CPU")
    L, first = 32, 16
    monkeypatch.setattr(update, "PART", 16)
    monkeypatch.setattr(triton_update, "PART", 16)
    monkeypatch.setattr(triton_update, "STRETCH", 8)
    p, rule = problem(2, N=12, L=L, D=6), UpdateRule(name=name, state_dtype=state_dtype)
    whole, rate = state_of(p, rule, torch.bfloat16), torch.full((1,), 0.01)
    ranks = [part_of(whole, rule, 0, first), part_of(whole, rule, first, L)]
    for step, x in enumerate(p.x):
        values, indices = reference.topk_encode(x, whole.enc_rows, whole.b_enc, p.k, whole.b_dec)
        residual, _, dots = reference.decode_and_dots(
            values, indices, whole.dec_rows, whole.b_dec, x, 1.0, torch.bfloat16
        )
        centred, aux, scale, parts = (x - whole.b_dec).bfloat16(), aux_of(L, 6, step), -2 / x.numel(), []
        for state, bounds in zip(ranks, ((0, first), (first, L))):
            local = torch.where(
                (aux.latents >= bounds[0]) & (aux.latents < bounds[1]), aux.latents - bounds[0], bounds[1] - bounds[0]
            )
            parts.append(torch.zeros(1, 6))
            code = code_of(values, indices, dots, *bounds)
            implementation.backward_update(
                state, rule, rate, rate, residual, scale, centred, *code, AuxRows(local, *aux[1:]),
                centred_by_b_dec=True, parts=parts[-1],
            )  # fmt: skip
        for state in ranks:
            implementation.move_b_dec(state, rule, rate, rate, residual, scale, torch.cat(parts))
        implementation.backward_update(
            whole, rule, rate, rate, residual, scale, centred, values, indices, dots, aux, centred_by_b_dec=True
        )
    for state, bounds in zip(ranks, ((0, first), (first, L))):
        want = part_of(whole, rule, *bounds)
        assert torch.equal(state.b_dec, want.b_dec)
        for a, b in zip([*state.flatten()[0], *state.state().values()], [*want.flatten()[0], *want.state().values()]):
            assert torch.equal(a, b)


ONE = TrainConfig(
    d_sae=1024, k=1, batch_size=64, tokens=64 * 400, seed=3, device="cpu", fused_update=True, aux_coefficient=0.0,
    max_norm_ratio=None,
)  # fmt: skip
MANY = replace(ONE, d_sae=128, k=2, aux_coefficient=0.25, dead_after=128, k_aux=16)
CONFIGS = {
    # With one active latent, a reconstruction is that of one rank: nothing is added in another order.
    "bits: adam": ONE,
    "bits: int8": replace(ONE, state_dtype="int8", optimizer="adam_touched"),
    "bits: signum": replace(ONE, state_dtype="bfloat16", optimizer="signum", ema=0.9),
    "fused": MANY,
    "fused batch_topk": replace(MANY, architecture="batch_topk"),
    "fused matryoshka": replace(MANY, architecture="matryoshka_topk"),
    "fused int8": replace(MANY, state_dtype="int8"),
    "ordinary signum": replace(MANY, fused_update=False, optimizer="signum_touched", state_dtype="bfloat16"),
}
STEPS = 6


def test_two_ranks_train_as_one_process() -> None:
    """With one active latent a token, every bit; else up to the order in which the reconstruction is added."""
    rows = mixture(640)
    parts = run_ranks(2, train_on_every_mesh, CONFIGS, rows, STEPS, 2)
    for name, config in CONFIGS.items():
        want = trained(config, rows, STEPS)
        assert any(line["aux"] > 0 for line in want["metrics"]) == bool(config.aux_coefficient), name
        for part in parts:
            for mine, one in zip(part[name]["metrics"], want["metrics"]):
                assert mine == pytest.approx(one, rel=1e-5 if config.optimizer == "adam" else 1e-3, abs=1e-7), name
        for key, expected in want["state"].items():
            found = [part[name]["state"][key] for part in parts]
            dim = next((dim for dim, n in enumerate(expected.shape) if n == config.d_sae), None)
            if dim is None:
                assert torch.equal(found[0], found[1]), (name, key)
            joined = found[0] if dim is None else torch.cat(found, dim=dim)
            if name.startswith("bits"):
                assert torch.equal(joined, expected), (name, key)
            elif config.state_dtype == "float32":
                torch.testing.assert_close(
                    joined, expected, rtol=1e-3, atol=1e-4, msg=lambda m, at=(name, key): f"{at} {m}"
                )


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """From one process to two and four ranks and back, bit for bit: one active latent a token, state of few bits."""
    store = str(tmp_path / "acts")
    rows = ActivationStore.from_tensors(mixture(4000).split(1000), store, "blocks.0.hook_resid_post", dtype="float32")
    config = replace(ONE, d_sae=2048, tokens=64 * 30, checkpoint_every=10, timeout_seconds=20, state_dtype="int8")
    whole = train_sae(rows, config, tmp_path / "whole")
    for n, step in ((1, 7), (2, 14), (4, 21)):
        found = run_ranks(n, train, store, config, str(tmp_path / "run"), "preempt", step, n - 1)
        assert [ended for ended, _, _ in found] == ["PreemptedError"] * n, found
    assert_equal_weights(whole, train_sae(rows, config, tmp_path / "run"))
