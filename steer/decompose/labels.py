"""Names for features: given by the user, read from a file, or the tokens that a feature writes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.lens import logit_lens
from steersman.reading import read_json
from steersman.sae import SAE

_TOKENS = 5
_LARGEST_FILE = 1 << 28  # features.json has half a kilobyte for each feature


def load_labels(path: str | Path) -> dict[int, str]:
    """Labels by feature id from a JSON file: `{"12": "fog", ...}`, or the list that `steersman features` writes (an
    entry's `label`, or else the tokens it promotes)."""
    found = read_json(path, limit=_LARGEST_FILE)
    try:
        if isinstance(found, dict):
            return {int(feature): str(label) for feature, label in found.items()}
        return {int(entry["id"]): entry.get("label") or _tokens(entry.get("promotes", ())) for entry in found}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteersmanError(
            f'{path} holds no feature labels: {{"12": "fog"}} or the features.json of `steersman features` is needed'
        ) from error


def _tokens(tokens: Sequence[str]) -> str:
    words = [token.strip() for token in tokens[:_TOKENS]]
    return " ".join(word for word in words if word)


def labels_of(
    features: Sequence[int], sae: SAE, labels: Mapping[int, str] | None, lm: LanguageModel | None
) -> list[str]:
    """A label for each of `features`: the one given, else with a model the tokens that its decoder row promotes."""
    known = dict(labels or {})
    unknown = [feature for feature in dict.fromkeys(features) if feature not in known]
    if lm is not None and unknown:
        writes = logit_lens(lm, sae.W_dec[unknown], _TOKENS)
        known |= {feature: _tokens(promotes) for feature, (promotes, _) in zip(unknown, writes)}
    return [known.get(feature, "") for feature in features]
