"""The logit lens: which tokens a direction of the residual stream writes. Everything that shows tokens asks here.

Shape letters: n directions, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm.final_norm import norm_gain
from steersman.lm.model import LanguageModel

__all__ = ["logit_lens", "norm_gain"]

_BLOCK = 256  # directions whose logits are held at once


@torch.no_grad()
def logit_lens(lm: LanguageModel, directions: Tensor, n_tokens: int = 8) -> list[tuple[list[str], list[str]]]:
    """The tokens each of `directions` [n, D] raises and lowers most through the final norm's gain and W_U [D, V].

    Two empty lists a direction for models without an output layer.
    """
    try:
        W_U, norm = lm.unembed()
    except SteersmanError:  # an encoder without an output layer still has features worth reading
        return [([], []) for _ in directions]
    gain, n_tokens = norm_gain(norm), min(n_tokens, W_U.shape[1])
    lens = []
    for block in directions.detach().split(_BLOCK):
        logits = (block.to(W_U.device).float() * gain.to(W_U.device)) @ W_U.float()
        logits -= logits.mean(dim=1, keepdim=True)
        top = logits.topk(n_tokens, dim=1).indices.tolist()
        bottom = (-logits).topk(n_tokens, dim=1).indices.tolist()
        lens += [(_texts(lm.tokenizer, a), _texts(lm.tokenizer, b)) for a, b in zip(top, bottom)]
    return lens


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]
