"""Parts that people add from outside, found by name: one idiom for architectures, formats and methods.

A base class holds a `Registry`; a subclass that says its `name` is found under it from then on, wherever it is written.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from steersman.errors import SteersmanError, near_names

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Name -> part, in the order of registration. A name that is not there is a SteersmanError that lists near ones.

    >>> class Animal:
    ...     kinds: "Registry[type[Animal]]" = Registry("animal")
    ...     def __init_subclass__(cls) -> None:
    ...         Animal.kinds.register(cls, cls)
    >>> class Otter(Animal):
    ...     name = "otter"
    >>> list(Animal.kinds), Animal.kinds["otter"] is Otter
    (['otter'], True)
    """

    def __init__(self, what: str) -> None:
        """`what` names a part in messages."""
        self.what = what
        self._parts: dict[str, T] = {}

    def register(self, cls: type[Any], part: T) -> None:
        """Keep `part` under the `name` that the class `cls` itself says; a class without one is a base for others.

        A class may be defined again, as in a notebook. Raises SteersmanError where another class has the name.
        """
        name = cls.__dict__.get("name")
        if not name:
            return
        before = self._parts.get(name)
        if before is not None and _place(before) != _place(part):
            raise SteersmanError(f"{self.what} {name!r} is already that of {'.'.join(_place(before))}; choose another")
        self._parts[name] = part

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            near = near_names(name, list(self._parts), limit=1)
            hint = f"; the nearest is {near!r}" if near else ""
            raise SteersmanError(f"unknown {self.what} {name!r}; have {', '.join(self._parts)}{hint}")
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _place(part: Any) -> tuple[str, str]:
    cls = part if isinstance(part, type) else type(part)
    return cls.__module__, cls.__qualname__
