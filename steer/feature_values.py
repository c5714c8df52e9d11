"""How features are written on a command line and in a configuration: `id`, or `id=value`."""

from collections.abc import Sequence

from steersman.errors import SteersmanError


def parse_features(texts: Sequence[str]) -> dict[int, float]:
    """Feature id -> value (a strength or a weight; 1 where none is given) from `id` and `id=value` texts.

    Raises SteersmanError for a text of another form, a feature given twice, and no feature at all.

    >>> parse_features(["12", "40=-2.5"])
    {12: 1.0, 40: -2.5}
    """
    features: dict[int, float] = {}
    for text in texts:
        head, mark, tail = text.partition("=")
        try:
            feature, value = int(head), float(tail) if mark else 1.0
        except ValueError:
            message = f"feature {text!r} is not of the form id or id=value, such as 12 or 40=-2.5"
            raise SteersmanError(message) from None
        if feature in features:
            raise SteersmanError(f"feature {feature} is given twice")
        features[feature] = value
    if not features:
        raise SteersmanError("no feature named: give --feature id=value")
    return features


def feature_ids(texts: Sequence[str]) -> list[int]:
    """Feature ids from texts of the same form, where a value has no meaning and is refused. Nothing gives nothing.

    >>> feature_ids(["12", "40"])
    [12, 40]
    """
    if valued := next((text for text in texts if "=" in text), None):
        raise SteersmanError(f"feature {valued!r}: only the id is wanted here, such as {valued.partition('=')[0]}")
    return list(parse_features(texts)) if texts else []
