"""Feature flow: planted predecessors, features from nowhere, the graph, co-activation and steering by it."""

import math

import pytest
import torch
from support.tiny_models import with_text

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE, SAEConfig
from steersman.steer import Steerer, feature_flow, score_features
from steersman.steer.scores.flow import match_rows

D, L = 128, 40
RES0, RES1, MLP1 = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"


def sae_at(hook: str, rows: torch.Tensor) -> SAE:
    sae = SAE(SAEConfig(d_in=rows.shape[1], d_sae=len(rows), architecture="relu", hook_name=hook))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.normalize_decoder()
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def planted() -> tuple[list[SAE], torch.Tensor]:
    """Rows of the later SAE: the earlier one's permuted with noise, but for the last ten, which are the MLP's."""
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(L, generator=g)
    res0 = torch.linalg.qr(torch.randn(D, L, generator=g)).Q.T
    mlp = torch.randn(L, D, generator=g)
    mlp -= mlp @ res0.T @ res0  # nothing of the earlier residual stream in it
    res1 = res0[order] + 0.02 * torch.randn(L, D, generator=g)
    res1[-10:] = mlp[:10]
    return [sae_at(RES0, res0), sae_at(MLP1, mlp), sae_at(RES1, res1)], order


def test_a_permutation_with_noise_is_recovered_and_origins_are_named() -> None:
    saes, order = planted()
    flow = feature_flow(saes)
    match = flow.matches[RES1, RES0]
    assert torch.equal(match.ids[:-10, 0], order[:-10])
    assert match.ids.shape == (L, 5)
    assert bool((match.cosines[:, 0] >= match.cosines[:, 1]).all())
    assert flow.origins(RES1) == ["RES"] * (L - 10) + ["MLP"] * 10
    assert 0 < match.null <= match.null_max < 0.6
    with pytest.raises(SteersmanError, match="no SAE lies before"):
        flow.origins(RES0)


def test_orthogonal_dictionaries_come_from_nowhere_and_both_sources_make_it_mixed() -> None:
    q = torch.linalg.qr(torch.randn(D, 3 * L, generator=torch.Generator().manual_seed(0))).Q.T
    apart = feature_flow([sae_at(RES0, q[:L]), sae_at(RES1, q[L : 2 * L])])
    assert set(apart.origins(RES1)) == {"nowhere"}
    assert apart.trace(RES1, 0) == []
    both = feature_flow([sae_at(RES0, q[:L]), sae_at(MLP1, q[L : 2 * L]), sae_at(RES1, q[:L] + q[L : 2 * L])])
    assert set(both.origins(RES1)) == {"mixed"}
    assert set(feature_flow([sae_at(RES0, q[:L]), sae_at(RES1, q[:L])], threshold=1.1).origins(RES1)) == {"nowhere"}


def test_a_layer_without_an_sae_is_passed_over() -> None:
    saes, _ = planted()
    far = sae_at("blocks.3.hook_resid_post", saes[0].W_dec.detach())
    (edge,) = feature_flow([far, saes[0]]).trace("blocks.3.hook_resid_post", 4)
    assert (edge.source_hook, edge.source) == (RES0, 4)


def test_the_null_is_what_unrelated_rows_reach() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(L, D, generator=g), torch.randn(L, D, generator=g)
    match = match_rows(a, b, top=3)
    over = (match.cosines[:, 0] > match.null).float().mean()
    assert over < 0.2
    assert match.ids.shape == (L, 3)


def test_the_graph_goes_down_layer_by_layer_and_gives_a_set_to_steer_by() -> None:
    saes, order = planted()
    res2 = saes[2].W_dec.detach().flip(0)
    flow = feature_flow([*saes, sae_at("blocks.2.hook_resid_post", res2)])
    edges = flow.trace("blocks.2.hook_resid_post", L - 1)  # feature 0 of layer 1, and what that was at layer 0
    assert [(edge.hook, edge.feature, edge.source_hook, edge.source) for edge in edges] == [
        ("blocks.2.hook_resid_post", L - 1, RES1, 0),
        (RES1, 0, RES0, int(order[0])),
    ]
    assert all(edge.cosine > 0.9 and math.isnan(edge.together) for edge in edges)
    given = flow.feature_set(
        "blocks.2.hook_resid_post", L - 1, 4.0, mode="add", over_layers="exponential", growth=math.log(2)
    )
    assert given["blocks.2.hook_resid_post"] == {L - 1: 4.0}
    assert given[RES1] == {0: pytest.approx(2.0)}
    assert given[RES0] == {int(order[0]): pytest.approx(1.0)}
    linear = flow.feature_set("blocks.2.hook_resid_post", L - 1, 4.0, mode="add", over_layers="linear", growth=0.25)
    assert linear[RES0] == {int(order[0]): pytest.approx(2.0)}
    with pytest.raises(SteersmanError, match="one factor"):
        flow.feature_set(RES1, 0, 0.0, over_layers="linear", growth=1.0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return with_text("llama")


def test_coactivation_stands_beside_the_cosine_and_factor_1_changes_nothing(lm: LanguageModel) -> None:
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(24, 16, generator=g)
    saes = [sae_at(RES0, rows), sae_at(RES1, rows.flip(0))]
    texts = ["w5 w6 w7 w8", "w9 w10 w11"]
    flow = feature_flow(saes, lm=lm, texts=texts, threshold=0.9)
    match = flow.matches[RES1, RES0]
    assert match.together is not None
    assert match.alone is not None
    codes = []
    for sae in saes:  # as it is defined, token by token
        h = [
            lm.capture(lm.encode(text).input_ids, hooks=[sae.cfg.hook_name])[sae.cfg.hook_name][0, 1:] for text in texts
        ]
        codes.append(torch.cat([sae.encode(x) for x in h]) > 0)
    nearest = codes[0][:, match.ids[:, 0]]
    torch.testing.assert_close(match.together, (nearest & codes[1]).sum(0) / codes[1].sum(0), equal_nan=True)
    torch.testing.assert_close(match.alone, nearest.float().mean(0))
    chosen = flow.feature_set(RES1, 2, 1.0)
    assert chosen.n_features == 2
    ids = lm.encode(texts[0]).input_ids
    base = lm.logits(ids)
    with chosen.steer(Steerer(lm), saes):
        assert torch.equal(lm.logits(ids), base)
    with flow.feature_set(RES1, 2, 3.0).steer(Steerer(lm), saes):
        apart = lm.logits(ids)
    assert not torch.equal(apart, base)
    with flow.steer(Steerer(lm), RES1, 2, 3.0):
        assert torch.equal(lm.logits(ids), apart)
    first, second = score_features(lm, saes, "flow")
    assert bool(first["flow"].values.isnan().all())
    assert float(second["flow"].values.min()) > 0.99


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ((RES0, RES0), "two SAEs are of one hook point"),
        ((RES0, MLP1), "right before another"),
        (("", RES1), "records no"),
    ],
)
def test_what_cannot_be_matched_is_said(hooks: tuple[str, str], message: str) -> None:
    rows = torch.eye(4)
    with pytest.raises(SteersmanError, match=message):
        feature_flow([sae_at(hook, rows) for hook in hooks])
