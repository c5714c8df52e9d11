"""The scale of each vector, by rule (arXiv 2411.02193, sec. 3).

With g(s) the rise in loss on held-out text (or the KL divergence there) when s times the unit vector is added, the
scale is the smallest s with g(s) = target. A vector that does not pass the target up to the largest scale allowed is
reported as not reached.

Shape letters: G vectors, n of them in a batch, S texts, C tokens of a text, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.tokens import bos_tokens
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.measures import token_kl
from steersman.steer.scale_search import Scales, search_scales
from steersman.steer.steerer import Steerer

_LOGITS = 1 << 25
"""Numbers of one pass's logits, at most: 128 MiB of fp32."""


@dataclass
class HeldOut:
    """Held-out texts as one batch and the unsteered model's answer to them."""

    tokens: Tensor
    """[S, C] int64, padded on the right."""
    mask: Tensor
    """[S, C] int64."""
    logits: Tensor
    """[S, C, V]: of the unsteered model."""
    chosen: Tensor
    """[S, C-1] bool: predictions that count: of a real token, from a token that is steered (BOS is not)."""

    @classmethod
    def of(cls, lm: LanguageModel, texts: Sequence[str], config: EffectsConfig) -> "HeldOut":
        """The first `heldout_texts` texts, `heldout_tokens` tokens of each. Raises SteersmanError without any."""
        kept = [text for text in texts if text.strip()][: config.heldout_texts]
        if not kept:
            raise SteersmanError(
                f"scale_rule {config.scale_rule!r} measures on held-out text: give texts, or use 'norm' or 'fixed'"
            )
        batch = lm.encode(config.apply(kept), max_length=config.heldout_tokens)
        real = batch.attention_mask.bool()
        chosen = real[:, 1:].clone()
        if not config.include_bos:
            chosen &= ~bos_tokens(batch.input_ids, batch.attention_mask, lm.bos_token_id)[:, :-1]
        if not bool(chosen.any()):
            raise SteersmanError("the held-out texts are too short: each needs at least two tokens after BOS")
        logits = lm.logits(batch.input_ids, batch.attention_mask)
        return cls(batch.input_ids, batch.attention_mask, logits, chosen)

    def nll(self, logits: Tensor) -> Tensor:
        """Mean negative log-likelihood [n] of the texts under logits [n * S, C, V], the texts repeated n times."""
        n, (S, C) = logits.shape[0] // len(self.tokens), self.tokens.shape
        wanted = self.tokens[:, 1:].expand(n, S, C - 1)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.reshape(-1), reduction="none")
        return self._mean(loss.view(n, S, C - 1))

    def kl(self, logits: Tensor) -> Tensor:
        """Mean KL(steered || base) [n], from logits [n * S, C, V]."""
        steered = logits.view(-1, *self.logits.shape)[:, :, :-1]
        return self._mean(torch.stack([token_kl(row, self.logits[:, :-1]) for row in steered]))

    def _mean(self, values: Tensor) -> Tensor:
        return (values * self.chosen).double().sum(dim=(1, 2)) / self.chosen.sum()


class ScaleRule:
    """Finds the scales of unit vectors by the rule of a configuration."""

    def __init__(self, lm: LanguageModel, hook: str, config: EffectsConfig, median_norm: float, texts: Sequence[str]):
        self.lm, self.hook, self.config, self.median_norm = lm, hook, config, median_norm
        self.steerer = Steerer(lm)
        self.heldout = HeldOut.of(lm, texts, config) if config.needs_texts else None
        if self.heldout is not None:
            self.base_nll = self.heldout.nll(self.heldout.logits)

    def typical(self, vectors: Tensor) -> float:
        """The median scale of unit vectors [G, D]: where to start looking for those of others."""
        return float(self.find(vectors).scale.median())

    def find(self, vectors: Tensor, start: float | None = None) -> Scales:
        """The scales of unit vectors [G, D]; the search starts at `start`, or low where it is None."""
        config = self.config
        if self.heldout is None:
            unit = self.median_norm if config.scale_rule == "norm" else 1.0
            scale = torch.full((len(vectors),), config.target * unit)
            return Scales(scale, torch.full_like(scale, float("nan")), torch.ones(len(scale), dtype=torch.bool))
        return search_scales(
            lambda which, scales: self.measure(vectors[which], scales),
            len(vectors),
            target=config.target,
            start=0.4 * self.median_norm if start is None else start,
            limit=config.scale_limit * self.median_norm,
            tolerance=config.scale_tolerance,
        )

    @torch.no_grad()
    def measure(self, vectors: Tensor, scales: Tensor) -> Tensor:
        """The rule's measure [n] for unit vectors [n, D] at `scales` [n]."""
        assert self.heldout is not None
        texts = self.heldout
        S, C = texts.tokens.shape
        together = max(1, min(self.config.batch_rows // S, _LOGITS // (S * C * texts.logits.shape[-1])))
        found = []
        for start in range(0, len(vectors), together):
            part = slice(start, start + together)
            n = len(vectors[part])
            rows = vectors[part].to(self.lm.device).repeat_interleave(S, 0)
            scale = scales[part].to(self.lm.device).repeat_interleave(S)
            with self.steerer.vector(
                rows, scale=scale, hook=self.hook, scope=self.config.scope, include_bos=self.config.include_bos
            ):
                # everything after BOS counts as generated, so that scope 'generation' steers it
                logits = self.lm.logits(texts.tokens.repeat(n, 1), texts.mask.repeat(n, 1), prompt_length=1)
            found.append(texts.nll(logits) - self.base_nll if self.config.scale_rule == "loss" else texts.kl(logits))
        return torch.cat(found)
