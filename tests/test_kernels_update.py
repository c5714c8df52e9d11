"""The definition of the fused update: equal to autograd and the optimisers of PyTorch, and what its options mean."""

from functools import partial

import pytest
import torch
from support.updates import Signum, aux_of, problem, state_of, train, train_by_autograd
from torch import Tensor

from steersman.kernels import UpdateRule, UpdateState, reference, update


def weights(state: UpdateState) -> list[Tensor]:
    return [state.W_enc, state.W_dec, state.b_enc, state.b_dec]


@pytest.mark.parametrize(
    ("rule", "optimizer", "lr"),
    [
        (UpdateRule(name="adam"), partial(torch.optim.Adam, betas=(0.9, 0.95)), 3e-3),
        (UpdateRule(name="adam", beta1=0.8, beta2=0.999), partial(torch.optim.Adam, betas=(0.8, 0.999)), 3e-3),
        (UpdateRule(name="signum"), Signum, 1e-3),
    ],
    ids=["adam", "adam, other betas", "signum"],
)
@pytest.mark.parametrize("signed", [False, True])
def test_a_hundred_steps_equal_autograd_and_a_dense_optimiser(
    rule: UpdateRule, optimizer, lr: float, signed: bool
) -> None:
    p = problem(100)
    state, losses = train(update, p, rule, lr, signed=signed)
    want, want_losses = train_by_autograd(p, optimizer, lr, signed=signed)
    torch.testing.assert_close(losses, want_losses, rtol=2e-5, atol=0)
    for name, a, b in zip(("W_enc", "W_dec", "b_enc", "b_dec"), weights(state), want):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.n_steps) == 100


def test_touched_rows_move_as_in_sparse_adam_and_the_others_stay() -> None:
    """`torch.optim.SparseAdam` defines Adam on the rows that have a gradient."""
    L, D = 12, 5
    g = torch.Generator().manual_seed(0)
    W, rule, lr = torch.randn(L, D, generator=g), UpdateRule(name="adam_touched", eps=1e-12), torch.tensor([0.01])
    mine, theirs = W.clone(), W.clone().requires_grad_()
    sparse = torch.optim.SparseAdam([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-12)
    moments = update.new_moments(mine, rule)
    for step in range(1, 8):
        rows = torch.randperm(L, generator=g)[:4]
        grad = torch.zeros(L, D).index_copy_(0, rows, torch.randn(4, D, generator=g))
        touched = torch.zeros(L, dtype=torch.bool).index_fill_(0, rows, True)
        theirs.grad = torch.sparse_coo_tensor(rows[None], grad[rows], (L, D))
        sparse.step()
        t = torch.tensor([step], dtype=torch.int32)
        sizes = update.StepSizes.of(rule, t, lr, lr)
        before, m_before = mine.clone(), moments.m.clone()
        update.update_matrix(mine, mine, grad, moments, touched, rule, sizes, t, unit=False)
        assert torch.equal(mine[~touched], before[~touched])
        assert torch.equal(moments.m[~touched], m_before[~touched])
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam_touched", "signum_touched"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_touched_rule_leaves_everything_of_silent_latents(name, state_dtype) -> None:
    p = problem(1, L=30)
    rule = UpdateRule(name=name, state_dtype=state_dtype)
    state = state_of(p, rule)
    for moments in state.moments.values():
        moments.m.fill_(1)
    before = {key: value.clone() for key, value in {**state.state(), "W": state.W_enc, "U": state.W_dec}.items()}
    values = torch.ones(len(p.x[0]), 2)
    indices = torch.tensor([[3, 7]]).expand(len(values), 2)
    values[:, 1] = 0  # chosen, but cut by the ReLU: latent 7 is not touched
    rate = torch.ones(1) * 0.1
    latents = torch.tensor([5, 30])
    aux = update.AuxRows(latents, torch.ones(2, 6), torch.ones(2), torch.ones(2, 6))
    update.backward_update(
        state, rule, rate, rate, p.x[0], 1.0, p.x[0], values, indices, values, aux,
        centred_by_b_dec=False,
    )  # fmt: skip
    after = {**state.state(), "W": state.W_enc, "U": state.W_dec}
    for key, old in before.items():
        if old.dim() == 2:
            changed = (after[key] != old).any(dim=1).nonzero().flatten().tolist()
            assert set(changed) <= {3, 5}, key
            if key in ("W", "U"):
                assert changed == [3, 5]


def test_the_gradient_beside_the_code_reaches_both_matrices() -> None:
    p = problem(1)
    rule = UpdateRule(name="signum")
    moved = []
    for aux in (None, aux_of(20, 6, 1)):
        state = state_of(p, rule)
        zero = torch.zeros(24, 3)
        rate = torch.ones(1) * 0.01
        update.backward_update(
            state, rule, rate, rate, p.x[0], 0.1, p.x[0], zero, zero.int(), zero, aux,
            centred_by_b_dec=True,
        )  # fmt: skip
        moved.append(
            [
                (new != old).any(dim=1).sum().item()
                for new, old in ((state.W_enc, p.W_enc), (state.b_enc[:, None], p.b_enc[:, None]))
            ]
        )
    assert moved == [[0, 0], [2, 2]]


def test_a_decoder_row_moves_across_itself_and_stays_a_unit_vector() -> None:
    p = problem(5)
    state, _ = train(update, p, UpdateRule(), 0.05)
    torch.testing.assert_close(state.W_dec.norm(dim=1), torch.ones(20))
    assert not torch.equal(state.W_dec, p.W_dec)


@pytest.mark.parametrize(("state_dtype", "bytes_a_weight"), [("float32", 8), ("bfloat16", 4), ("int8", 2)])
def test_fewer_bits_of_state_train_as_well(state_dtype, bytes_a_weight: int) -> None:
    """After 300 steps the loss is within 3 % of that of fp32 state."""
    p = problem(300, N=64, D=16, L=40)
    _, want = train(update, p, UpdateRule(), 3e-3)
    state, losses = train(update, p, UpdateRule(state_dtype=state_dtype), 3e-3)
    last = sum(losses[-30:]) / 30
    assert last == pytest.approx(sum(want[-30:]) / 30, rel=0.03)
    assert last < 0.4 * losses[0]
    held = sum(t.numel() * t.element_size() for t in state.moments["W_enc"] if t is not None)
    assert held <= bytes_a_weight * state.W_enc.numel() + 2 * len(state.W_enc)


def test_second_moments_do_not_freeze_in_few_bits() -> None:
    """With b2 = 0.999 an update is far below one step of the format; plain rounding would never move."""
    rule = UpdateRule(beta2=0.999, state_dtype="int8")
    W = torch.zeros(200, 128)
    moments = update.new_moments(W, rule)
    touched, lr = torch.ones(200, dtype=torch.bool), torch.zeros(1)
    for step in range(1, 401):
        t = torch.tensor([step], dtype=torch.int32)
        update.update_matrix(
            W, W, torch.ones_like(W), moments, touched, rule, update.StepSizes.of(rule, t, lr, lr), t, unit=False
        )
    v = update._read(moments.v, moments.v_exponents, slice(0, 200))  # pyright: ignore[reportArgumentType]
    assert float(v.mean()) == pytest.approx(1 - 0.999**400, rel=0.01)


def test_two_runs_give_the_same_bits() -> None:
    p, rule = problem(10), UpdateRule(state_dtype="int8")
    first, second = (train(update, p, rule, 0.01, torch.bfloat16)[0] for _ in range(2))
    for a, b in zip([*weights(first), *first.state().values()], [*weights(second), *second.state().values()]):
        assert torch.equal(a, b)


def test_copies_for_products_are_the_rounded_weights() -> None:
    state, _ = train(update, problem(4), UpdateRule(), 0.01, torch.bfloat16)
    assert torch.equal(state.enc_rows, state.W_enc.bfloat16())
    assert torch.equal(state.dec_rows, state.W_dec.bfloat16())
    state.W_enc.add_(1)
    state.refresh()
    assert torch.equal(state.enc_rows, state.W_enc.bfloat16())


def test_halves_of_a_batch_sum_to_the_gradient_of_the_whole() -> None:
    """Read off Signum's first moment, which after one step from zero is (1 - b1) times the gradient."""
    p, rule = problem(1, N=40), UpdateRule(name="signum")
    x, rate = p.x[0], torch.zeros(1)
    values, indices = reference.topk_encode(x, p.W_enc, p.b_enc, p.k, p.b_dec)
    residual, _, dots = reference.decode_and_dots(values, indices, p.W_dec, p.b_dec, x, 1.0, torch.float32)

    def moments(rows: slice) -> list[Tensor]:
        state = state_of(p, rule)
        update.backward_update(
            state, rule, rate, rate, residual[rows], 0.3, (x - p.b_dec)[rows], values[rows], indices[rows],
            dots[rows], None, centred_by_b_dec=True,
        )  # fmt: skip
        return [each.m for each in state.moments.values()]

    for a, b, whole in zip(moments(slice(0, 15)), moments(slice(15, 40)), moments(slice(0, 40))):
        torch.testing.assert_close(a + b, whole, rtol=1e-5, atol=1e-6)
