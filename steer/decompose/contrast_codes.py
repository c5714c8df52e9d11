"""Contrasting texts instead of the vector: `mean f(x+) - mean f(x-)`, with Welch's t statistic per feature.

The encoder reads activations it was made for, and the difference has both signs: neither fault of encoding v itself
(arXiv 2411.08790) applies. Of texts, each text is one sample (the mean of its tokens' codes, or its last token's), as
tokens of one text are not independent; of activations, each row is one. The coefficients are brought to v's length: v
may be the difference of means at any scale.

Shape letters: N samples, L latents, D width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.tokens import bos_tokens
from steersman.sae import SAE
from steersman.steer.decompose.base import Method, Problem, Sources, batches_of
from steersman.steer.decompose.response import dense, t_statistic
from steersman.steer.decompose.terms import Terms, largest

_CHUNK = 128
_TEXTS = 16  # texts of one pass


class Side:
    """Sums over the samples of one side: of codes, of their squares, and of activations."""

    def __init__(self, sae: SAE, samples: Iterator[tuple[Tensor, Tensor]], name: str) -> None:
        self.n = 0
        wide = {"dtype": torch.float64, "device": sae.device}
        self.codes, self.squares = torch.zeros(sae.cfg.d_sae, **wide), torch.zeros(sae.cfg.d_sae, **wide)
        self.x = torch.zeros(sae.cfg.d_in, **wide)
        for codes, x in samples:
            if not bool(x.isfinite().all()):
                raise SteersmanError(f"the {name} activations hold NaN or infinite values")
            self.codes += codes.sum(dim=0)
            self.squares += codes.square().sum(dim=0)
            self.x += x.double().sum(dim=0)
            self.n += len(x)
        if self.n < 2:
            raise SteersmanError(f"contrast needs at least 2 {name} samples, got {self.n}")

    @property
    def centre(self) -> Tensor:
        """Mean activation [D]."""
        return self.x / self.n

    @property
    def mean(self) -> Tensor:
        """Mean code [L]."""
        return self.codes / self.n

    @property
    def variance(self) -> Tensor:
        """Variance [L] of the mean code."""
        return (self.squares / self.n - self.mean.square()).clamp_min(0) / (self.n - 1)


class ContrastCodes(Method):
    """The difference of mean codes, at the length of v."""

    name = "contrast"
    source = "arXiv 2411.08790 (its requirements); Welch 1947"
    reads = ("positive", "negative")
    settings = ("positions",)
    makes_vector = True

    def read(self, sources: Sources) -> tuple[Side, Side]:
        plus, minus = (Side(sources.sae, _samples(sources, name), name) for name in ("positive", "negative"))
        return plus, minus

    def own_vector(self, data: tuple[Side, Side]) -> Tensor:
        plus, minus = data
        return plus.centre - minus.centre

    def terms(self, problem: Problem) -> list[Terms]:
        plus, minus = problem.data
        difference, t = plus.mean - minus.mean, t_statistic(plus.mean - minus.mean, plus.variance + minus.variance)
        delta = plus.centre - minus.centre
        terms = []
        for v in problem.vectors:
            cosine = float(v @ delta / (v.norm() * delta.norm()))
            stretch = float(v @ delta / delta.square().sum())
            values = difference * problem.atoms.norms * stretch
            values = torch.where(problem.atoms.usable, values, 0.0)
            ids = largest(values, problem.config.k)
            warnings = []
            if cosine < 0.9:
                warnings.append(
                    f"v is not the difference of these texts (cosine {cosine:.2f}): contrast takes the texts apart, "
                    "not v"
                )
            if min(plus.n, minus.n) < 8:
                warnings.append(f"{plus.n} positive and {minus.n} negative samples are few: distrust |t| below 4")
            details = {"cosine_to_difference": cosine, "n_positive": float(plus.n), "n_negative": float(minus.n)}
            terms.append(Terms(features=ids, coefficients=values[ids], t=t[ids], details=details, warnings=warnings))
        return terms


def _samples(sources: Sources, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes [n, L] float64 and activations [n, D] of a few samples of one side at a time."""
    sae, source = sources.sae, getattr(sources, name)
    if isinstance(source, str):
        raise SteersmanError(f"the {name} texts must be a list, not one text")
    if isinstance(source, Sequence) and source and all(isinstance(text, str) for text in source):
        if sources.lm is None:
            raise SteersmanError("contrast of texts needs the model: give lm=")
        if not all(text.strip() for text in source):
            raise SteersmanError(f"one of the {name} texts is empty")
        yield from _text_samples(sources, sources.lm, source)
        return
    for x in batches_of(source):
        if x.ndim != 2 or x.shape[1] != sae.cfg.d_in:
            shape = tuple(x.shape)
            raise SteersmanError(f"{name} activations of shape {shape} do not fit an SAE of d_in {sae.cfg.d_in}")
        for part in x.to(sae.device).split(_CHUNK):
            yield dense(sae.encode_sparse(part.float()), sae), part


def _text_samples(sources: Sources, lm: LanguageModel, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    sae = sources.sae
    hook = sae.cfg.hook_name or sources.hook
    if not hook:
        raise SteersmanError("this SAE records no hook point: name the one to read the texts at with hook=")
    for start in range(0, len(texts), _TEXTS):
        batch = lm.encode(texts[start : start + _TEXTS], max_length=lm.context_length)
        h = lm.capture(batch.input_ids, batch.attention_mask, hooks=[hook])[hook]
        bos = bos_tokens(batch.input_ids, batch.attention_mask, lm.bos_token_id)
        for row, kept in zip(h, batch.attention_mask.bool() & ~bos):
            real = row[kept]
            real = real[-1:] if sources.config.positions == "last" else real
            real = real.to(sae.device).float()
            codes = torch.stack([dense(sae.encode_sparse(part), sae).sum(dim=0) for part in real.split(256)])
            yield (codes.sum(dim=0) / len(real))[None], real.mean(dim=0)[None]
