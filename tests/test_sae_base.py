"""The SAE module: shapes, codes, single features, errors."""

import pytest
import torch
from helpers import make_sae

from steersman.errors import SteersmanError
from steersman.sae import SAE, BatchTopKSAE, JumpReLUSAE, SAEConfig, TopKSAE


@pytest.mark.parametrize(
    ("activation", "kind"), [("topk", TopKSAE), ("batch_topk", BatchTopKSAE), ("jumprelu", JumpReLUSAE)]
)
def test_config_chooses_the_architecture(activation: str, kind: type) -> None:
    sae = make_sae(activation)
    assert type(sae) is kind
    assert sae.W_enc.shape == (8, 64)
    assert sae.W_enc.T.is_contiguous()
    assert sae.W_dec.shape == (64, 8)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8), (0, 8)])
def test_dense_and_sparse_codes_agree(activation: str, shape: tuple[int, ...]) -> None:
    sae = make_sae(activation)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    f = sae.encode(x)
    assert f.shape == (*shape[:-1], 64)
    assert (f >= 0).all()
    torch.testing.assert_close(sae.decode(f), sae(x), rtol=1e-5, atol=1e-5)
    code = sae.encode_sparse(x.reshape(-1, 8))
    assert code.indices.dtype == torch.int64
    dense = torch.zeros(len(code.values), 64).scatter_add_(1, code.indices, code.values)
    torch.testing.assert_close(dense.view_as(f), f)


def test_codes_follow_the_definitions() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    topk = make_sae("topk")
    Z = (x - topk.b_dec) @ topk.W_enc + topk.b_enc
    kept = torch.zeros_like(Z).scatter(1, Z.topk(5).indices, 1.0)
    torch.testing.assert_close(topk.encode(x), (Z * kept).relu(), rtol=1e-5, atol=1e-5)
    jump = make_sae("jumprelu")
    assert isinstance(jump, JumpReLUSAE)
    Z = (x - jump.b_dec) @ jump.W_enc + jump.b_enc
    torch.testing.assert_close(jump.encode(x), Z * (Z - jump.threshold > 0), rtol=1e-5, atol=1e-5)
    batch = make_sae("batch_topk")
    Z = (x - batch.b_dec) @ batch.W_enc + batch.b_enc
    torch.testing.assert_close(batch.encode(x), Z * (Z > 0.4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("ids", [[0], [63, 2, 17], [5, 5, 1], list(range(64))])
def test_single_features_are_columns_of_the_code(activation: str, ids: list[int]) -> None:
    sae = make_sae(activation)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    got = sae.encode_features(x, torch.tensor(ids))
    assert torch.equal(got, sae.encode(x)[:, ids])


def test_single_features_with_ties_and_many_tokens() -> None:
    sae = make_sae(d_sae=64, k=3)
    with torch.no_grad():
        sae.W_enc[:, 10:40] = sae.W_enc[:, 9:10]  # a run of equal features across the boundary of the k largest
        sae.b_enc[9:40] = sae.b_enc[9]
    ids = torch.tensor([8, 9, 10, 11, 12, 39, 63])
    for n in (200, 20_000):  # counted and selected
        x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(sae.encode_features(x, ids), sae.encode(x)[:, ids])


def test_folding_the_input_scale_changes_nothing_but_units() -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    for activation in ("topk", "batch_topk", "jumprelu"):
        sae = make_sae(activation)
        code, x_hat = sae.encode(3.0 * x), sae(3.0 * x)
        sae.fold_input_scale(3.0)
        torch.testing.assert_close(sae.encode(x) * 3.0, code, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x) * 3.0, x_hat, rtol=1e-5, atol=1e-5)


def test_input_may_be_bfloat16() -> None:
    x = torch.randn(4, 8).bfloat16()
    sae = make_sae()
    torch.testing.assert_close(sae(x), sae(x.float()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_in": 0, "d_sae": 4, "k": 1}, "d_in and d_sae of at least 1"),
        ({"d_in": 4, "d_sae": 8, "k": 9}, "k = 9 must lie between 1 and d_sae = 8"),
        ({"d_in": 4, "d_sae": 8, "k": 0}, "k = 0"),
        ({"d_in": 4, "d_sae": 8, "k": 1, "activation": "relu"}, "unknown activation 'relu'"),
    ],
)
def test_impossible_configurations(fields: dict, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        SAEConfig(**fields)


def test_wrong_inputs() -> None:
    sae = make_sae()
    with pytest.raises(SteersmanError, match="width 9 do not fit an SAE of d_in 8"):
        sae.encode(torch.randn(3, 9))
    with pytest.raises(SteersmanError, match="feature 64 is out of range.*0 to 63"):
        sae.check_feature(64)
    with pytest.raises(SteersmanError, match="no feature statistics"):
        sae.is_dead(0)
    with pytest.raises(SteersmanError, match="training of 'jumprelu'"):
        make_sae("jumprelu").training_code(torch.randn(2, 8))
    untrained = SAE(SAEConfig(d_in=8, d_sae=16, k=2, activation="batch_topk"))
    with pytest.raises(SteersmanError, match="no threshold yet"):
        untrained.encode(torch.randn(2, 8))
