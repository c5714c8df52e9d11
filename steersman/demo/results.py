"""What a quickstart finds, for its report."""

from dataclasses import dataclass
from pathlib import Path

from steersman.demo.concept_features import ConceptFeature
from steersman.demo.targets import Target
from steersman.demo.vectors import Contrast, Targeted
from steersman.train.reports.evaluate import Evaluation
from steersman.train.reports.features import Feature


@dataclass(frozen=True, kw_only=True)
class Dose:
    """What one strength does, over all samples."""

    strength: float
    """In multiples of the feature's largest activation in training; 0 is unsteered."""
    rate: float
    """Words of the target per 100 generated words."""
    nll: float
    """Nats per generated token of the text under the unsteered model."""
    texts: tuple[str, ...]
    """The samples, in the order of the prompts."""


@dataclass(frozen=True, kw_only=True)
class SteeredTarget:
    """A target, the feature that served it best and its dose-response curve."""

    target: Target
    """What was steered towards."""
    feature: int
    """The candidate chosen, on texts of its own."""
    label: str = ""
    """What the SAE's labels say of it."""
    strength: float
    """The strength chosen on the same texts."""
    doses: list[Dose]
    """By rising strength, on fresh prompts; the first is unsteered."""

    @property
    def dose(self) -> Dose:
        """What the chosen strength does on fresh prompts."""
        return next(dose for dose in self.doses if dose.strength == self.strength)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything the report shows."""

    model_name: str
    hook_name: str
    run: Path
    evaluation: Evaluation
    concepts: list[ConceptFeature]
    features: list[Feature]
    steered: list[SteeredTarget]
    targeted: Targeted | None
    contrast: Contrast | None
    seconds: float
