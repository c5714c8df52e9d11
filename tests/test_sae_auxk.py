"""The AuxK loss against its definition, and where its gradient goes."""

import torch
from support.helpers import make_sae

from steersman.kernels import collect_row_gradients
from steersman.sae import SAE, auxk_loss


def test_auxk_equals_brute_force() -> None:
    sae = make_sae()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    residual = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    candidates = torch.tensor([3, 60, 7, 9, 11])
    alive = torch.tensor([False, True, False, False, True])
    got = auxk_loss(sae, x, residual, candidates, alive, k_aux=2)
    dead = candidates[~alive]
    Z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, dead]
    kept = torch.zeros_like(Z).scatter(1, Z.topk(2).indices, 1.0)
    want = (((Z * kept).relu() @ sae.W_dec[dead]) - residual).square().sum()
    torch.testing.assert_close(got, want)


def test_auxk_trains_dead_features_alone() -> None:
    sae = make_sae()
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    candidates, alive = torch.tensor([3, 60, 7]), torch.tensor([False, True, False])
    residual = (x - sae(x)).requires_grad_()
    auxk_loss(sae, x, residual, candidates, alive, k_aux=2).backward()
    assert residual.grad is None, "the residual is the target, not something to train"
    for parameter in (sae.W_enc.grad, sae.W_dec.grad, sae.b_enc.grad):
        assert parameter is not None
        rows = parameter.T if parameter.shape == (8, 64) else parameter
        touched = rows.reshape(64, -1).abs().sum(dim=1).nonzero().flatten().tolist()
        assert set(touched) == {3, 7}


def test_more_places_than_dead_features() -> None:
    sae = make_sae()
    x = torch.randn(5, 8)
    loss = auxk_loss(sae, x, x, torch.tensor([1, 2]), torch.tensor([True, True]), k_aux=10)
    torch.testing.assert_close(loss, x.square().sum())


def test_gradients_of_rows_that_are_collected_are_those_of_the_whole() -> None:
    x, residual = torch.randn(50, 8), torch.randn(50, 8)
    candidates, alive = torch.tensor([3, 60, 7]), torch.tensor([False, True, False])
    dense, collecting = make_sae(), make_sae()

    def loss(sae: SAE) -> torch.Tensor:
        return auxk_loss(sae, x, residual, candidates, alive, k_aux=2) + (x - sae(x)).square().sum()

    loss(dense).backward()
    with collect_row_gradients() as few:
        total = loss(collecting)
    assert not few, "the backward pass fills it"
    total.backward()
    assert {tuple(one.rows.shape) for one in few} == {(3, 8)}, "no gradient here is as large as a matrix"
    for one in few:
        one.add()
    for a, b in zip(dense.parameters(), collecting.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
