"""The logit lens: which tokens a direction of the residual stream writes. Everything that shows tokens asks here.

Shape letters: n directions, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm.final_norm import norm_gain
from steersman.lm.hooks import LOGITS
from steersman.lm.model import LanguageModel

__all__ = ["LensTokens", "check_lens", "lens_logits", "lens_tokens", "logit_lens", "norm_gain"]

_BLOCK = 256  # directions whose logits are held at once


class LensTokens(NamedTuple):
    """The tokens that directions raise and lower most, strongest first: each [n, k]."""

    raised: Tensor
    """Ids of the tokens raised most."""
    raised_by: Tensor
    """Their logits, above the mean of all tokens."""
    lowered: Tensor
    """Ids of the tokens lowered most."""
    lowered_by: Tensor
    """Their logits, below the mean of all tokens."""


@torch.no_grad()
def lens_tokens(lm: LanguageModel, directions: Tensor, n_tokens: int) -> LensTokens:
    """The tokens each of `directions` [n, D] raises and lowers most through the final norm's gain and W_U [D, V].

    What the norm does besides, its scale and its bias, is the same for all tokens or for all directions, and left out.
    Raises SteersmanError for a model without an output layer.
    """
    W_U, norm = lm.unembed()
    gain, n_tokens = norm_gain(norm).to(W_U.device), min(n_tokens, W_U.shape[1])
    found = []
    for block in directions.detach().split(_BLOCK):
        logits = (block.to(W_U.device).float() * gain) @ W_U.float()
        logits -= logits.mean(dim=1, keepdim=True)
        top, bottom = logits.topk(n_tokens, dim=1), (-logits).topk(n_tokens, dim=1)
        found.append((top.indices, top.values, bottom.indices, -bottom.values))
    return LensTokens(*(torch.cat(part).cpu() for part in zip(*found)))


def logit_lens(lm: LanguageModel, directions: Tensor, n_tokens: int = 8) -> list[tuple[list[str], list[str]]]:
    """The tokens each of `directions` [n, D] raises and lowers most, as text: see `lens_tokens`.

    Two empty lists a direction for models without an output layer.
    """
    try:
        lm.unembed()
    except SteersmanError:  # an encoder without an output layer still has features worth reading
        return [([], []) for _ in directions]
    if not len(directions):
        return []
    found = lens_tokens(lm, directions, n_tokens)
    sides = zip(found.raised.tolist(), found.lowered.tolist())
    return [(_texts(lm.tokenizer, a), _texts(lm.tokenizer, b)) for a, b in sides]


def lens_logits(lm: LanguageModel, h: Tensor) -> Tensor:
    """The logits [..., V] fp32 that the model would give if states h [..., D] were those of its last block: the output
    layer of the final norm, and what the family does to its logits (a factor, a soft cap)."""
    head, norm, config = lm.model.get_output_embeddings(), lm.final_norm(), lm.config
    if head is None:
        raise SteersmanError(f"{lm.name} has no output layer over its vocabulary: it has no logit lens")
    logits = head(h if norm is None else norm(h)).float()
    logits = logits * float(getattr(config, "logit_scale", None) or 1.0)
    logits = logits / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()


@torch.no_grad()
def check_lens(lm: LanguageModel) -> None:
    """Raise a SteersmanError unless the logit lens of the last block gives the model's logits on a few tokens."""
    last = f"blocks.{lm.n_layers - 1}.hook_resid_post"
    ids = torch.arange(1, 5, device=lm.device)[None] % int(lm.config.vocab_size)
    with lm.unedited():
        states = lm.capture(ids, hooks=[last, LOGITS])
    if not torch.allclose(lens_logits(lm, states[last]), states[LOGITS].float(), rtol=1e-2, atol=1e-2):
        raise SteersmanError(
            f"the output of {lm.name} is not its output layer on the final norm of its last block: it has no logit lens"
        )


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]
