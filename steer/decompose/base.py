"""What is asked of a method, and what a method is: a class in a file of its own that says all that is true of it.

Shape letters: B vectors, N activations, M terms, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from steersman.config import check_types
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.registry import Registry
from steersman.sae import SAE
from steersman.steer.decompose.atoms import Atoms
from steersman.steer.decompose.terms import Terms, jaccard


@renamed_fields(read="positions")
@dataclass(frozen=True, kw_only=True)
class DecomposeConfig:
    """How to take a vector apart. A setting of another method is an error."""

    method: str = "omp"
    """omp, lasso and nnls fit v by decoder rows; encode and antipodal ask the encoder; contrast, response, effect and
    behaviour also read texts, activations, an effect map or the model."""
    k: int | None = 16
    """Features at most; none for all that the method finds (omp and behaviour need a number)."""
    scale: float | None = None
    """Multiples of v given to the encoder or the model. By default: encode reads v itself, antipodal and response read
    v at the median norm of the SAE's activations, behaviour steers by v as it is."""
    penalty: float | None = None
    """Weight of the L1 norm as a fraction of the smallest one that leaves no feature, 0 to 1 (0: no penalty); by
    default the smallest that leaves k features."""
    refit: bool | None = None
    """Fit the chosen features again without the penalty (non-negative for nnls); by default yes, unless the penalty
    is given."""
    pursuit: Literal["exact", "gradient"] | None = None
    """Matching pursuit with exact least squares (the default) or with one gradient step a feature."""
    positions: Literal["mean", "last"] | None = None
    """Of contrasting texts: the mean over all tokens of each (the default), or the last token."""
    rows: int | None = None
    """Activations read for a response; 512 by default."""
    l1: float | None = None
    """Weight of |c|_1 / |v| against the mean KL in nats, for behaviour; 0.01 by default."""
    steps: int | None = None
    """Gradient steps of behaviour; 60 by default."""
    exclude_dead: bool = True
    """Leave out features that never fired in the SAE's statistics."""
    n_null: int = 16
    """Random directions of the null."""
    seed: int = 0
    """Seed of the random directions."""

    def __post_init__(self) -> None:
        check_types(self)
        method = METHODS[self.method]
        if self.k is None and method.needs_k:
            raise SteersmanError(f"method {self.method!r} needs a number of features k")
        for name in dict.fromkeys(name for other in METHODS.values() for name in other.settings):
            if name not in method.settings and getattr(self, name, None) is not None:
                owners = " and ".join(other.name for other in METHODS.values() if name in other.settings)
                raise SteersmanError(f"{name} is a setting of {owners}, not of {self.method}")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise SteersmanError(f"scale must be a positive number, got {self.scale}")
        if self.penalty is not None and not 0 <= self.penalty < 1:
            raise SteersmanError(f"penalty is a fraction of the largest one, 0 up to 1, got {self.penalty}")
        if self.n_null < 2:
            raise SteersmanError(f"n_null must be at least 2 random directions, got {self.n_null}")
        for name in ("rows", "steps"):
            if (getattr(self, name) or 1) < 1:
                raise SteersmanError(f"{name} must be at least 1, got {getattr(self, name)}")


class ActivationBatch(Protocol):
    """A batch as a store gives it."""

    @property
    def x(self) -> Tensor:
        """[n, D]."""
        ...


class ActivationSource(Protocol):
    """Something with `.batches`, such as a store."""

    def batches(self, batch_size: int, *, split: Literal["all"], drop_last: bool) -> Iterable[ActivationBatch]:
        """Its rows in batches."""
        ...


Activations = Tensor | Iterable[Tensor] | Iterable[ActivationBatch] | ActivationSource
"""Activations [N, D], an iterable of batches of them, or a store."""


class LinearEffect(Protocol):
    """y = x M + b: what `collect_effects(...).fit()` gives."""

    @property
    def M(self) -> Tensor:
        """[D, L]."""
        ...

    @property
    def b(self) -> Tensor:
        """[L]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """What a caller gives besides the vectors. Of the last five, a method gets those that it names in `reads`."""

    sae: SAE
    """The SAE."""
    config: DecomposeConfig
    """The settings."""
    lm: LanguageModel | None = None
    """The model."""
    hook: str = ""
    """Hook point of the vectors."""
    texts: Sequence[str] | None = None
    """Texts on which the steered model is compared."""
    positive: Sequence[str] | Activations | None = None
    """What v should point towards."""
    negative: Sequence[str] | Activations | None = None
    """What v should point away from."""
    activations: Activations | None = None
    """Activations at the hook point."""
    effect_map: LinearEffect | None = None
    """The effects of unit vectors."""


GIVEN = {
    "texts": "texts to compare the steered model on",
    "positive": "texts (with lm=) or activations [N, d_in]",
    "negative": "texts (with lm=) or activations [N, d_in]",
    "activations": "a store, or activations [N, d_in]",
    "effect_map": "what collect_effects(...).fit() gives",
    "lm": "the model",
}
"""What a method may read, by the names that `Sources` has for it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Vectors to take apart, and everything a method needs for it."""

    vectors: Tensor
    """[B, D] float64 on the SAE's device; finite, none of them zero."""
    sae: SAE
    """The SAE."""
    atoms: Atoms
    """Its decoder rows at unit length."""
    config: DecomposeConfig
    """The settings."""
    data: Any = None
    """What the method's own `read` made of the sources."""
    lm: LanguageModel | None = None
    """The model."""
    hook: str = ""
    """Hook point of the vectors."""


class Null(Enum):
    """What random directions are compared with: how their explained variance comes about."""

    SCALE_FREE = "the method itself takes them apart; it does not see |v|, so once for all vectors"
    EQUAL_NORM = "the method itself takes them apart, at the norm of v"
    SAME_FEATURES = "least squares on the features found for v, where the method reads more than v"


METHODS: Registry[type["Method"]] = Registry("method")
"""Every method by name, one file each."""


class Method(ABC):
    """A way to find the features of a vector. A subclass is found by its `name`; the defaults are those of most."""

    name: ClassVar[str]
    """What `DecomposeConfig.method` calls it."""
    source: ClassVar[str]
    """Paper or authors."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of `GIVEN` that it cannot do without. The model may be given to all, for labels."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `DecomposeConfig` that not every method has."""
    needs_k: ClassVar[bool] = False
    """Whether it adds features until it has k, so that k must be a number."""
    independent: ClassVar[bool] = False
    """Whether its features are independent directions, so that k is at most d_in."""
    makes_vector: ClassVar[bool] = False
    """Whether it can do without a vector: see `own_vector`."""
    null: ClassVar[Null] = Null.SAME_FEATURES
    """How the null is made."""
    null_directions: ClassVar[int | None] = None
    """Random directions of the null at most, where each costs much."""
    units: ClassVar[str] = "coefficients in units of v"
    """What the coefficients measure."""

    def __init_subclass__(cls) -> None:
        METHODS.register(cls, cls)

    def read(self, sources: Sources) -> Any:
        """What `terms` needs of the sources: each is read here, once, as it may be one that cannot be read again."""
        return None

    def own_vector(self, data: Any) -> Tensor:
        """The vector [D] of what `read` gave, where the caller names none."""
        raise NotImplementedError

    @abstractmethod
    def terms(self, problem: Problem) -> list[Terms]:
        """The terms of every vector, at most k features each."""

    def parts(self, problem: Problem, v: Tensor, terms: Terms) -> Tensor:
        """Coefficients [M] of unit directions that rebuild v [D]: the terms' own, where those are parts of v."""
        return terms.coefficients

    def expresses_negative(self, sae: SAE) -> bool:
        """Whether a coefficient can be negative."""
        return True

    def zero_scale(self, config: DecomposeConfig) -> float | None:
        """The `scale` of `encoder_input` with which v = 0 is read as the method reads v; None for v itself."""
        return None

    def bias_warnings(self, problem: Problem, v: Tensor, ids: list[int], zero: set[int]) -> list[str]:
        """What to beware of, given the features `zero` that the encoder activates for v = 0."""
        if jaccard(set(ids), zero) <= 0.3:
            return []
        return [
            f"{len(set(ids) & zero)} of the {len(ids)} features are also what the encoder activates for v = 0: they "
            "may come from its biases"
        ]


def batches_of(source: Activations, batch_size: int = 1024) -> Iterable[Tensor]:
    """Batches [n, D] of activations from a tensor, an iterable of tensors or batches, or a store.

    >>> import torch
    >>> [tuple(x.shape) for x in batches_of(torch.zeros(5, 3), 2)]
    [(2, 3), (2, 3), (1, 3)]
    """
    if isinstance(source, Tensor):
        yield from source.split(batch_size)
        return
    batches: Any = source
    if hasattr(source, "batches"):
        batches = batches.batches(batch_size, split="all", drop_last=False)
    for batch in batches:
        yield batch if isinstance(batch, Tensor) else batch.x
