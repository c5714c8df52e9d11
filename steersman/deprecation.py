"""Old public names: each works for one release, and warns."""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

C = TypeVar("C", bound=type[Any])


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Say that `old` is now `new`, at the caller's line."""
    warnings.warn(f"{old} is now {new}; the old name goes in the next release", DeprecationWarning, stacklevel)


def renamed_names(module: str, table: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` for names that moved: old name -> full new name.

    Example: `__getattr__ = renamed_names(__name__, {"Old": "steersman.sae.New"})`.
    """

    def __getattr__(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = table[name].rpartition(".")
        warn(f"{module}.{name}", table[name])
        return getattr(import_module(home), new)

    return __getattr__


def renamed_fields(**table: str) -> Callable[[C], C]:
    """A decorator for a dataclass, outermost: fields by their old names, to set and to read.

    Example: `@renamed_fields(activation="architecture")`.
    """

    def decorate(cls: C) -> C:
        make = cls.__init__

        @wraps(make)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in table.keys() & kwargs.keys():
                warn(f"{cls.__name__}({old}=...)", table[old])
                kwargs[table[old]] = kwargs.pop(old)
            make(self, *args, **kwargs)

        cls.__init__ = __init__
        for old, new in table.items():
            setattr(cls, old, property(_reader(cls.__name__, old, new)))
        return cls

    return decorate


def _reader(owner: str, old: str, new: str) -> Callable[[Any], Any]:
    def read(self: Any) -> Any:
        warn(f"{owner}.{old}", new)
        return getattr(self, new)

    return read
