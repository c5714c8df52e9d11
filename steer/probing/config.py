"""What `probe_features` is asked to measure."""

import math
from dataclasses import dataclass
from typing import Literal

from steersman.config import check_types
from steersman.errors import SteersmanError

KS = (1, 2, 5)  # not the field's default: a flag that may be repeated adds to its default
L2 = (1e-4, 1e-2, 1.0)

Pooling = Literal["last", "mean", "max"]
"""How the tokens of a text become one sample."""


@dataclass(frozen=True, kw_only=True)
class ProbingConfig:
    """How features are probed for labels."""

    k: tuple[int, ...] = ()
    """Features that a probe may use; without any, probes of 1, 2 and 5."""
    pool: Pooling = "last"
    """What a sample is where a text has one label: its last token, as in sae-probes, or the mean or the largest
    activation over its tokens. A concept that is somewhere in the text is found by max."""
    level: Literal["auto", "text", "token"] = "auto"
    """What a sample is where the labels are of spans: each token (auto), or the text, which has every label in it."""
    heldout: float = 0.25
    """Share of the texts on which the probes are measured; they take no part in choosing or fitting."""
    l2: tuple[float, ...] = ()
    """Penalties of the regression, of which each probe takes the one that does best on a quarter of the training texts;
    without any, 1e-4, 1e-2 and 1."""
    raw: bool = True
    """Also fit a probe on the raw activations: what there is to find."""
    random_draws: int = 5
    """Sets of random features, as many as the probe has, over which their baseline is averaged; 0 for none."""
    random_sae: bool = True
    """Also probe an SAE that learned nothing: random directions, as many active a token."""
    absorption: bool = False
    """Also measure feature splitting and absorption for each label."""
    split_rise: float = 0.03
    """Rise of the F1 score by which one more feature counts as a split of the concept."""
    max_features: int = 10
    """Features that a concept may be split into, at most."""
    draws: int = 500
    """Draws of the held-out texts for the 95 % intervals."""
    batch_size: int = 16
    """Texts per pass."""
    max_length: int | None = None
    """Cut texts to this many tokens, BOS included."""
    seed: int = 0
    """Seed of the split, of what is random, and of the intervals."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch_size", "draws", "max_features"):
            if getattr(self, name) < 1:
                raise SteersmanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.random_draws < 0:
            raise SteersmanError(f"random_draws must be at least 0, got {self.random_draws}")
        if min(self.ks) < 1 or len(set(self.ks)) != len(self.ks):
            raise SteersmanError(f"k must be different numbers of features from 1, got {', '.join(map(str, self.k))}")
        if not 0 < self.heldout < 1 or not 0 < self.split_rise < 1:
            raise SteersmanError("heldout and split_rise must lie between 0 and 1")
        if not all(value > 0 and math.isfinite(value) for value in self.l2):
            raise SteersmanError(f"l2 must be above 0, got {', '.join(map(str, self.l2))}")

    @property
    def ks(self) -> tuple[int, ...]:
        """The numbers of features, rising."""
        return tuple(sorted(self.k or KS))

    @property
    def penalties(self) -> tuple[float, ...]:
        """The penalties to choose from."""
        return self.l2 or L2
