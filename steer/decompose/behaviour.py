"""Coefficients by what they do: gradient descent on the steered loss plus L1.

From a matching pursuit of 2k features, minimise over c

    mean over tokens of KL(p_v || p_c) + l1 |c|_1 / |v|

with p_v and p_c the model's next-token distributions steered by v and by W_dec^T c. Adam on the first term, a proximal
step (soft threshold) for the second; after two thirds of the steps the k largest coefficients are kept and the penalty
is dropped. So a feature stays for what it does to the model's output, not for the length it explains: arXiv 2411.08790
asks of a decomposition that steering with it does what steering with v does.

Shape letters: D width, M features, B texts, S tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.tokens import bos_tokens
from steersman.steer.decompose.base import Method, Problem, Sources
from steersman.steer.decompose.omp import matching_pursuit
from steersman.steer.decompose.terms import Terms, largest
from steersman.steer.steerer import Steerer

L1, STEPS, RATE = 0.01, 60, 0.03
_TOKENS = 128  # of each text


class Behaviour(Method):
    """Coefficients refined by gradient descent on what they do."""

    name = "behaviour"
    source = "arXiv 2411.08790 (its requirements)"
    reads = ("texts", "lm")
    settings = ("scale", "l1", "steps")
    needs_k = True
    independent = True

    def read(self, sources: Sources) -> list[str]:
        texts = list(sources.texts or ())
        if sources.lm is None or not texts:
            raise SteersmanError("method 'behaviour' needs the model and texts to compare on: give lm= and texts=")
        return texts

    def terms(self, problem: Problem) -> list[Terms]:
        assert problem.lm is not None
        return [_refine(problem, problem.lm, v) for v in problem.vectors]


def _refine(problem: Problem, lm: LanguageModel, v: Tensor) -> Terms:
    config, atoms = problem.config, problem.atoms
    assert config.k is not None
    start = matching_pursuit(v[None], atoms, min(2 * config.k, len(v)))[0]
    directions = atoms.unit(start.features).float().to(lm.device)
    size, a = float(v.norm()), config.scale or 1.0
    steps, l1 = config.steps or STEPS, L1 if config.l1 is None else config.l1
    batch = lm.encode(problem.data, max_length=min(_TOKENS, lm.context_length or _TOKENS))
    match = _Match(lm, problem.hook, batch, a * v.float().to(lm.device))
    c = (start.coefficients / size).float().to(lm.device).requires_grad_()
    optimizer = torch.optim.Adam([c], lr=RATE)
    kept = torch.ones_like(c, dtype=torch.bool)
    first = last = 0.0
    for step in range(steps):
        shrinking = step < 2 * steps // 3
        with torch.enable_grad():
            loss = match.divergence(a * size * (c * kept) @ directions)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        last = float(loss.detach())
        first = last if step == 0 else first
        with torch.no_grad():
            if shrinking:
                c.copy_(c.sign() * (c.abs() - RATE * l1).clamp_min(0))
            elif step == 2 * steps // 3:
                kept = torch.zeros_like(kept)
                kept[largest(c.detach(), config.k)] = True
            c.mul_(kept)
    values = c.detach().double().to(v.device) * size
    order = largest(values, config.k)
    details = {"kl_at_start": first, "kl_at_end": last, "l1": l1}
    return Terms(features=start.features[order], coefficients=values[order], details=details)


class _Match:
    """KL(p_v || p_c) on fixed texts, differentiable in the vector of c."""

    def __init__(self, lm: LanguageModel, hook: str, batch: Any, v: Tensor) -> None:
        self.lm, self.hook, self.batch = lm, hook, batch
        self.real = batch.attention_mask.bool() & ~bos_tokens(batch.input_ids, batch.attention_mask, lm.bos_token_id)
        with torch.no_grad():
            self.target = self._logp(v)

    def _logp(self, vector: Tensor) -> Tensor:
        """[n, V] log probabilities at every real token, steered by `vector` [D]."""
        with Steerer(self.lm).vector(vector, hook=self.hook):
            logits = self.lm.logits(self.batch.input_ids, self.batch.attention_mask, grad=True)
        return logits[self.real].float().log_softmax(-1)

    def divergence(self, vector: Tensor) -> Tensor:
        """Mean KL in nats per token."""
        return (self.target.exp() * (self.target - self._logp(vector))).sum(-1).mean()
