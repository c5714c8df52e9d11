"""Contrasting texts instead of the vector: `mean f(x+) - mean f(x-)`, with Welch's t statistic per feature.

The encoder reads activations it was made for, and the difference has both signs: neither fault of encoding v itself
(arXiv 2411.08790) applies. Of texts, each text is one sample (the mean of its tokens' codes, or its last token's), as
tokens of one text are not independent; of activations, each row is one. The coefficients are brought to v's length: v
may be the difference of means at any scale.

Shape letters: N samples, L latents, D width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer.decompose.response import dense, t_statistic
from steersman.steer.decompose.task import Task, batches_of
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


def contrast(task: Task) -> list[Terms]:
    """The contrast at the length of every vector, at most k features, largest in size."""
    plus, minus = sides(task)
    difference, t = plus.mean - minus.mean, t_statistic(plus.mean - minus.mean, plus.variance + minus.variance)
    delta = plus.centre - minus.centre
    terms = []
    for v in task.vectors:
        cosine = float(v @ delta / (v.norm() * delta.norm()))
        stretch = float(v @ delta / delta.square().sum())
        values = difference * task.atoms.norms * stretch
        values = torch.where(task.atoms.usable, values, 0.0)
        ids = largest(values, task.config.k)
        warnings = []
        if cosine < 0.9:
            warnings.append(
                f"v is not the difference of these texts (cosine {cosine:.2f}): contrast takes the texts apart, not v"
            )
        if min(plus.n, minus.n) < 8:
            warnings.append(f"{plus.n} positive and {minus.n} negative samples are few: distrust |t| below 4")
        details = {"cosine_to_difference": cosine, "n_positive": float(plus.n), "n_negative": float(minus.n)}
        terms.append(Terms(features=ids, coefficients=values[ids], t=t[ids], details=details, warnings=warnings))
    return terms


def sides(task: Task) -> tuple[Side, Side]:
    """The sums of the positive and of the negative samples, read unless the task holds them already."""
    found = []
    for name in ("positive", "negative"):
        source = getattr(task, name)
        if source is None:
            raise SteersmanError(
                "method 'contrast' needs positive= and negative=: texts (with lm=) or activations [N, d_in]"
            )
        read = isinstance(source, Side)
        found.append(source if read else Side(task.sae, _samples(task, source, name), name))
    return found[0], found[1]


def _samples(task: Task, source: Any, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes [n, L] float64 and activations [n, D] of a few samples at a time."""
    if isinstance(source, str):
        raise SteersmanError(f"the {name} texts must be a list, not one text")
    if isinstance(source, Sequence) and source and all(isinstance(text, str) for text in source):
        if task.lm is None:
            raise SteersmanError("contrast of texts needs the model: give lm=")
        if not all(text.strip() for text in source):  # pyright: ignore[reportAttributeAccessIssue]
            raise SteersmanError(f"one of the {name} texts is empty")
        yield from _text_samples(task, task.lm, source)
        return
    for x in batches_of(source):
        if x.ndim != 2 or x.shape[1] != task.sae.cfg.d_in:
            raise SteersmanError(
                f"{name} activations of shape {tuple(x.shape)} do not fit an SAE of d_in {task.sae.cfg.d_in}"
            )
        for part in x.to(task.sae.device).split(_CHUNK):
            yield dense(task.sae.encode_sparse(part.float()), task.sae), part


def _text_samples(task: Task, lm: LanguageModel, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    hook = task.sae.cfg.hook_name or task.hook
    if not hook:
        raise SteersmanError("this SAE records no hook point: name the one to read the texts at with hook=")
    for start in range(0, len(texts), _TEXTS):
        batch = lm.encode(texts[start : start + _TEXTS], max_length=lm.context_length)
        h = lm.capture(batch.input_ids, batch.attention_mask, hooks=[hook])[hook]
        for row, ids, mask in zip(h, batch.input_ids, batch.attention_mask.bool()):
            real = row[mask & (ids != lm.bos_token_id)] if lm.bos_token_id is not None else row[mask]
            real = real[-1:] if task.config.read == "last" else real
            real = real.to(task.sae.device).float()
            codes = torch.stack([dense(task.sae.encode_sparse(part), task.sae).sum(dim=0) for part in real.split(256)])
            yield (codes.sum(dim=0) / len(real))[None], real.mean(dim=0)[None]
