"""How the concepts of a model moved when it was fine-tuned: arXiv 2501.03012 (mshukor/xl-vlms).

Both models read the same texts at one hook point. The base model's states fall into concepts u_k (k-means or semi-NMF),
and the shift of concept k is D_k = mean over its members of (h_tuned - h_base). Adding a D_k to u_k should give a
concept of the tuned model: the recovery. D_k is also a steering vector that moves the base model towards the tuned
one, and u_i - u_j one from concept j to concept i.

Concepts of two models are matched one to one, as otherwise one good concept counts many times. Beside each recovery
stands that of u_k unmoved, and beside the shifts those of a random grouping of the same sizes: there every group has
the same shift, that of all states.

Shape letters: n states, D width, k concepts.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.analysis.clusters import k_means, matching, means_of, semi_nmf
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.methods.reading import Reader
from steersman.steer.vectors.vector import SteeringVector

Grouping = Literal["kmeans", "semi_nmf"]


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One concept of the base model and where its states went."""

    n: int
    """Its states."""
    norm: float
    """|D_k|."""
    spread: float
    """Root mean square of |shift - D_k| over its states."""
    pairwise_cosine: float | None
    """Mean cosine between the shifts of two of its states: 1 where all moved alike; None below two that moved."""
    cosine_to_mean: float | None
    """Mean cosine of a state's shift to D_k."""
    matched: int
    """The tuned model's concept that it is matched with."""
    recovery: float
    """Cosine of u_k + a D_k to that concept, both from the mean of the tuned states."""
    unmoved: float
    """The same of u_k itself."""
    random_norm: float
    """|D| of a random group of as many states, the null of `norm`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptShift:
    """The concepts of a base model, those of a tuned one, and the shifts between."""

    concepts: Tensor
    """[k, D] fp64: u_k."""
    tuned_concepts: Tensor
    """[k, D] fp64: the tuned model's."""
    shifts: Tensor
    """[k, D] fp64: D_k."""
    labels: Tensor
    """[n]: the concept of each state."""
    figures: list[Shift]
    """What is known of each concept."""
    overall: Tensor
    """[D] fp64: mean shift of all states."""
    hook_name: str = ""
    """Where the states were read."""
    model_name: str = ""
    """The base model."""

    def __repr__(self) -> str:
        mean = sum(f.recovery * f.n for f in self.figures) / sum(f.n for f in self.figures)
        return f"ConceptShift({len(self.figures)} concepts of {len(self.labels)} states, recovery {mean:.3f})"

    def vector(self, concept: int) -> SteeringVector:
        """D_k as a steering vector for the base model: scale 1 is the shift that was measured."""
        return self._vector(self.shifts[concept], concept=concept)

    def difference(self, to: int, of: int) -> SteeringVector:
        """u_to - u_of as a steering vector for the base model."""
        return self._vector(self.concepts[to] - self.concepts[of], concept=to, instead_of=of)

    def _vector(self, direction: Tensor, **notes: Any) -> SteeringVector:
        if not self.hook_name:
            raise SteersmanError("these states were given without their hook point: pass hook_name= with them")
        return SteeringVector.of(
            direction.float(), hook_name=self.hook_name, model_name=self.model_name, method="concept_shift",
            metadata={"source": "arXiv 2501.03012", **notes},
        )  # fmt: skip

    def to_text(self) -> str:
        """A table, one concept a line."""
        head = f"{'concept':>7} {'states':>6} {'|shift|':>8} {'random':>8} {'spread':>8} {'pairwise':>8} "
        lines = [head + f"{'recovery':>8} {'unmoved':>8}"]
        for k, f in enumerate(self.figures):
            pairwise = "       -" if f.pairwise_cosine is None else f"{f.pairwise_cosine:8.3f}"
            lines.append(
                f"{k:>7} {f.n:>6} {f.norm:>8.3f} {f.random_norm:>8.3f} {f.spread:>8.3f} {pairwise} {f.recovery:>8.3f} "
                f"{f.unmoved:>8.3f}"
            )
        return "\n".join(lines)


def shifts_of(
    base: Tensor,
    tuned: Tensor,
    k: int,
    *,
    method: Grouping = "kmeans",
    scale: float = 1.0,
    seed: int = 0,
    hook_name: str = "",
    model_name: str = "",
) -> ConceptShift:
    """Concepts and shifts of states `base` and `tuned` [n, D], row for row of the same texts; `scale` is a.

    Raises SteersmanError for shapes that disagree, and for fewer states than concepts.
    """
    if base.shape != tuned.shape:
        raise SteersmanError(f"the two models' states must match row for row, got {base.shape} and {tuned.shape}")
    if method not in ("kmeans", "semi_nmf"):
        raise SteersmanError(f"unknown grouping {method!r}: use kmeans or semi_nmf")
    group = k_means if method == "kmeans" else semi_nmf
    concepts, labels = group(base, k, seed)
    tuned_concepts, _ = group(tuned, k, seed)
    base, tuned = base.double(), tuned.double()
    moved, centre = tuned - base, tuned.mean(0)
    shifts = means_of(moved, labels, k)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    random_shifts = means_of(moved, shuffled, k)
    reached = _cosines(concepts + scale * shifts - centre, tuned_concepts - centre)
    unmoved = _cosines(concepts - centre, tuned_concepts - centre)
    own, before = matching(reached), matching(unmoved)
    figures = []
    for j in range(k):
        mine = moved[labels == j]
        unit = mine[mine.norm(dim=1) > 0]
        unit = unit / unit.norm(dim=1, keepdim=True)
        n = len(unit)
        figures.append(
            Shift(
                n=len(mine),
                norm=float(shifts[j].norm()),
                spread=float((mine - shifts[j]).square().sum(1).mean().sqrt()) if len(mine) else 0.0,
                pairwise_cosine=float((unit.sum(0).square().sum() - n) / (n * (n - 1))) if n > 1 else None,
                cosine_to_mean=float(_cosines(unit, shifts[j][None]).mean()) if n else None,
                matched=own[j],
                recovery=float(reached[j, own[j]]),
                unmoved=float(unmoved[j, before[j]]),
                random_norm=float(random_shifts[j].norm()),
            )
        )
    return ConceptShift(
        concepts=concepts,
        tuned_concepts=tuned_concepts,
        shifts=shifts,
        labels=labels,
        figures=figures,
        overall=moved.mean(0),
        hook_name=hook_name,
        model_name=model_name,
    )


def concept_shift(
    base: LanguageModel,
    tuned: LanguageModel,
    texts: ExamplesLike,
    *,
    hook: HookName,
    k: int = 8,
    positions: str = "last",
    method: Grouping = "kmeans",
    scale: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
) -> ConceptShift:
    """The shifts between a model and a fine-tuned copy of it, on `texts`.

    `positions`: which tokens are read, as for a vector method (`last`, `mean`, `all`, `index:N`, `answer`). Raises
    SteersmanError where the models read the texts as different tokens or have other widths there.
    """
    point = base.resolve_hook(hook)
    examples = Examples(positive=as_examples(texts, "positive"), negative=[])
    if not examples.positive:
        raise SteersmanError("there are no texts to read the two models on")
    for example in examples.positive:
        if base.token_ids(example.text) != tuned.token_ids(example.text):
            raise SteersmanError(f"{base.name} and {tuned.name} read the texts as different tokens: {example.text!r}")
    states = []
    for lm in (base, tuned):
        reader = Reader(lm, [lm.resolve_hook(point)], positions=positions, batch_size=batch_size, seed=seed)
        states.append(torch.cat([batch.states[point] for batch in reader.samples(examples, "sides")]))
    return shifts_of(
        states[0], states[1], k, method=method, scale=scale, seed=seed, hook_name=point, model_name=base.name
    )


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """[n, m] of rows; 0 where a row is zero."""
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
