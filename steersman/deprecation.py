"""Old public names, which work for one release more."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

C = TypeVar("C", bound=type[Any])


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


def renamed_fields(**table: str) -> Callable[[C], C]:
    """A decorator for a dataclass, outermost: fields by their old names, to set and to read. One that is gone has the
    new name "", and what it is given is passed over.

    Example: `@renamed_fields(activation="architecture")`.
    """

    def decorate(cls: C) -> C:
        make = cls.__init__

        @wraps(make)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in table.keys() & kwargs.keys():
                _warn(f"{cls.__name__}({old}=...)", table[old])
                value = kwargs.pop(old)
                if table[old]:
                    kwargs[table[old]] = value
            make(self, *args, **kwargs)

        cls.__init__ = __init__
        cls.old_fields = {**getattr(cls, "old_fields", {}), **table}
        for old, new in table.items():
            if new:
                setattr(cls, old, property(_reader(cls.__name__, old, new)))
        return cls

    return decorate


def _reader(owner: str, old: str, new: str) -> Callable[[Any], Any]:
    def read(self: Any) -> Any:
        _warn(f"{owner}.{old}", new)
        return getattr(self, new)

    return read


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} now" if new else f"{old} is read by nothing", DeprecationWarning, stacklevel=3)
