"""What all configurations share: fields that say whether they are part of what the work IS, merging, comparing.

A configuration is a frozen, keyword-only dataclass. Most of its fields decide the numbers; those marked
`setting(..., identity=False)` say only how the work is computed, kept or reported (device, logging, timeouts), and may
change when it is resumed.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from steersman.errors import SteersmanError, near_names

__all__ = ["differences", "identity", "merged", "part_of", "setting"]

T = TypeVar("T")


def setting(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Callable[[], Any] | Any = dataclasses.MISSING,
    identity: bool = True,
) -> Any:
    """A dataclass field that says whether it is part of the work's identity.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Config:
    ...     lr: float = 0.1
    ...     device: str = setting("auto", identity=False)
    >>> identity(Config(device="cpu"))
    {'lr': 0.1}
    """
    return dataclasses.field(default=default, default_factory=default_factory, metadata={"identity": identity})


def identity(config: Any) -> dict[str, Any]:
    """The identity fields of a dataclass instance by name, as JSON gives them back: tuples are lists, paths text."""
    return {
        field.name: _as_json(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.metadata.get("identity", True)
    }


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return identity(value)
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def merged(kind: type[T], config: T | None, settings: Mapping[str, Any]) -> T:
    """`config`, or `kind()` where it is None, with `settings` over its own.

    Raises SteersmanError for a name that `kind` does not have, naming near ones, and for one it needs and lacks.

    >>> from steersman.sae import SAEConfig
    >>> merged(SAEConfig, SAEConfig(d_in=4, d_sae=8, k=2), {"k": 3}).k
    3
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for name in settings:
        if name not in fields and name not in getattr(kind, "old_fields", ()):
            raise SteersmanError(f"unknown setting {name!r}; near it: {near_names(name, list(fields), 3)}")
    if config is not None:
        return dataclasses.replace(config, **settings)  # pyright: ignore[reportArgumentType]
    missing = [name for name, field in fields.items() if _required(field) and name not in settings]
    if missing:
        raise SteersmanError(f"{kind.__name__} needs {' and '.join(missing)}")
    return kind(**settings)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def part_of(kind: type[T], config: Any) -> T:
    """The `kind` in a configuration that has its fields and more, as a command's has."""
    names = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    return kind(**{name: getattr(config, name) for name in names})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In what two configurations differ, as text; empty if in nothing. Compared as JSON: a tuple is a list.

    >>> differences({"lr": 0.1, "recipe": {"k_aux": 3, "beta": 1}}, {"lr": 0.2, "recipe": {"k_aux": 4, "beta": 1}})
    'lr was 0.1, now 0.2; recipe.k_aux was 3, now 4'
    """
    old, new = (json.loads(json.dumps(_as_json(side))) for side in (old, new))
    return "; ".join(_differences(old, new, ""))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[str]:
    parts: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            parts += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            parts.append(f"{prefix}{name} was {a!r}, now {b!r}")
    return parts
