"""What a method is, with its settings and what it makes. Most are streamed: see `steersman.steer.methods.streamed`.

Shape letters: D width, P positions or steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from steersman.config import check_types
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.registry import Registry
from steersman.steer.methods.examples import Examples

ROUNDING = 1e-5
"""Fraction of the states' length up to which a difference of states is rounding."""


@renamed_fields(tokens="positions")
@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """How a vector is made from examples."""

    method: str = "diffmean"
    """actadd, caa, diffmean, mean_centred, style, pca, lat, icv, east or probe; trained: optimised, ssv, reft_r1, bipo,
    latent."""
    positions: str | None = None
    """Which tokens are read: all, mean, last, answer or index:N; by default what the method's paper reads."""
    batch_size: int = 16
    """Examples (or pairs of them) per forward pass."""
    max_length: int | None = None
    """Cut texts to this many tokens, BOS included."""
    diagnostics: bool = True
    """Read the examples a second time and report how well the vector separates them."""
    seed: int = 0
    """Seed of what is random: the pairs of `lat`, the order in which a trained vector meets its examples."""
    table: int | None = None
    """caa, diffmean, mean_centred, style: one vector for each of this many generated steps, read from the answers; step
    0 is the last token of the prompt."""
    centre: str | None = None
    """What a state is compared with. pca: pair (the other one of its pair) or corpus (the mean of all); east: episode
    (the mean of its group), corpus or none. By default the first."""
    l2: float = 0.01
    """probe: weight of |w|^2 / 2 beside the mean log-loss, for states scaled to unit variance per dimension."""
    steps: int = 60
    """optimised, latent: gradient steps."""
    lr: float | None = None
    """bipo, latent, loreft, psr, reft_r1, ssv: learning rate, by default their source's."""
    epochs: int | None = None
    """bipo, loreft, psr, reft_r1, ssv: passes over the examples, by default their source's."""
    train_batch: int | None = None
    """bipo, loreft, psr, reft_r1, ssv: examples per step, by default their source's."""
    rank: int = 4
    """loreft: dimensions of the subspace."""
    instruction: str = ""
    """psr: what stands before the prompts of the model to be imitated."""
    max_norm_frac: float = 0.5
    """optimised: bound of the vector's norm, as a fraction of the median norm of the residual stream."""
    suppress: float = 1.0
    """optimised: weight of making the negative completions unlikely; 0 only raises the positive ones."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a method made."""

    directions: dict[str, Tensor]
    """Hook point -> [D], or [P, D]."""
    per: str = "position"
    """What the rows of [P, D] are for: position or step."""
    diagnostics: dict[str, Any] = field(default_factory=dict)
    """Hook point -> figures that predict whether steering will work."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else should be known about how it was made."""


METHODS: Registry[type["Method"]] = Registry("method")
"""Every way to make a vector from examples, by name."""


class Method(ABC):
    """A way to make a vector from examples. A subclass is found by its `name`."""

    name: ClassVar[str]
    """What `ContrastConfig.method` calls it."""
    source: ClassVar[str]
    """Paper."""
    positions: ClassVar[str]
    """Which tokens it reads where the settings do not say."""
    reads: ClassVar[str] = ""
    """What it reads whatever the settings are, which then may not name positions; empty where they may."""
    needs_negative: ClassVar[bool] = True
    """Whether it can do nothing without negative examples."""
    takes_means: ClassVar[bool] = False
    """Whether the states' means may stand in for negative examples."""
    takes_weights: ClassVar[bool] = False
    """Whether examples may count with weights of their own."""
    centres: ClassVar[tuple[str, ...]] = ()
    """What `centre` may be, its default first; nothing where the method has no choice."""

    def __init_subclass__(cls) -> None:
        METHODS.register(cls, cls)

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        """Raise SteersmanError for what cannot be made, as far as this can be known before a model is loaded.

        A subclass that asks for more calls this first. `has_means`: the states' means stand in for negatives.
        """
        if not examples.positive:
            raise SteersmanError("there are no positive examples")
        if not examples.negative and not has_means and self.needs_negative:
            raise SteersmanError(f"there are no negative examples, and method {self.name!r} needs some")
        if self.reads and config.positions is not None:
            raise SteersmanError(f"method {self.name!r} reads {self.reads}: leave out positions")
        if examples.weighted and not self.takes_weights:
            able = ", ".join(other.name for other in METHODS.values() if other.takes_weights)
            raise SteersmanError(f"method {self.name!r} counts every example once; {able} take weights")
        if config.centre is not None and config.centre not in self.centres:
            choices = " or ".join(self.centres) if self.centres else "leave centre out"
            raise SteersmanError(f"method {self.name!r} takes no centre {config.centre!r}: {choices}")
        for name in ("batch_size", "max_length"):
            value = getattr(config, name)
            if value is not None and value < 1:
                raise SteersmanError(f"{name} must be at least 1, got {value}")

    @abstractmethod
    def make(
        self,
        lm: LanguageModel,
        examples: Examples,
        hooks: list[str],
        config: ContrastConfig,
        means: Mapping[str, Tensor] | None,
    ) -> Made:
        """The vector at every hook point. `means` are the states' means in place of negative examples."""


def check_differ(difference: Tensor, size: float, method: str, hook: str) -> None:
    """Raise SteersmanError when the `difference` of states whose length is `size` is nothing but rounding.

    Equal texts in one batch may come out a few bits apart: how a processor sums depends on the row.
    """
    if float(difference.norm()) <= ROUNDING * size:
        raise SteersmanError(
            f"{method} gives a zero vector at {hook}: the positive and the negative examples have the same states there"
        )
