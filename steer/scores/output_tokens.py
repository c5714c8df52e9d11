"""What a feature does to the output, as tokens: two lists that need no example of what activates it.

| list | what |
|---|---|
| `vocab_projection` | tokens of W_U ln_f(d_j), most raised and most lowered (VocabProj: 50 of each) |
| `token_change` | tokens whose logit changes most, on average over texts, with f_j clamped (TokenChange: 10 of each) |

Source: arXiv 2501.08319, with its authors' code: the projection finds inputs even for features that never fired;
TokenChange takes 32 random texts of 32 tokens and clamps to 10 and, as another list, to -10.

Shape letters: M features, B texts, S tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.lens import lens_tokens
from steersman.lm.origin import check_sae_fits
from steersman.sae import SAE
from steersman.steer.edits import FeatureEdit
from steersman.steer.steerer import Steerer

PASS_LOGITS = 1 << 26
"""Logits of one pass of `token_change`, at most: 256 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class OutputTokens:
    """The tokens that a feature raises and lowers most, strongest first."""

    feature: int
    """Feature id."""
    raised: tuple[str, ...]
    """Tokens raised, as text."""
    raised_by: tuple[float, ...]
    """By how much, in logits."""
    lowered: tuple[str, ...]
    """Tokens lowered."""
    lowered_by: tuple[float, ...]
    """By how much, negative."""

    def to_text(self, n: int = 10) -> str:
        """One line: the first n of each list."""
        return f"{self.feature:>8}  + {' '.join(map(repr, self.raised[:n]))}  - {' '.join(map(repr, self.lowered[:n]))}"


def vocab_projection(lm: LanguageModel, sae: SAE, features: Sequence[int], *, n_tokens: int = 50) -> list[OutputTokens]:
    """The tokens of W_U ln_f(d_j) for each of `features`: logits above and below the mean of all tokens.

    Raises SteersmanError for a feature out of range and a model without an output layer.
    """
    ids = _checked(sae, features)
    found = lens_tokens(lm, sae.W_dec[torch.tensor(ids, device=sae.device)], n_tokens)
    return [_described(lm, feature, *(part[m] for part in found)) for m, feature in enumerate(ids)]


@torch.no_grad()
def token_change(
    lm: LanguageModel,
    sae: SAE,
    features: Sequence[int],
    texts: Sequence[str],
    *,
    value: float | Mapping[int, float] = 10.0,
    n_tokens: int = 10,
    max_length: int = 32,
    hook: str | None = None,
) -> list[OutputTokens]:
    """The tokens whose logits change most when f_j is clamped to `value` (raw; one for all, or by feature id)
    everywhere, BOS aside: the mean over the texts' tokens of the change. A pass holds the texts of as many features as
    `PASS_LOGITS` allows.

    Raises SteersmanError as `Steerer.features` does, and for texts of the BOS alone.
    """
    where, ids = check_sae_fits(lm, sae, hook), _checked(sae, features)
    if not texts:
        raise SteersmanError("token_change needs texts to clamp the feature on")
    batch = lm.encode(list(texts), max_length=max_length)
    counted = batch.attention_mask.bool().clone()
    if lm.bos_token_id is not None:
        counted[:, 0] = False
    if not bool(counted.any()):
        raise SteersmanError("token_change: the texts have no token besides the BOS")

    def mean_logits(n: int) -> Tensor:  # [n, V] float64: of n copies of the texts
        logits = lm.logits(batch.input_ids.repeat(n, 1), batch.attention_mask.repeat(n, 1))
        return torch.stack([part[counted].double().mean(0).cpu() for part in logits.chunk(n)])

    base, st, found = mean_logits(1)[0], Steerer(lm), []
    together = max(1, PASS_LOGITS // (batch.input_ids.numel() * len(base)))
    for start in range(0, len(ids), together):
        part = ids[start : start + together]
        clamped = [{j: value[j] if isinstance(value, Mapping) else value} for j in part]
        rows = [row for row in clamped for _ in texts]
        with st.edit(where, FeatureEdit(sae, rows, mode="clamp")):
            changes = mean_logits(len(part)) - base
        for feature, change in zip(part, changes):
            top, bottom = (sign * change for sign in (1, -1))
            up, down = top.topk(min(n_tokens, len(top))), bottom.topk(min(n_tokens, len(top)))
            found.append(_described(lm, feature, up.indices, up.values, down.indices, -down.values))
    return found


def _checked(sae: SAE, features: Sequence[int]) -> list[int]:
    for feature in features:
        sae.check_feature(feature)
    return [int(feature) for feature in features]


def _described(
    lm: LanguageModel, feature: int, raised: Tensor, raised_by: Tensor, lowered: Tensor, lowered_by: Tensor
) -> OutputTokens:
    def texts(ids: Tensor) -> tuple[str, ...]:
        return tuple(lm.tokenizer.decode([token]) for token in ids.tolist())

    return OutputTokens(
        feature=feature, raised=texts(raised), raised_by=tuple(raised_by.tolist()),
        lowered=texts(lowered), lowered_by=tuple(lowered_by.tolist()),
    )  # fmt: skip
