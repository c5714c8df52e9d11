"""FGAA targets (arXiv 2501.09929): what to aim at, from texts that show the behaviour and texts that do not.

    v_diff = mean of f over the positive texts' tokens - mean of f over the negative texts' tokens

in feature space, then three filters: features denser than `max_density` are noise, features that fire on the
beginning-of-sequence token are artefacts, and of the rest the `n_positive` largest rises and the `n_negative` largest
falls are kept. The weights are scaled to an absolute sum of 1 and given to `EffectMap.solve`, which is the paper's
last step. Differs from the paper in that every token of every text but BOS counts the same.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.lm.tokens import bos_tokens
from steersman.sae import SAE, SparseCode


def fgaa_targets(
    lm: LanguageModel,
    sae: SAE,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    max_density: float = 0.01,
    n_positive: int = 8,
    n_negative: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
) -> dict[int, float]:
    """Feature id -> weight, largest first, for `EffectMap.solve`.

    Densities are those of the SAE's statistics or, where it has none, of the texts given. Raises SteersmanError for
    empty lists, an SAE of another model, and when the filters leave no feature.
    """
    if isinstance(positive, str) or isinstance(negative, str) or not positive or not negative:
        raise SteersmanError("FGAA contrasts two lists of texts: positive and negative, neither of them empty")
    if n_positive < 0 or n_negative < 0 or n_positive + n_negative == 0:
        raise SteersmanError("FGAA keeps at least one feature: set n_positive or n_negative above 0")
    hook = check_sae_fits(lm, sae)
    with_feature, bos = _means(lm, sae, hook, positive, batch_size, max_length)
    without, _ = _means(lm, sae, hook, negative, batch_size, max_length)
    difference = with_feature.mean - without.mean
    total = with_feature.tokens + without.tokens
    density = (with_feature.fired + without.fired) / total
    if sae.feature_stats is not None:
        density = sae.feature_stats.density.cpu().double()
    kept = (density <= max_density) & ~bos
    rises = (difference.where(kept, torch.zeros_like(difference))).clamp_min(0).topk(min(n_positive, len(kept)))
    falls = (-difference.where(kept, torch.zeros_like(difference))).clamp_min(0).topk(min(n_negative, len(kept)))
    chosen = [(int(j), float(v)) for v, j in zip(*rises) if v > 0] + [
        (int(j), -float(v)) for v, j in zip(*falls) if v > 0
    ]
    if not chosen:
        differ, dense = int((difference != 0).sum()), int((density > max_density).sum())
        raise SteersmanError(
            f"the filters of FGAA leave no feature: {differ} differ, {dense} "
            f"are denser than {max_density:g}, {int(bos.sum())} fire on BOS; raise max_density or give clearer texts"
        )
    size = sum(abs(v) for _, v in chosen)
    return {j: v / size for j, v in sorted(chosen, key=lambda item: -abs(item[1]))}


class _Means:
    """Mean activation and count of firing tokens of each feature, over `tokens` tokens."""

    def __init__(self, n_latents: int) -> None:
        self.sums = torch.zeros(n_latents, dtype=torch.float64)
        self.fired = torch.zeros(n_latents, dtype=torch.float64)
        self.tokens = 0

    @property
    def mean(self) -> Tensor:
        return self.sums / max(1, self.tokens)

    def add(self, code: SparseCode) -> None:
        indices = code.indices.flatten().cpu()
        self.sums.index_add_(0, indices, code.values.flatten().cpu().double())
        self.fired.index_add_(0, indices, code.active.flatten().cpu().double())
        self.tokens += len(code.values)


@torch.no_grad()
def _means(
    lm: LanguageModel, sae: SAE, hook: str, texts: Iterable[str], batch_size: int, max_length: int | None
) -> tuple[_Means, Tensor]:
    """Sums over the tokens of the texts but BOS, and which features [L] bool fire on BOS."""
    texts = list(texts)
    means, bos = _Means(sae.cfg.d_sae), torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    limit = max_length or lm.context_length
    for start in range(0, len(texts), batch_size):
        batch = lm.encode(texts[start : start + batch_size], max_length=limit)
        h = lm.capture(batch.input_ids, batch.attention_mask, hooks=[hook])[hook]
        first = bos_tokens(batch.input_ids, batch.attention_mask, lm.bos_token_id)
        means.add(sae.encode_sparse(h[batch.attention_mask.bool() & ~first]))
        if bool(first.any()) and start == 0:
            at_bos = sae.encode_sparse(h[first][:1])
            bos[at_bos.indices[at_bos.active].cpu()] = True
    if not means.tokens:
        raise SteersmanError("the texts hold no token besides BOS")
    return means, bos
