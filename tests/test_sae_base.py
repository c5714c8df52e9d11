"""The SAE module: shapes, codes, single features, errors."""

import pytest
import torch
from support.helpers import make_sae

from steersman.errors import SteersmanError
from steersman.sae import SAE, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, SAEConfig, TopKSAE


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
    torch.testing.assert_close(got, sae.encode(x)[:, ids], rtol=1e-6, atol=1e-6)


def test_single_features_with_ties_and_many_tokens() -> None:
    sae = make_sae(d_sae=64, k=3)
    with torch.no_grad():
        sae.W_enc[:, 10:40] = sae.W_enc[:, 9:10]  # a run of equal features across the boundary of the k largest
        sae.b_enc[9:40] = sae.b_enc[9]
    ids = torch.tensor([8, 9, 10, 11, 12, 39, 63])
    for n in (200, 20_000):  # counted and selected
        x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(sae.encode_features(x, ids), sae.encode(x)[:, ids])


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu"])
def test_folding_the_input_scale_changes_nothing_but_units(architecture: str) -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    sae = make_sae(architecture)
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
        ({"d_in": 4, "d_sae": 8, "k": 1, "architecture": "swish"}, "unknown architecture 'swish'"),
        (
            {"d_in": 4, "d_sae": 8, "k": 1, "input_norm": "batch"},
            "input_norm of an SAE is 'batch'",
        ),
        ({"d_in": 4, "d_sae": 8, "k": 3, "architecture": "groupmax"}, "multiple of k = 3"),
        ({"d_in": 4, "d_sae": 8, "k": 3, "d_out": 5}, "set transcoder=True"),
        ({"d_in": 4, "d_sae": 8, "k": 3, "transcoder": True}, "apply_b_dec_to_input=False"),
        ({"d_in": 4, "d_sae": 8, "k": 3, "architecture": "matryoshka"}, "group_sizes belong to"),
        ({"d_in": 4, "d_sae": 8, "k": 3, "architecture": "matryoshka", "group_sizes": (4, 5)}, "must add up to"),
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
    with pytest.raises(SteersmanError, match="training of 'groupmax'"):
        make_sae("groupmax").encode_training(torch.randn(2, 8))
    untrained = SAE(SAEConfig(d_in=8, d_sae=16, k=2, architecture="batch_topk"))
    with pytest.raises(SteersmanError, match="no threshold yet"):
        untrained.encode(torch.randn(2, 8))


ARCHITECTURES = ["relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "groupmax"]


@pytest.mark.parametrize("activation", ARCHITECTURES)
@pytest.mark.parametrize("input_norm", ["none", "layer_norm", "constant_norm"])
def test_every_architecture_rebuilds_the_same_way_on_every_path(activation: str, input_norm: str) -> None:
    sae = make_sae(activation, d_sae=40, input_norm=input_norm)
    x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1
    f = sae.encode(x)
    assert (f >= 0).all()
    assert (f > 0).any()
    torch.testing.assert_close(sae.decode(f), sae(x), rtol=1e-4, atol=1e-5)
    y, code = sae.reconstruct(x)
    torch.testing.assert_close(y, sae(x))
    dense = torch.zeros(60, 40).scatter_add_(1, code.indices, code.values)
    torch.testing.assert_close(dense.view_as(f), f, rtol=1e-5, atol=1e-6)
    ids = torch.tensor([3, 39, 0])
    torch.testing.assert_close(sae.encode_features(x.view(-1, 8), ids), f.view(-1, 40)[:, ids], rtol=1e-5, atol=1e-6)
    if input_norm == "constant_norm":  # the code does not see the length of a token, its reconstruction scales with it
        torch.testing.assert_close(sae.encode(2 * x), f, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae(2 * x), 2 * y, rtol=1e-4, atol=1e-4)
    if input_norm == "layer_norm":
        torch.testing.assert_close(sae(x + 5), y + 5, rtol=1e-3, atol=1e-3)


def test_a_code_of_a_normalised_input_needs_that_input() -> None:
    sae = make_sae("relu", input_norm="layer_norm")
    x, other = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(1))
    f = sae.encode(x)
    sae.encode(other)
    torch.testing.assert_close(sae.decode(f, like=x), sae(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sae.decode(f), sae(x), atol=1e-2)
    with pytest.raises(SteersmanError, match=r"normalises each token \(layer_norm\).*pass like=x"):
        sae.decode(f[:7])
    scale = sae.token_scale(x)
    assert scale is not None
    torch.testing.assert_close(scale[:, 0], x.std(dim=1))
    assert make_sae().token_scale(x) is None


def test_nested_matryoshka_saes_are_the_first_features() -> None:
    sae = make_sae("matryoshka")
    assert isinstance(sae, MatryoshkaSAE)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    first = sae.nested(1)
    assert first.cfg.d_sae == sae.cfg.group_sizes[0]
    assert first.W_enc.data_ptr() == sae.W_enc.data_ptr()
    torch.testing.assert_close(first.encode(x), sae.encode(x)[:, : first.cfg.d_sae], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae.nested(2).encode(x), sae.encode(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(SteersmanError, match="there are 2 groups of features, not 3"):
        sae.nested(3)


def test_transcoders_write_elsewhere() -> None:
    sae = make_sae("topk", transcoder=True, d_out=6, skip_connection=True, hook_name="blocks.1.hook_resid_mid")
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    y = sae(x)
    assert y.shape == (3, 5, 6)
    torch.testing.assert_close(y, sae.decode(sae.encode(x)) + x @ sae.W_skip.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode(x).count_nonzero(), (sae.encode_sparse(x.view(-1, 8)).values > 0).sum())
    with pytest.raises(SteersmanError, match="steering needs an SAE that writes where it reads; this is a transcoder"):
        sae.check_residual("steering")
    make_sae("relu", reshape_heads=True, hook_name="blocks.0.attn.hook_z").check_residual("steering")
    make_sae().check_residual("steering")


def test_attention_heads_come_apart_or_together() -> None:
    sae = make_sae("relu", reshape_heads=True, input_norm="layer_norm")
    x = torch.randn(3, 5, 2, 4, generator=torch.Generator().manual_seed(1))
    f, y = sae.encode(x), sae(x)
    assert (f.shape, y.shape) == ((3, 5, 64), (3, 5, 2, 4))
    torch.testing.assert_close(sae.decode(f), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x.flatten(-2)), y.flatten(-2))
    with pytest.raises(SteersmanError, match="width 4 do not fit"):
        make_sae().encode(x)


@pytest.mark.parametrize("activation", ARCHITECTURES)
def test_weights_in_bfloat16_still_compute_in_fp32(activation: str) -> None:
    sae = make_sae(activation).to(torch.bfloat16)
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    f = sae.encode(x)
    assert f.dtype == torch.float32
    wide = sae.float()
    torch.testing.assert_close(wide.encode(x), f, rtol=1e-5, atol=1e-5)


def test_the_interface_that_saebench_asks_for() -> None:
    sae = make_sae("jumprelu", hook_name="blocks.3.hook_resid_post", model_name="m")
    assert (sae.W_enc.shape, sae.W_dec.shape, sae.b_enc.shape, sae.b_dec.shape) == ((8, 64), (64, 8), (64,), (8,))
    assert (sae.dtype, sae.device.type) == (torch.float32, "cpu")
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.hook_layer, sae.cfg.hook_name) == (
        8,
        64,
        3,
        "blocks.3.hook_resid_post",
    )
    assert (sae.cfg.model_name, sae.cfg.architecture) == ("m", "jumprelu")
    assert sae.to(device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    x = torch.randn(4, 7, 8)
    assert sae.decode(sae.encode(x)).shape == x.shape
    with pytest.raises(SteersmanError, match="records no Neuronpedia page"):
        sae.neuronpedia_url(5)
    paged = make_sae("jumprelu", metadata={"neuronpedia_id": "gpt2-small/6-res-jb"})
    assert paged.neuronpedia_url(5) == "https://www.neuronpedia.org/gpt2-small/6-res-jb/5"
    with pytest.raises(SteersmanError, match="feature 64 is out of range"):
        paged.neuronpedia_url(64)
