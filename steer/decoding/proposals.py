"""Proposals: how a particle's next token is drawn, and what that does to its weight.

Shape letters: R rows, V vocabulary, K candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.decoding.masks import Mask
from steersman.steer.decoding.population import Prefix


class Critic:
    """A guess of how a text will turn out: V > 0 of a partial text. A subclass says `log_values`.

    The proposal is p(x) V(text, x) over its sum, for the `top` likeliest tokens x (CriticControl, arXiv 2212.10938,
    equation 4; None: for all). Tokens outside them are not proposed. With V(text) = E_p[exp(lam r) | text] exactly,
    whole texts have the distribution p exp(lam r) / Z and equal weights.
    """

    top: int | None = 10
    hook: str | None = None
    """The hook point whose states after a candidate it reads; None where tokens are enough."""

    def check(self, lm: LanguageModel) -> None:
        """Raise a SteersmanError where it does not fit the model, before anything is run."""

    def log_values(self, prefixes: list[Prefix], candidates: Tensor, states: Tensor | None) -> Tensor:
        """[R, K] log V of each prefix followed by each of its `candidates` [R, K]; `states` [R, K, D] with a hook."""
        raise NotImplementedError  # each critic defines it


class FunctionCritic(Critic):
    """V from a function of the generated tokens: `fn(list of prefixes) -> V of each`, all above 0."""

    def __init__(self, fn: Callable[[list[Prefix]], Any], *, top: int | None = None) -> None:
        self.fn, self.top = fn, top

    def log_values(self, prefixes: list[Prefix], candidates: Tensor, states: Tensor | None) -> Tensor:
        longer = [(*prefix, x) for prefix, row in zip(prefixes, candidates.tolist()) for x in row]
        values = torch.as_tensor(self.fn(longer), dtype=torch.float64).reshape(candidates.shape)
        if not bool(((values > 0) & torch.isfinite(values)).all()):
            raise SteersmanError("a critic's values must be finite and above 0")
        return values.log()


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """q(x) of the next token: from p (or a guide's distribution) by the mask, temperature, top-k and top-p, then by the
    critic. The weight takes up b(x) / q(x) for the base b."""

    temperature: float = 1.0
    """Divides the log-probabilities; 0 takes the likeliest token."""
    top_k: int | None = None
    top_p: float | None = None
    corrected: bool = True
    """True: the base is the model's own p, whatever the temperature; the weight takes up the ratio, and tokens that
    top_k or top_p leave out have no share. False: the base is p under temperature, top_k and top_p."""
    mask: Mask | None = None
    critic: Critic | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or (self.temperature == 0 and self.corrected):
            raise SteersmanError(
                "temperature 0 takes the likeliest token, which no weight makes a sample of the model: corrected=False"
                if self.temperature == 0
                else f"temperature must be 0 or more, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise SteersmanError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SteersmanError(f"top_p must lie in (0, 1], got {self.top_p}")

    def distributions(
        self, log_p: Tensor, guide: Tensor | None, prefixes: list[Prefix], going: list[bool], remaining: int
    ) -> "Drawable":
        """(log b [R, V], log q [R, V]) for the rows of `log_p`, of which those `going` will be used; a row of q without
        a token is -inf throughout."""
        base = log_p if self.corrected else self._shaped(log_p)
        q = base if guide is None else guide
        if self.mask is not None:
            allowed = torch.ones(q.shape, dtype=torch.bool)
            known: dict[Prefix, Tensor] = {}  # particles of one text share its row
            for i, prefix in enumerate(prefixes):
                if going[i]:
                    if prefix not in known:
                        known[prefix] = self.mask.allowed(prefix, remaining)
                    allowed[i] = known[prefix]
            q = normalised(q.masked_fill(~allowed.to(q.device), -torch.inf))
        return Drawable(base, self._shaped(q) if self.corrected else q)

    def twisted(
        self, q: Tensor, prefixes: list[Prefix], peek: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """(log q' [R, V], log V [R, V]): q times the critic's V over its likeliest tokens, normalised."""
        assert self.critic is not None
        k = q.shape[1] if self.critic.top is None else min(self.critic.top, q.shape[1])
        top = q.topk(k, dim=1)
        states = peek(top.indices) if peek is not None and self.critic.hook is not None else None
        values = self.critic.log_values(prefixes, top.indices, states).to(q)
        if values.shape != top.indices.shape or bool(torch.isnan(values).any()):
            raise SteersmanError("a critic must return one number, not NaN, for every candidate")
        table = torch.zeros_like(q).scatter(1, top.indices, values)
        new = torch.full_like(q, -torch.inf).scatter(1, top.indices, top.values + values)
        return normalised(new), table

    def _shaped(self, log_p: Tensor) -> Tensor:
        """Under temperature, then the `top_k` likeliest, then the nucleus `top_p` of those, normalised."""
        if self.temperature == 1 and self.top_k is None and self.top_p in (None, 1):
            return log_p
        if self.temperature == 0:
            best = log_p.argmax(1, keepdim=True)
            dead = (log_p == -torch.inf).all(1, keepdim=True)
            return torch.full_like(log_p, -torch.inf).scatter(1, best, 0.0).masked_fill(dead, -torch.inf)
        x = log_p / self.temperature
        if self.top_k is not None and self.top_k < x.shape[1]:
            least = x.topk(self.top_k, dim=1).values[:, -1:]
            x = x.masked_fill(x < least, -torch.inf)
        x = normalised(x)
        if self.top_p is not None and self.top_p < 1:
            p, order = x.exp().sort(dim=1, descending=True)
            kept = p.cumsum(1) - p < self.top_p  # those before it do not reach top_p; the first always stays
            x = normalised(x.masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), -torch.inf))
        return x


@dataclass(frozen=True)
class Drawable:
    """Distributions of the next token of R rows."""

    base: Tensor
    """[R, V]: log b, what the target is made of."""
    q: Tensor
    """[R, V]: log q, what tokens are drawn from."""


def normalised(log_p: Tensor) -> Tensor:
    """Log-probabilities that sum to 1 in each row [R, V]; rows of -inf stay so."""
    total = log_p.logsumexp(1, keepdim=True)
    return torch.where(total == -torch.inf, log_p, log_p - total)


def draw(log_q: Tensor, uniform: Tensor) -> Tensor:
    """[R, n] int64: tokens of each row of `log_q` [R, V] at the numbers `uniform` [R, n] in [0, 1); 0 in rows that have
    none. A token without probability is never drawn."""
    total = log_q.double().exp().cumsum(1)
    place = torch.searchsorted(total, uniform.to(total) * total[:, -1:], right=True)
    columns = torch.arange(log_q.shape[1], device=log_q.device)
    last = columns.where(log_q > -torch.inf, -1).amax(1, keepdim=True).clamp_min(0)
    return torch.minimum(place, last)
