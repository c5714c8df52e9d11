"""Affine maps from the states of two classes: what turns states of the source into states of the target.

| method | map | source |
|---|---|---|
| `mean` | h + mu_t - mu_s | arXiv 2402.09631, section 4.1 |
| `mimic` | mu_t + A (h - mu_s), A the optimal transport between the classes as Gaussians | 2402.09631, section 4.2 |
| `leace` | h - S_xz v^T (h - mu): no linear probe can tell the classes any more | 2306.03819 |
| `leace_shift` | `leace`, and then to the target's mean | 2402.09631, appendix |

Means and covariances are accumulated while the texts are read: no states are kept. A covariance of n samples in D
dimensions has no inverse unless n > D, so that `mimic` and `leace` ask for `shrinkage` there: (1 - a) S + a tr(S)/D I.
(Adding a small number to EVERY entry of a covariance, as the authors' code does, adds one dimension and no more.)

The maps are meant for the states of the source class alone, and move those of the target as well, `mean` by as much:
open them with a gate that knows the classes, such as a probe's.

Shape letters: D width.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.registry import Registry
from steersman.steer.edits.affine import AffineEdit
from steersman.steer.edits.file import EditSet
from steersman.steer.methods.base import check_differ
from steersman.steer.methods.diagnostics import half_of
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.methods.gaussians import erasing_direction, gaussian_transport, shrunk, transport_distance
from steersman.steer.methods.moments import RunningCovariance
from steersman.steer.methods.reading import Reader


@dataclass(frozen=True, kw_only=True)
class AffineConfig:
    """How an affine map is made from the states of two classes."""

    method: str = "mimic"
    """mean, mimic, leace or leace_shift."""
    shrinkage: float = 0.0
    """a of (1 - a) S + a tr(S)/D I; needed where there are no more samples than dimensions."""
    positions: str = "all"
    """Which tokens are read, each a sample: all, mean, last, answer or index:N."""
    batch_size: int = 16
    """Texts per forward pass."""
    max_length: int | None = None
    """Cut texts to this many tokens, BOS included."""
    diagnostics: bool = True
    """Say how well the map made from one half of the texts carries the other."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.shrinkage <= 1:
            raise SteersmanError(f"shrinkage must be between 0 and 1, got {self.shrinkage}")
        if self.batch_size < 1 or (self.max_length is not None and self.max_length < 1):
            raise SteersmanError("batch_size and max_length must be at least 1")


AFFINE_METHODS: Registry[type["AffineMethod"]] = Registry("affine method")
"""Every way to make an affine map from two classes, by name."""

Moments = tuple[RunningCovariance, RunningCovariance]
"""Those of the source and those of the target."""


class AffineMethod(ABC):
    """A way to make an affine map from the moments of two classes. A subclass is found by its `name`."""

    name: ClassVar[str]
    """What `AffineConfig.method` calls it."""
    source: ClassVar[str]
    """Paper."""
    inverts: ClassVar[bool] = True
    """Whether it needs the inverse of a covariance."""
    moves_both: ClassVar[bool] = False
    """Whether it is made for the states of both classes."""

    def __init_subclass__(cls) -> None:
        AFFINE_METHODS.register(cls, cls)

    @abstractmethod
    def fit(self, source: RunningCovariance, target: RunningCovariance, shrinkage: float) -> AffineEdit:
        """The map, in float64."""

    def check(self, source: RunningCovariance, target: RunningCovariance, shrinkage: float) -> None:
        """Raise SteersmanError where there are too few samples for an inverse."""
        few = min(source.n, target.n)
        width = len(source.mean)
        if self.inverts and shrinkage == 0 and few <= width:
            raise SteersmanError(
                f"method {self.name!r} needs more than {width} samples of each class (the width there), got "
                f"{source.n} and {target.n}: give more texts, or set shrinkage, such as shrinkage=0.1"
            )


class MeanMatching(AffineMethod):
    """The difference of the means."""

    name = "mean"
    source = "arXiv 2402.09631"
    inverts = False

    def fit(self, source: RunningCovariance, target: RunningCovariance, shrinkage: float) -> AffineEdit:
        return AffineEdit(shift=target.mean - source.mean)


class MiMiC(AffineMethod):
    """Means and covariances both: the least movement, in mean square, that gives the source those of the target."""

    name = "mimic"
    source = "arXiv 2402.09631"

    def fit(self, source: RunningCovariance, target: RunningCovariance, shrinkage: float) -> AffineEdit:
        covariances = (shrunk(side.covariance, shrinkage) for side in (source, target))
        return AffineEdit.of_matrix(gaussian_transport(*covariances), source.mean, target.mean)


class LEACE(AffineMethod):
    """The least change after which no linear probe can tell the classes."""

    name = "leace"
    source = "arXiv 2306.03819"
    moves_both = True

    def fit(self, source: RunningCovariance, target: RunningCovariance, shrinkage: float) -> AffineEdit:
        both = source.merged(target)
        # The covariance of the state with z = 1 in the target, 0 in the source
        crossed = (source.n * target.n / both.n**2) * (target.mean - source.mean)
        write, read = erasing_direction(shrunk(both.covariance, shrinkage), crossed)
        return AffineEdit(write=-write[:, None], read=read[:, None], mean=both.mean)


class ShiftedLEACE(LEACE):
    """LEACE, and from the mean of what is left to the target's mean."""

    name = "leace_shift"
    source = "arXiv 2402.09631"
    moves_both = False

    def fit(self, source: RunningCovariance, target: RunningCovariance, shrinkage: float) -> AffineEdit:
        erased = super().fit(source, target, shrinkage)
        shift = target.mean - source.merged(target).mean  # both classes have the common mean once they are alike
        return AffineEdit(write=erased.write, read=erased.read, mean=erased.mean, shift=shift)


def fit_affine(
    lm: LanguageModel,
    source: ExamplesLike,
    target: ExamplesLike,
    *,
    hook: HookName | Sequence[HookName],
    config: AffineConfig | None = None,
    **settings: Any,
) -> EditSet:
    """The affine map that turns states of the source class into states of the target class.

    Args:
        lm: the model, unsteered.
        source: texts of the class to be moved, or (prompt, answer) pairs.
        target: texts of the class to be like.
        hook: hook point, or several for a map at each. (Each map is fitted to unsteered states: of several that are
            open at once, the later ones see states that the earlier ones have moved.)
        config: the settings; `**settings` are fields of it, over those of `config`.

    The figures of `affine_maps` are in its metadata, under `diagnostics`. Raises SteersmanError for an unknown method
    or setting, an empty side, states that are not finite, classes with the same mean (but for `mimic`), and fewer
    samples than dimensions where an inverse is needed and there is no shrinkage.

        edits = fit_affine(lm, rude, polite, hook=8, method="mimic", shrinkage=0.1)
        with steered(edits, lm): ...
    """
    config = merged(AffineConfig, config, settings)
    method = AFFINE_METHODS[config.method]
    hooks = lm.resolve_hooks(hook)
    if not hooks or len(set(hooks)) != len(hooks):
        raise SteersmanError(f"name each hook point once, and at least one; got {hooks}")
    examples = Examples(positive=as_examples(target, "target"), negative=as_examples(source, "source"))
    for side, found in (("target", examples.positive), ("source", examples.negative)):
        if not found:
            raise SteersmanError(f"there are no {side} examples")
    if config.positions == "answer":
        examples.check_answers(method.name)
    reader = Reader(lm, hooks, positions=config.positions, batch_size=config.batch_size, max_length=config.max_length)
    moments = {name: tuple((RunningCovariance(), RunningCovariance()) for _ in range(2)) for name in hooks}
    for batch in reader.samples(examples, "sides"):
        for name, x in batch.states.items():
            for half, (from_, to) in enumerate(moments[name]):
                mine = half_of(batch.unit) == half
                from_.add(x[mine & ~batch.positive])
                to.add(x[mine & batch.positive])
    edits, figures = affine_maps(moments, config)
    metadata = {
        "source": method.source,
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k != "method"},
        "n_texts": [len(examples.negative), len(examples.positive)],
        "diagnostics": figures,
    }
    return EditSet(
        edits={name: _single(edit) for name, edit in edits.items()},
        model_name=lm.name,
        method=method.name,
        metadata=metadata,
    )


def _single(edit: AffineEdit) -> AffineEdit:
    """In fp32."""
    write, read, mean, shift = (
        None if part is None else part.float() for part in (edit.write, edit.read, edit.mean, edit.shift)
    )
    return AffineEdit(write=write, read=read, mean=mean, shift=shift)


def affine_maps(
    moments: Mapping[str, tuple[Moments, ...]], config: AffineConfig
) -> tuple[dict[str, AffineEdit], dict[str, dict[str, float]]]:
    """The map and its figures at each hook point, from the moments of both halves of the texts.

    The figures: `n_source` and `n_target`, samples; `mean_gap`, the distance of the classes' means after the map over
    that before; `distance`, the same of the squared transport distance of the classes as Gaussians (where only the
    source is moved). The last two are of states of the half that the map was not made from, the mean of both ways: 0 is
    perfect, 1 is what no map gives. They are left out where a half has too few samples.
    """
    method = AFFINE_METHODS[config.method]()
    edits, figures = {}, {}
    for hook, halves in moments.items():
        source, target = (halves[0][side].merged(halves[1][side]) for side in (0, 1))
        if method.name != "mimic":
            size = max(float(source.mean.norm()), float(target.mean.norm()))
            check_differ(target.mean - source.mean, size, method.name, hook)
        method.check(source, target, config.shrinkage)
        edits[hook] = method.fit(source, target, config.shrinkage)
        figures[hook] = {"n_source": source.n, "n_target": target.n}
        if config.diagnostics:
            figures[hook] |= _heldout(method, halves, config.shrinkage)
    return edits, figures


def _heldout(method: AffineMethod, halves: tuple[Moments, ...], shrinkage: float) -> dict[str, float]:
    gaps, distances = [], []
    for fitted, other in (halves, halves[::-1]):
        if min(side.n for side in (*fitted, *other)) < 2:
            return {}
        try:
            method.check(*fitted, shrinkage)
            edit = method.fit(*fitted, shrinkage)
        except SteersmanError:
            return {}
        (source, target), found = other, edit.as_map(edit.width)
        assert found is not None
        matrix = torch.eye(edit.width, dtype=torch.float64) if found.matrix is None else found.matrix
        offset = found.offset
        moved = matrix @ source.mean + offset
        aim = matrix @ target.mean + offset if method.moves_both else target.mean
        gaps.append(float((moved - aim).norm() / (source.mean - target.mean).norm()))
        if not method.moves_both:
            spread = matrix @ source.covariance @ matrix.T
            after = transport_distance(moved, spread, target.mean, target.covariance)
            before = transport_distance(source.mean, source.covariance, target.mean, target.covariance)
            distances.append(after / before)
    found = {"mean_gap": sum(gaps) / 2}
    return found if not distances else found | {"distance": sum(distances) / 2}
