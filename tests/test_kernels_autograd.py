"""Sparse backward passes against autograd through the dense reference."""

import pytest
import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import choose, sparse_decode, topk_encode, with_gradient
from steersman.kernels.reference import pre_activations


def dense_loss(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, indices: Tensor, signed: bool
) -> Tensor:
    Z = pre_activations(x, W_enc, b_enc, b_dec)
    Z = Z if signed else Z.relu()
    chosen = torch.zeros_like(Z).scatter(1, indices.long(), 1.0)
    upstream = torch.linspace(-1, 2, x.shape[1])  # an upstream gradient that is not 1
    return (((Z * chosen) @ W_dec + b_dec) * upstream).square().sum()


@pytest.mark.parametrize(("N", "L", "D", "k"), [(1, 5, 3, 2), (64, 200, 17, 8), (9, 40, 6, 40)])
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_equal_dense_autograd(N: int, L: int, D: int, k: int, signed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g).requires_grad_() for s in ((N, D), (L, D), (L,), (L, D), (D,))]
    x, W_enc, b_enc, W_dec, b_dec = tensors
    values, order = topk_encode(x, W_enc, b_enc, k, b_dec, signed=signed)
    upstream = torch.linspace(-1, 2, D)
    loss = (sparse_decode(values, order, W_dec, b_dec) * upstream).square().sum()
    got = torch.autograd.grad(loss, tensors)
    want = torch.autograd.grad(dense_loss(x, W_enc, b_enc, W_dec, b_dec, order.indices, signed), tensors)
    for name, a, b in zip(("x", "W_enc", "b_enc", "W_dec", "b_dec"), got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()), msg=f"gradient of {name}")


def test_values_reach_the_encoder_through_any_loss() -> None:
    """A loss on the values alone (as AuxK-like terms are) has its gradient in W_enc."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, 4, generator=g)
    W_enc = torch.randn(20, 4, generator=g, requires_grad=True)
    values, _ = topk_encode(x, W_enc, torch.zeros(20), 3)
    (grad,) = torch.autograd.grad(values.sum(), W_enc)
    assert float(grad.abs().sum()) > 0


def test_a_selected_value_cut_by_relu_has_no_gradient() -> None:
    x = -torch.ones(1, 2)
    W_enc = torch.eye(2).requires_grad_()
    values, _ = topk_encode(x, W_enc, torch.zeros(2), 1)
    (grad,) = torch.autograd.grad(values.sum(), W_enc)
    assert values.tolist() == [[0.0]]
    assert not grad.any()


def test_a_negative_value_of_a_signed_code_has_its_gradient() -> None:
    x = -torch.ones(1, 2)
    W_enc = torch.eye(2).requires_grad_()
    values, _ = topk_encode(x, W_enc, torch.zeros(2), 1, signed=True)
    (grad,) = torch.autograd.grad(values.sum(), W_enc)
    assert values.tolist() == [[-1.0]]
    assert grad.tolist() == [[-1.0, -1.0], [0.0, 0.0]]


def test_halves_of_a_batch_add_up_to_the_gradient_of_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(40, 6, generator=g), torch.randn(50, 6, generator=g).requires_grad_()

    def gradient(rows: Tensor) -> Tensor:
        values, order = topk_encode(rows, W, torch.zeros(50), 4)
        return torch.autograd.grad((sparse_decode(values, order, W) - rows).square().sum(), W)[0]

    torch.testing.assert_close(gradient(x[:20]) + gradient(x[20:]), gradient(x), rtol=1e-5, atol=1e-4)


def test_gradients_of_a_code_selected_elsewhere() -> None:
    x = torch.randn(3, 4)
    W = torch.randn(6, 4, requires_grad=True)
    indices = torch.tensor([[0], [5], [2]], dtype=torch.int32)
    values = (x @ W.T).detach().gather(1, indices.long()).relu()
    got, order = with_gradient(x, W, torch.zeros(6), None, values, indices)
    (grad,) = torch.autograd.grad(got.sum(), W)
    assert order.indices is indices
    want = torch.zeros(6, 4)
    for n in range(3):
        if values[n, 0] > 0:
            want[int(indices[n, 0])] += x[n]
    torch.testing.assert_close(grad, want)


def test_no_tensor_of_size_n_k_d_or_n_l_is_made() -> None:
    """The largest thing that training makes is one block of pre-activations."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    sizes.append(tensor.numel())
            return out

    N, L, D, k = 2048, 8192, 256, 32
    x, W = torch.randn(N, D), torch.randn(L, D)
    W_enc, W_dec = W.clone().requires_grad_(), W.clone().requires_grad_()
    with Sizes():
        values, order = topk_encode(x, W_enc, torch.zeros(L), k)
        sparse_decode(values, order, W_dec).square().sum().backward()
    assert max(sizes) < min(N * L, N * k * D) // 3


def test_unknown_kernels_are_an_error() -> None:
    with pytest.raises(SteersmanError, match="no kernels named 'cuda'"):
        choose(torch.device("cpu"), "cuda")
