"""Strength by need: each step steers as much as steering would change the next token.

Dynamic Activation Composition (arXiv 2406.17563). At every step, with p the next-token distribution of the unsteered
model and q_k that of the model steered by property k at the largest strength throughout, both on the text so far:

    Q = nucleus(p) u nucleus(q_k),    a_k = clip(KL(p || q_k) on Q, 0, strongest)

and the text goes on under sum_k a_k Delta_k at this step's position, while earlier positions keep the strengths that
they had. With K properties that is K + 2 streams of one model, each with a KV cache of its own: the unsteered one, one
for each property, and the real one, which runs last because it needs the a_k. Since an edit at an earlier position is
already in its stream's cache, one token each is exact.

Differences from the authors' code: theirs divides the KL by |Q| (`per_token=True`; the paper does not), runs whole
sequences again for every token, and one text at a time.

Shape letters: B rows, V vocabulary, T new tokens, K properties.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm import Generation, LanguageModel
from steersman.lm.tokens import Prompt, TokenBatch
from steersman.steer.decoding.streams import Chooser, Stream, continue_rows, encoded
from steersman.steer.dose import Dosed, steered
from steersman.steer.scope import ScopeLike

HEAD = 256
"""Likeliest tokens that are looked at before all are sorted."""
STEPS = "last_prompt+generation"
"""The tokens whose output chooses a generated token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Controlled:
    """A text, and how strongly each of its tokens was steered."""

    generation: Generation
    """What was written."""
    strengths: Tensor
    """[B, T, K] fp32: a_k at the position that chose each generated token; 0 after the end of a row."""
    kl: Tensor
    """[B, T, K] fp32: the KL that each was taken from, before it was clipped."""

    @property
    def mean_strength(self) -> Tensor:
        """[K]: mean over the tokens that were written."""
        real = self.generation.new_mask.to(self.strengths)[:, : self.strengths.shape[1], None]
        return (self.strengths * real).sum((0, 1)) / real.sum()


@dataclass(frozen=True, kw_only=True, eq=False)
class KLControl:
    """Properties that each step steers towards by as much as its text still lacks them.

    A property is anything that has a strength: a vector (one with a direction for each generated step too), {hook
    point: edit}, a recipe, or a function from a strength (a number, or one per row) to a context manager. The paper's
    are differences of head outputs at every layer, one for each of 30 steps.

    >>> control = KLControl(properties=[{}], top_p=0.9)
    """

    properties: Sequence[Dosed]
    """What to steer towards, each against the unsteered model."""
    strongest: float = 2.0
    """The strength that is tried, and the largest that is used."""
    top_p: float = 0.9
    """The nucleus in which distributions are compared (the paper tries .4 to .95)."""
    per_token: bool = False
    """Divide the KL by |Q|, as the authors' code does and their paper does not."""
    scope: ScopeLike = STEPS
    """Where the properties act; by default at the last position of each step."""

    def __post_init__(self) -> None:
        if not self.properties:
            raise SteersmanError("KL-controlled steering needs at least one property")
        if not self.strongest > 0:
            raise SteersmanError(f"strongest must be above 0, got {self.strongest}")
        if not 0 < self.top_p <= 1:
            raise SteersmanError(f"top_p must lie in (0, 1], got {self.top_p}")

    @torch.no_grad()
    def generate(
        self,
        lm: LanguageModel,
        prompts: str | Sequence[Prompt] | Tensor,
        *,
        max_new_tokens: int = 40,
        do_sample: bool | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        bos: bool = True,
    ) -> Controlled:
        """Continue each prompt; settings as for `LanguageModel.generate` (its `top_p` is that of the sampling)."""
        steps = whole_number(max_new_tokens, "max_new_tokens", at_least=1)
        chooser = Chooser(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        given, batch = encoded(lm, prompts, bos)
        lm.check_room(batch.input_ids.shape[1], steps)
        with ExitStack() as stack:
            run = _Run(self, lm, batch, stack)
            text = continue_rows(lm, given, batch, len(given), run.next_logits, run.feed, chooser, steps)
        real = text.new_mask.to(torch.float32)[..., None].to(run.strengths[0].device)
        return Controlled(
            generation=text, strengths=torch.stack(run.strengths, 1) * real, kl=torch.stack(run.found, 1) * real
        )

    def strength(self, unsteered: Tensor, steered: Tensor) -> tuple[Tensor, Tensor]:
        """(a [B], KL [B]) from logits [B, V] of the unsteered and of the steered model."""
        kl = nucleus_kl(unsteered, steered, self.top_p, per_token=self.per_token)
        return kl.clamp(0, self.strongest), kl


def nucleus_kl(p: Tensor, q: Tensor, top_p: float, *, per_token: bool = False) -> Tensor:
    """[B] fp32: KL(p || q) of logits [B, V], both normalised again on the union of their nuclei; over its size where
    `per_token`.

    >>> nucleus_kl(torch.tensor([[0.0, 0.0, -9.0]]), torch.tensor([[0.0, 0.0, -9.0]]), 0.9)
    tensor([0.])
    """
    kept = _nucleus(p.float(), top_p) | _nucleus(q.float(), top_p)
    logp, logq = (x.float().masked_fill(~kept, -torch.inf).log_softmax(-1) for x in (p, q))
    terms = torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp - logq))
    kl = terms.sum(-1).clamp(min=0)
    return kl / kept.sum(-1) if per_token else kl


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """[B, V] bool: the smallest set of the likeliest tokens with at least this probability."""
    p = logits.softmax(-1)
    largest, ids = p.topk(min(HEAD, p.shape[-1]), dim=-1)
    if bool((largest.sum(-1) < top_p).any()):  # a flat distribution: its nucleus is longer
        largest, ids = p.sort(dim=-1, descending=True)
    kept = largest.cumsum(-1) - largest < top_p
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, ids, kept)


class _Run:
    """The K + 2 streams of one batch."""

    def __init__(self, control: KLControl, lm: LanguageModel, batch: TokenBatch, stack: ExitStack) -> None:
        self.control, self.lm = control, lm
        self.strengths: list[Tensor] = []
        self.found: list[Tensor] = []
        self.plain = stack.enter_context(Stream(lm, batch))
        self.probes = [
            stack.enter_context(Stream(lm, batch, steering=self._steered(one, control.strongest)))
            for one in control.properties
        ]
        self._measure()
        self.real = stack.enter_context(Stream(lm, batch, each_pass=self._as_measured))

    def _steered(self, one: Dosed, strength: Any) -> AbstractContextManager[Any]:
        return steered(one, self.lm, scale=strength, scope=self.control.scope)

    def _measure(self) -> None:
        base = self.plain.logits()
        found = [self.control.strength(base, probe.logits()) for probe in self.probes]
        self.strengths.append(torch.stack([a for a, _ in found], 1))
        self.found.append(torch.stack([kl for _, kl in found], 1))

    def _as_measured(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for k, one in enumerate(self.control.properties):
            strength = self.strengths[-1][:, k]
            if bool((strength > 0).any()):
                stack.enter_context(self._steered(one, strength))
        return stack

    def next_logits(self) -> Tensor:
        return self.real.logits()

    def feed(self, tokens: Tensor) -> None:
        for stream in (self.plain, *self.probes):
            stream.feed(tokens)
        self._measure()
        self.real.feed(tokens)
