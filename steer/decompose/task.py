"""What is asked of a method: vectors, dictionary, settings and whatever else it reads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer.decompose.atoms import Atoms

Method = Literal["encode", "antipodal", "contrast", "response", "omp", "lasso", "nnls", "effect", "behaviour"]

DATA: dict[str, tuple[str, ...]] = {
    "contrast": ("positive", "negative", "lm"),
    "response": ("activations",),
    "effect": ("effect_map",),
    "behaviour": ("lm", "texts"),
}
"""What each method reads beside the SAE; the others need nothing."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "scale": ("encode", "antipodal", "response", "behaviour"),
    "penalty": ("lasso", "nnls"),
    "refit": ("lasso", "nnls"),
    "pursuit": ("omp",),
    "read": ("contrast",),
    "rows": ("response",),
    "l1": ("behaviour",),
    "steps": ("behaviour",),
}
"""The settings that only some methods have."""


@dataclass(frozen=True, kw_only=True)
class DecomposeConfig:
    """How to take a vector apart. A setting of another method is an error."""

    method: Method = "omp"
    """omp, lasso and nnls fit v by decoder rows; encode and antipodal ask the encoder; contrast, response, effect and
    behaviour also read texts, activations, an effect map or the model."""
    k: int | None = 16
    """Features at most; none for all that the method finds (omp and behaviour need a number)."""
    scale: float | None = None
    """Multiples of v given to the encoder or the model. By default: encode reads v itself, antipodal and response read
    v at the median norm of the SAE's activations, behaviour steers by v as it is."""
    penalty: float | None = None
    """Weight of the L1 norm as a share of the smallest one that leaves no feature, 0 to 1 (0: no penalty); by default
    the smallest that leaves k features."""
    refit: bool | None = None
    """Fit the chosen features again without the penalty (non-negative for nnls); by default yes, unless the penalty
    is given."""
    pursuit: Literal["exact", "gradient"] | None = None
    """Matching pursuit with exact least squares (the default) or with one gradient step a feature."""
    read: Literal["mean", "last"] | None = None
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
        methods = Method.__args__  # pyright: ignore[reportAttributeAccessIssue]
        if self.method not in methods:
            raise SteersmanError(f"unknown method {self.method!r}: use one of {', '.join(methods)}")
        if self.k is None and self.method in ("omp", "behaviour"):
            raise SteersmanError(f"method {self.method!r} needs a number of features k")
        for name, methods in SETTINGS.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise SteersmanError(f"{name} is a setting of {' and '.join(methods)}, not of {self.method}")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise SteersmanError(f"scale must be a positive number, got {self.scale}")
        if self.penalty is not None and not 0 <= self.penalty < 1:
            raise SteersmanError(f"penalty is a share of the largest one, 0 up to 1, got {self.penalty}")
        if self.n_null < 2:
            raise SteersmanError(f"n_null must be at least 2 random directions, got {self.n_null}")
        for name in ("rows", "steps"):
            if (getattr(self, name) or 1) < 1:
                raise SteersmanError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Vectors to take apart, and everything a method may read."""

    vectors: Tensor
    """[B, D] float64 on the SAE's device; finite, none of them zero."""
    sae: SAE
    """The SAE."""
    atoms: Atoms
    """Its decoder rows at unit length."""
    config: DecomposeConfig
    """The settings."""
    positive: Any = None
    """Texts, or activations [N, D] or an iterable of them: what v should point towards."""
    negative: Any = None
    """The same for what v should point away from."""
    activations: Any = None
    """Activations [N, D], an iterable of batches, or something with `.batches`, such as a store."""
    effect_map: Any = None
    """Something with M [D, L] and b [L]."""
    lm: LanguageModel | None = None
    """The model."""
    texts: Sequence[str] = ()
    """Texts on which behaviour is compared."""
    hook: str = ""
    """Hook point of the vectors."""


def batches_of(source: Any, batch_size: int = 1024) -> Iterable[Tensor]:
    """Batches [n, D] of activations from a tensor, an iterable of tensors or batches, or a store.

    >>> import torch
    >>> [tuple(x.shape) for x in batches_of(torch.zeros(5, 3), 2)]
    [(2, 3), (2, 3), (1, 3)]
    """
    if isinstance(source, Tensor):
        yield from source.split(batch_size)
        return
    if hasattr(source, "batches"):
        source = source.batches(batch_size, split="all", drop_last=False)
    for batch in source:
        yield batch if isinstance(batch, Tensor) else batch.x
