"""`input`: do the tokens that a feature writes also activate it?

The share of a feature's `n_examples` (20) most activating tokens in `texts` that are among the `n_tokens` (20) tokens
of its logit lens. High for a feature that reads what it writes, which says nothing about whether it steers: for that
see `output`, which is low for many of these. NaN for a feature that no token activates.

The null pairs each feature's activating tokens with another feature's lens. Source: arXiv 2505.20063; its formula is
given here from memory of the paper, not from its code.

Shape letters: L features, T examples, K lens tokens.
"""

import math

import torch
from torch import Tensor

from steersman.lm.lens import lens_tokens
from steersman.sae.feature_examples import Stretch, TopExamples
from steersman.steer.scores.base import Evidence, Score
from steersman.steer.scores.statistics import null_quantiles
from steersman.steer.scores.table import Column


class InputScore(Score):
    """Overlap of the tokens that activate a feature with those it writes."""

    name = "input"
    source = "arXiv 2505.20063 (formula from memory)"
    unit = "share of activating tokens"
    needs = ("texts",)
    settings = ("n_tokens", "n_examples", "permutations", "seed")

    @torch.no_grad()
    def measure(self, evidence: Evidence, at: int) -> Column:
        sae, config = evidence.saes[at], evidence.config
        examples, n = _activating(evidence, at)
        written = lens_tokens(evidence.lm, sae.W_dec, config.n_tokens).raised
        generator = torch.Generator().manual_seed(config.seed)
        live = (examples >= 0).any(1)
        orders = [torch.randperm(len(written), generator=generator) for _ in range(config.permutations)]
        by_chance = [share_written(examples, written[order]) for order in orders]
        permuted = torch.stack(by_chance, dim=1) if by_chance else torch.zeros(len(written), 0)
        null, null_max = null_quantiles(permuted.nan_to_num(nan=0.0), config.level)
        null = torch.where(live, null, torch.full_like(null, math.nan))
        values = share_written(examples, written)
        return evidence.column(self, at, values, n=n, null=null, null_max=null_max)


def share_written(examples: Tensor, written: Tensor) -> Tensor:
    """[L]: the share of the token ids `examples` [L, T] (-1 for none) that are among `written` [L, K]; NaN for none."""
    there = examples >= 0
    hits = (examples[:, :, None] == written[:, None, :]).any(2) & there
    return hits.sum(1) / there.sum(1).float()  # 0 / 0 is NaN


def _activating(evidence: Evidence, at: int) -> tuple[Tensor, int]:
    """The ids of the most activating tokens [L, T] of every feature, -1 where there are fewer, and the tokens read."""
    lm, sae, hook, config = evidence.lm, evidence.saes[at], evidence.hooks[at], evidence.config
    L, n, texts = sae.cfg.d_sae, 0, list(evidence.texts or [])
    kept, read = TopExamples(L, config.n_examples, 0, sae.device), Stretch(0, L)
    for start in range(0, len(texts), config.batch_size):
        batch = lm.encode(texts[start : start + config.batch_size], max_length=config.max_length or lm.context_length)
        h = lm.capture(batch.input_ids, batch.attention_mask, hooks=[hook])[hook]
        counted = batch.attention_mask.bool().clone()
        if lm.bos_token_id is not None:
            counted[:, 0] = False
        ids = batch.input_ids[counted].to(sae.device)
        code = sae.encode_sparse(h[counted].to(sae.device).float())
        read.add(code, ids, torch.zeros_like(ids, dtype=torch.bool))
        kept.merge(read.entries(large=False), read)  # of each the token, in place of a row
        n += len(ids)
    return kept.rows.cpu(), n
