"""Names for the features of a decomposition: given, the SAE's own, or the tokens that a feature writes."""

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike

from steersman.lm import LanguageModel
from steersman.lm.lens import logit_lens
from steersman.sae import SAE, FeatureLabel
from steersman.steer.labels.read import read_labels
from steersman.steer.labels.words import words_of

_TOKENS = 5

Labels = Mapping[int, str] | Mapping[int, FeatureLabel]
"""Labels by feature id, as text or as `FeatureLabels`."""


def load_labels(path: str | PathLike[str]) -> dict[int, str]:
    """`read_labels`, as a dictionary of texts: the older name of it."""
    warnings.warn("load_labels is read_labels now", DeprecationWarning, stacklevel=2)
    return {feature: label.text for feature, label in read_labels(path).items()}


def labels_of(features: Sequence[int], sae: SAE, labels: Labels | None, lm: LanguageModel | None) -> list[str]:
    """A label for each of `features`: the one given, else the SAE's own, else with a model the tokens that its decoder
    row promotes."""
    known = {feature: label.text for feature, label in sae.labels.items()}
    known |= {j: label if isinstance(label, str) else label.text for j, label in (labels or {}).items()}
    unknown = [feature for feature in dict.fromkeys(features) if feature not in known]
    if lm is not None and unknown:
        writes = logit_lens(lm, sae.W_dec[unknown], _TOKENS)
        known |= {feature: " ".join(words_of(promotes)) for feature, (promotes, _) in zip(unknown, writes)}
    return [known.get(feature, "") for feature in features]
