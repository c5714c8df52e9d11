"""Old public names, which work for one release more."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose `names` are elsewhere now: old name -> "module:new name".

    >>> __getattr__ = moved("steersman.steer.methods", {"read_texts": "steersman.text:read_texts"})
    >>> __getattr__("read_texts").__module__
    'steersman.text'
    """

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, new = names[name].partition(":")
        warnings.warn(f"{package}.{name} is {module}.{new} now", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(module), new)

    return getattr_
