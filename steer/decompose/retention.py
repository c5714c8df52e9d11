"""Does steering with the reconstruction do what steering with the vector does?

Measured teacher-forced on texts, against the unsteered model, for the vector itself, the reconstruction at the vector's
norm and at its KL, the residual alone, and a random direction at the vector's norm. With dp and dp_v the changes of the
next-token probabilities under a variant and under the vector,

    retained = sum dp . dp_v / sum |dp_v|^2        agreement = sum dp . dp_v / sqrt(sum |dp|^2 sum |dp_v|^2)

over all tokens: 1 and 1 for the vector itself, near 0 for an unrelated direction. With words to look for, also the rise
of their probability. A push so strong that it wrecks the model's predictions "retains" much of any other such push, as
both remove the same probabilities: read `retained` beside that of the random direction, and at a moderate KL.

Shape letters: B texts, S tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.html import card
from steersman.lm import LanguageModel
from steersman.lm.origin import check_fits
from steersman.steer.decompose.record import Decomposition
from steersman.steer.measures import CostMeter, token_kl
from steersman.steer.scale_search import search_scale
from steersman.steer.steerer import Steerer


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of steering, measured on the same texts as the others."""

    name: str
    """`vector`, `reconstruction, equal norm`, `reconstruction, equal KL`, `residual` or `random, equal norm`."""
    norm: float
    """Norm of what was added."""
    kl: float
    """Mean KL(steered || base) per token, in nats."""
    retained: float
    """The vector's effect on next-token probabilities that this has: 1 is all of it."""
    agreement: float
    """Cosine of the two effects."""
    rise: float | None
    """Rise of the probability of `toward` less that of `away`, mean over tokens; None where no words were given."""
    rise_retained: float | None
    """The same as a fraction of the vector's."""


@renamed_fields(kept="variants")
@dataclass(frozen=True, kw_only=True)
class Retention:
    """What a decomposition keeps of its vector's effect."""

    variants: list[Variant]
    """By way of steering; the first is the vector itself."""
    scale: float
    """Multiples of the vector that everything is measured at."""
    n_tokens: int
    """Tokens that each figure is over."""

    def _repr_html_(self) -> str:
        return card(f"Retention over {self.n_tokens:,} tokens", text=self.to_text())

    def __getitem__(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        variants = [vars(variant) for variant in self.variants]
        return {"scale": self.scale, "n_tokens": self.n_tokens, "kept": variants}  # an older name, kept in files

    def to_text(self) -> str:
        """A table for a terminal."""
        words = self.variants[0].rise is not None
        head = f"{'steering with':<28} {'norm':>8} {'KL':>7} {'retained':>9} {'agreement':>10}"
        lines = [head + (f" {'rise':>8} {'retained':>9}" if words else "")]
        for one in self.variants:
            line = f"{one.name:<28} {one.norm:>8.3f} {one.kl:>7.3f} {one.retained:>9.3f} {one.agreement:>10.3f}"
            if one.rise is not None and one.rise_retained is not None:
                line += f" {one.rise:>+8.4f} {one.rise_retained:>9.3f}"
            lines.append(line)
        return "\n".join(lines)


def measure_retention(
    found: Decomposition,
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    scale: float = 1.0,
    toward: Sequence[str] = (),
    away: Sequence[str] = (),
    hook: str = "",
    scope: str = "all",
    seed: int = 0,
    max_length: int = 128,
    batch_size: int = 16,
) -> Retention:
    """Steer with `scale` times the vector and with its parts, on `texts`, and compare what happens.

    `toward` and `away` are words whose probability should rise and fall (the first token of each, after a space).
    `hook` is needed only where the SAE recorded none. Raises SteersmanError without texts, without features, or for a
    model that does not fit.
    """
    if not len(found) or not float(found.reconstruction.norm()) > 0:
        raise SteersmanError("this decomposition has no feature, so nothing to steer with")
    origin = {"model_name": found.model_name, "hook_name": found.hook_name, "width": len(found.vector)}
    where = check_fits(lm, what="this decomposition", **origin, hook=hook)
    meter = CostMeter(lm, texts, max_length=max_length, batch_size=batch_size)
    steerer, v, rebuilt = Steerer(lm), scale * found.vector, scale * found.reconstruction
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(v.shape, generator=generator)
    equal = rebuilt * (v.norm() / rebuilt.norm())

    def kl(push: Tensor) -> float:
        return meter.cost("kl", lambda: steerer.vector(push, hook=where, scope=scope))

    budget = kl(v)
    if not budget > 0:
        raise SteersmanError("steering by this vector changes nothing on these texts: there is no effect to retain")
    search = search_scale(lambda s: kl(s * equal), budget, start=1.0, low=0.01, high=20.0, tolerance=0.02)
    pushes = {
        "vector": v,
        "reconstruction, equal norm": equal,
        "reconstruction, equal KL": search.scale * equal,
        "residual": scale * found.residual,
        "random, equal norm": noise * (v.norm() / noise.norm()),
    }
    wanted, unwanted = _first_tokens(lm, toward), _first_tokens(lm, away)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in pushes}
    for batch in meter.batches:
        real = batch.attention_mask.bool()
        base = lm.logits(batch.input_ids, batch.attention_mask)[real]
        before = base.float().softmax(-1)
        reference = None
        for name, push in pushes.items():
            with steerer.vector(push, hook=where, scope=scope):
                steered = lm.logits(batch.input_ids, batch.attention_mask)[real]
            change = steered.float().softmax(-1) - before
            reference = change if reference is None else reference
            rise = change[:, wanted].sum() - change[:, unwanted].sum()
            figures = [token_kl(steered, base).sum(), (change * reference).sum(), change.square().sum(), rise]
            sums[name] += torch.stack([figure.double().cpu() for figure in figures])
    n = sum(int(batch.attention_mask.sum()) for batch in meter.batches)
    variants = [
        _variant(name, push, sums[name], sums["vector"], n, bool(toward or away)) for name, push in pushes.items()
    ]
    return Retention(variants=variants, scale=scale, n_tokens=n)


def _variant(name: str, push: Tensor, sums: Tensor, vector: Tensor, n: int, words: bool) -> Variant:
    kl, dot, square, rise = sums.tolist()
    whole = float(vector[2])
    return Variant(
        name=name,
        norm=float(push.norm()),
        kl=kl / n,
        retained=dot / whole,
        agreement=dot / max(1e-300, square * whole) ** 0.5,
        rise=rise / n if words else None,
        rise_retained=rise / float(vector[3]) if words and float(vector[3]) != 0 else (0.0 if words else None),
    )


def _first_tokens(lm: LanguageModel, words: Sequence[str]) -> list[int]:
    return sorted({lm.token_ids(f" {word}")[0] for word in words})
