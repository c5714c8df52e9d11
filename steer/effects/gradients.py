"""Effects without steering: from unsteered texts and the gradient of each one's log-likelihood.

For a vector v that is added while a text x_1..x_T is written with probability p_v(x), the derivative of what a feature
averages to is an average over unsteered texts alone (the score function of Williams 1992, here with respect to v):

    d E_v[f_j(x)] / dv = E[(f_j(x) - mean) g(x)],    g(x) = d log p_v(x) / dv  at v = 0.

One backward pass through a text gives g [D] and so what the text says about every direction and every feature, where a
steered text says something of the one direction that it was steered in. The same g give the cost of steering:

    KL(p_v || p) per token = 1/2 v^T F v,    F = E[g g^T] / T,

and the vector that raises feature j most at a given KL is F^-1 times the derivative: the natural gradient, which is
ridge regression of f_j on g.

Shape letters: n texts, D width, L latents, T new tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from steersman.steer.effects.rollouts import PromptGroup, RolloutMeter, uniforms

_LOGITS = 1 << 25
"""Numbers of one pass's logits, at most: 128 MiB of fp32, of which backward needs a few."""


class TextScores(NamedTuple):
    """n unsteered texts."""

    gradient: Tensor
    """[n, D] fp32: derivative of the log-likelihood of the new tokens with respect to a vector that is added."""
    mean: Tensor
    """[n, L] fp32: average activation of each feature over the counted positions."""
    positions: Tensor
    """[n] int64: counted positions."""


def text_scores(meter: RolloutMeter, first: int, n: int) -> TextScores:
    """Texts number `first` to `first + n - 1` of a configuration: each is decided by its number and the seed."""
    config, L = meter.config, meter.sae.cfg.d_sae
    numbers = torch.arange(first, first + n)
    gradient, mean = torch.zeros(n, meter.lm.hook_width(meter.hook)), torch.zeros(n, L)
    positions = torch.zeros(n, dtype=torch.long)
    nothing = torch.zeros(1, gradient.shape[1])
    for group in meter.groups:
        mine = torch.isin(numbers % len(config.openings), group.members).nonzero()[:, 0]
        for part in mine.split(meter.most_rows):
            drawn = torch.cat([uniforms(config.seed, int(i), 1, config.new_tokens) for i in numbers[part]])
            table, counts, texts = meter.unsteered(group, nothing, numbers[part], drawn[None])
            mean[part] = (table[0] / counts[0].clamp_min(1)[:, None]).cpu()
            positions[part] = counts[0].cpu()
            gradient[part] = _gradients(meter, group, *texts).cpu()
    return TextScores(gradient, mean, positions)


def _gradients(meter: RolloutMeter, group: PromptGroup, tokens: Tensor, mask: Tensor) -> Tensor:
    """d log p / dv [n, D] of the new tokens of texts [n, S], v added where the configuration steers."""
    lm, config, width = meter.lm, meter.config, group.prompts.input_ids.shape[1]
    together = max(1, _LOGITS // (tokens.shape[1] * lm.config.vocab_size))
    found = []
    for part in torch.arange(len(tokens)).split(together):
        v = torch.zeros(len(part), lm.hook_width(meter.hook), device=tokens.device, requires_grad=True)
        with torch.enable_grad(), meter.steering(v):
            logits = lm.logits(tokens[part], mask[part], prompt_length=width, grad=True)[:, width - 1 : -1]
            likelihood = config.sampling.log_prob(logits, tokens[part][:, width:])
            total = likelihood.masked_fill(mask[part][:, width:] == 0, 0.0).sum()
            found.append(torch.autograd.grad(total, v)[0].float())
    return torch.cat(found)
