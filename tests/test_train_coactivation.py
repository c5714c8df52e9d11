"""Features that fire together on the rows of a store: a planted code, in which it is known who does."""

from pathlib import Path

import pytest
import torch

from steersman.errors import SteersmanError
from steersman.sae import SAE, SAEConfig
from steersman.train import ActivationStore, CoActivations, co_activating

HOOK = "blocks.1.hook_resid_post"


def test_partners_are_those_that_were_planted(tmp_path: Path) -> None:
    """Of 8 features 0 and 1 fire together on 30 rows, 0 alone on 10, 1 and 2 together on 10; row 50 is a sink."""
    sae = SAE(SAEConfig(d_in=8, d_sae=8, k=2, hook_name=HOOK))
    x = torch.full((51, 8), -1.0)
    x[:40, 0], x[:30, 1], x[40:50, 1], x[40:50, 2] = 3.0, 2.0, 2.0, 2.5
    x[50] = 1000 * torch.eye(8)[0] + 900 * torch.eye(8)[7]
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(8))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    store = ActivationStore.from_tensors([x], tmp_path / "acts", HOOK, dtype="float32")
    found: CoActivations = co_activating(sae, store, [1, 0, 5], n=3)
    assert list(found) == [1, 0, 5]
    assert (found.n_tokens, found.share) == (50, 1.0)
    one, two = found[1]
    assert (one.feature, one.together, one.count) == (0, 30, 40)
    assert one.cosine == pytest.approx(30 / 40)
    assert (two.feature, two.together, two.count) == (2, 10, 10)
    assert two.cosine == pytest.approx(10 / (40 * 10) ** 0.5)
    assert [partner.feature for partner in found[0]] == [1], "what fires on the sink alone is no partner"
    assert found[5] == []
    assert co_activating(sae, store, [5])[5] == [], "nothing that was asked for fires"
    with pytest.raises(SteersmanError, match="feature 8 is out of range"):
        co_activating(sae, store, [8])
