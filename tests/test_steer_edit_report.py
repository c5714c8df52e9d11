"""Achieved activations and collateral, against encoding everything by hand."""

import pytest
import torch
from support.tiny_models import toy_sae

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import Steerer, edit_report

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["w5 w6 w7 w8", "w9 w10"]


@pytest.mark.parametrize("chunk", [2, 256])
def test_report_is_what_encoding_again_shows(lm: LanguageModel, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit_report, "CHUNK", chunk)
    sae, batch, asked = toy_sae(), lm.encode(TEXTS), [{3: 6.0, 8: 4.0}, {8: 2.0}]
    got = Steerer(lm).measure(sae, asked, TEXTS, mode="clamp")
    chosen = batch.attention_mask.bool() & (batch.input_ids != lm.bos_token_id)
    clean = sae.encode(lm.capture(batch.input_ids, batch.attention_mask, hooks=[HOOK])[HOOK])
    with Steerer(lm).features(sae, asked, mode="clamp"):
        edited = sae.encode(lm.capture(batch.input_ids, batch.attention_mask, hooks=[HOOK])[HOOK])
    assert got.n_tokens == int(chosen.sum()) == 6
    three, eight = got.features
    assert (three.feature, three.n_tokens, three.strength) == (3, 4, 6.0)
    assert (eight.feature, eight.n_tokens) == (8, 6)
    assert eight.strength == pytest.approx((4 * 4 + 2 * 2) / 6)
    assert three.before == pytest.approx(float(clean[0, 1:5, 3].mean()), abs=1e-5)
    assert three.achieved == pytest.approx(float(edited[0, 1:5, 3].mean()), abs=1e-5)
    assert eight.achieved == pytest.approx(float(edited[chosen][:, 8].mean()), abs=1e-5)
    assert eight.lowest == pytest.approx(float(edited[chosen][:, 8].min()), abs=1e-5)
    assert eight.highest == pytest.approx(float(edited[chosen][:, 8].max()), abs=1e-5)
    change = (edited - clean)[chosen]
    change[:, 8] = 0
    change[:4, 3] = 0  # feature 3 is collateral in the row that does not name it
    assert got.moved == pytest.approx(float((change.abs() > 1e-6).sum()) / 6)
    assert got.moved_amount == pytest.approx(float(change.abs().sum()) / 6, rel=1e-4)
    top = int(change.sum(0).abs().argmax())
    assert got.largest[0][0] == top
    assert got.largest[0][1] == pytest.approx(float(change[:, top].sum()) / 6, rel=1e-4)
    assert "feature 3:" in str(got)


def test_measuring_changes_nothing(lm: LanguageModel) -> None:
    st, sae = Steerer(lm), toy_sae()
    with st.features(sae, {3: 6.0}):
        plain = lm.generate(TEXTS, max_new_tokens=6)
    with st.features(sae, {3: 6.0}, measure=True) as ctx:
        measured = lm.generate(TEXTS, max_new_tokens=6)
    assert torch.equal(plain.tokens, measured.tokens)
    assert ctx.report().n_tokens == ctx.trace.count


def test_nothing_to_report(lm: LanguageModel) -> None:
    with Steerer(lm).features(toy_sae(), {3: 6.0}) as ctx, pytest.raises(SteersmanError, match="measure=True"):
        ctx.report()
    with pytest.raises(SteersmanError, match="no token was steered"):
        Steerer(lm).measure(toy_sae(), {3: 6.0}, TEXTS, scope="generation")
