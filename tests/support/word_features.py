"""A random Llama whose first words have directions of their own, and an SAE that reads them exactly."""

import torch

from steersman.lm import LanguageModel
from steersman.sae import SAE, SAEConfig
from steersman.sae.base import FeatureStats
from support.tiny_models import D, with_text

WORDS, L = 12, 14
"""Words w4 ... w15, each a dimension of its own at the first hook point; features of the SAE, the last two dead."""
HOOK = "blocks.0.hook_resid_pre"


def word_model() -> LanguageModel:
    """At `blocks.0.hook_resid_pre` the word w(4 + j), j < 12, is 3 in dimension j, where no other word is anything."""
    lm = with_text("llama")
    with torch.no_grad():
        rows = lm.model.get_input_embeddings().weight
        rows[:, :WORDS] = 0
        for j in range(WORDS):
            rows[4 + j] = 0
            rows[4 + j, j] = 3.0
    return lm


def word_sae(lm: LanguageModel) -> SAE:
    """Feature j is 2 on the word w(4 + j) and 0 elsewhere; the last two are never active."""
    sae = SAE(SAEConfig(d_in=D, d_sae=L, architecture="relu", hook_name=HOOK, model_name=lm.name))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_enc[range(WORDS), range(WORDS)] = 1.0
        sae.b_enc.fill_(-1.0)
        sae.W_dec.copy_(torch.randn(L, D, generator=torch.Generator().manual_seed(0)))
        sae.W_dec[:WORDS] = torch.eye(D)[:WORDS]
        sae.normalize_decoder()
    largest = torch.tensor([2.0] * WORDS + [0.0, 0.0])
    sae.feature_stats = FeatureStats(
        max_act=largest, density=largest / 20, mean_act=largest, n_tokens=100, median_norm=3.0
    )
    return sae
