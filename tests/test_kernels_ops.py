"""The operators: their schemas, fakes and autograd rules, and a training step inside `torch.compile`."""

import pytest
import torch
from support.updates import problem, state_of
from torch import Tensor

from steersman.kernels import UpdateRule, ops, sparse_decode, topk_encode

N, L, D, K = 10, 20, 6, 3


def tensors(grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, W, b_enc, b_dec = (torch.randn(s, generator=g).requires_grad_(grad) for s in ((N, D), (L, D), (L,), (D,)))
    return x, W, b_enc, b_dec


def operands(name: str) -> tuple:
    x, W, b_enc, b_dec = tensors(False)
    values, indices = ops._op_topk_encode(x, W, b_enc, K, b_dec)
    order = ops._op_sort_by_latent(indices, L)
    if name == "code_values":
        return (*tensors(True), values, indices, order, True)
    return {
        "topk_encode": (x, W, b_enc, K, b_dec),
        "sort_by_latent": (indices, L),
        "scatter_rows": (values, x, indices, L, order),
        "scatter": (values, indices, L, order),
        "value_gradient": (x, W, indices, order),
        "sparse_decode": (
            *(values.clone().requires_grad_(), indices),
            *(t.clone().requires_grad_() for t in (W, b_dec)),
            order,
        ),
        "centre": (x, 0.5, b_dec, torch.bfloat16),
        "decode_and_dots": (values, indices, W, b_dec, x, 0.5, torch.bfloat16),
    }[name]


NAMES = [
    "topk_encode", "sort_by_latent", "scatter_rows", "scatter", "value_gradient", "code_values", "sparse_decode",
    "centre", "decode_and_dots",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_their_promises(name: str) -> None:
    torch.library.opcheck(getattr(ops, f"_op_{name}"), operands(name))


@pytest.mark.parametrize(
    "rule", [UpdateRule(), UpdateRule(name="signum_touched", state_dtype="int8")], ids=["adam", "signum"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_names_everything_it_changes(rule: UpdateRule, dtype: torch.dtype) -> None:
    p = problem(1, N=N, L=L, D=D, k=K)
    state = state_of(p, rule, dtype)
    values, indices = ops._op_topk_encode(p.x[0], state.W_enc, state.b_enc, K, state.b_dec)
    weights, rows, moments = state.flatten()
    rate = torch.ones(1) * 0.1
    torch.library.opcheck(
        ops._op_backward_update,
        (
            weights, rows, moments, state.n_steps, rate, rate, p.x[0], 0.3, p.x[0], values, indices, values, [], None,
            None, 0, True, False, rule.name, rule.beta1, rule.beta2, rule.eps, rule.state_dtype,
        ),
    )  # fmt: skip


def test_a_compiled_step_has_the_gradients_of_the_eager_one() -> None:
    """fullgraph: nothing falls back to Python."""
    inputs = tensors(True)

    def loss(x: Tensor, W: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
        values, order = topk_encode(x, W, b_enc, K, b_dec)
        return (sparse_decode(values, order, W, b_dec) - x).square().sum() + values.sum()

    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, torch.autograd.grad(compiled(*inputs), inputs)):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))


def test_meta_tensors_have_the_shapes_of_real_ones() -> None:
    x, W, b_enc, b_dec = (t.to("meta") for t in tensors(False))
    values, indices = ops._op_topk_encode(x, W, b_enc, K, b_dec)
    assert values.shape == indices.shape == (N, K)
    assert ops._op_sparse_decode(values, indices, W, b_dec, []).shape == (N, D)
