"""Numbers at public doors: what is no number, a string of digits among it, is refused by name."""

import math
from numbers import Integral, Real
from typing import Any

from steersman.errors import SteersmanError
from steersman.reading import shown


def whole_number(value: Any, what: str, at_least: int | None = None) -> int:
    """`value` as an int. Raises SteersmanError unless it is a whole number (no bool, no string), not below `at_least`.

    >>> whole_number(3, "k")
    3
    """
    value = _single(value)
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise SteersmanError(f"{what} must be a whole number, got {value!r}")
    if at_least is not None and int(value) < at_least:
        raise SteersmanError(f"{what} must be at least {at_least}, got {value}")
    return int(value)


def number(value: Any, what: str) -> float:
    """`value` as a float. Raises SteersmanError unless it is a number (no bool, no string) that is not NaN."""
    value = _single(value)
    try:
        if not isinstance(value, bool) and isinstance(value, Real) and not math.isnan(value):
            return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        pass
    raise SteersmanError(f"{what} must be a number, got {shown(value)}")


def _single(value: Any) -> Any:
    """What a tensor or array of one element holds."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
