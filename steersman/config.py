"""What all configurations share: fields that say whether they are part of what the work IS, merging, comparing, YAML.

A configuration is a frozen, keyword-only dataclass. Most of its fields decide the numbers; those marked
`setting(..., identity=False)` say only how the work is computed, kept or reported (device, logging, timeouts), and may
change when it is resumed.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from steersman.errors import SteersmanError, near_names
from steersman.reading import read_text, shown

log = logging.getLogger(__name__)

__all__ = ["check_types", "differences", "identity", "merged", "part_of", "setting"]

T = TypeVar("T")

_YAML_BYTES = 1 << 18
"""Largest file of settings that is read: its reader is slow."""
_YAML_DEPTH = 32


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
    required = [name for name, field in fields.items() if default_of(field) is dataclasses.MISSING]
    missing = [name for name in required if name not in settings]
    if missing:
        raise SteersmanError(f"{kind.__name__} needs {' and '.join(missing)}")
    return kind(**settings)


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


# Numbers as people write them


_NUMBER = re.compile(r"([+-]?[0-9](?:_?[0-9])*(?:\.[0-9]+)?)(?:[eE]\+?([0-9]{1,2})|([kKMGBT]))?", re.ASCII)
_POWERS = {"k": 3, "K": 3, "M": 6, "G": 9, "B": 9, "T": 12}
_DIGITS = 25


def whole_number(value: str | int | float) -> int:
    """A whole number from what a flag or a YAML file gives: 1000, 1_000, 1e3, 1k, 2.5M (k, M, G or B, T).

    Raises ValueError for anything else, among it what has a fraction.

    >>> whole_number("10M"), whole_number("1e6"), whole_number("1.5k"), whole_number(8.0)
    (10000000, 1000000, 1500, 8)
    """
    if not isinstance(value, str):
        if int(value) != value:
            raise ValueError(f"{value} is not a whole number")
        return int(value)
    match = _NUMBER.fullmatch(value.strip())
    if match is None or len(match[1]) > _DIGITS:
        raise ValueError(f"{value[:40]!r} is not a whole number: write 1000000, 1_000_000, 1e6 or 1M")
    exact = Fraction(match[1].replace("_", "")) * 10 ** int(match[2] or _POWERS.get(match[3] or "", 0))
    if exact.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number")
    return int(exact)


# Settings from a YAML file, held to the types of the dataclass that they are for


def read_yaml(path: Path, kind: type[Any]) -> dict[str, Any]:
    """The settings for the dataclass `kind` that the file at `path` holds, each as its field's type.

    Raises a SteersmanError for a file that cannot be read or is no mapping, an unknown key and a value of another type.
    """
    content = parse_yaml(read_text(path, limit=_YAML_BYTES), str(path))
    if not isinstance(content, dict):
        raise SteersmanError(f"{path} must hold a mapping of settings, such as `d_sae: 4096`")
    return typed(content, kind, str(path))


class _Loader(yaml.SafeLoader):
    """Plain settings: no value that another one is, by an alias, which makes small files large; no dates."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) stands for another value; write the value itself")
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > _YAML_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, of plain settings only. Raises a SteersmanError of one line that names `where` it is.

    >>> parse_yaml("{d_sae: 64, texts: [a, b]}", "settings.yaml")
    {'d_sae': 64, 'texts': ['a', 'b']}
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise SteersmanError(f"{where} is not YAML that is read here: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
        raise SteersmanError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}") from error


def typed(content: Mapping[Any, Any], kind: type[Any], where: str) -> dict[str, Any]:
    """The settings in `content` as the fields of the dataclass `kind` have them; `where` is named in errors.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     lr: float
    ...     layers: tuple[int, ...] = ()
    >>> typed({"lr": "1e-3", "layers": [2, 3]}, Config, "settings.yaml")
    {'lr': 0.001, 'layers': (2, 3)}
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    old = getattr(kind, "old_fields", {})
    settings: dict[str, Any] = {}
    for given, value in content.items():
        key = given if given in names else old.get(given, given)
        if given in old and not key:
            continue  # an old field that nothing reads
        if key != given:
            log.warning("%s: %s is called %s now; the old name goes with the next release", where, given, key)
        if key in settings:
            raise SteersmanError(f"{where}: {key} is said twice, by its old and its new name: keep one")
        if key not in names:
            near = near_names(str(key)[:100], names, 3)
            raise SteersmanError(f"{where}: unknown key {shown(key)}; near it: {near}")
        try:
            settings[key] = _as_type(value, hints[key])
        except (TypeError, ValueError, OverflowError):
            expected = _type_name(hints[key])
            raise SteersmanError(f"{where}: {key} is {shown(value)}, it should be {expected}") from None
    return settings


def check_types(config: Any, of: str = "") -> None:
    """Hold the fields of a configuration to their types, as the first thing in its `__post_init__`.

    Lists become tuples where a field is one, numbers of NumPy Python's own, so that files can hold them. Raises a
    SteersmanError that names the first field with another type than its own; `of` says whose, such as "of an SAE".

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Config:
    ...     k: int = 0
    ...     layers: tuple[int, ...] = ()
    ...     def __post_init__(self) -> None:
    ...         check_types(self)
    >>> Config(layers=[2, 3])
    Config(k=0, layers=(2, 3))
    >>> Config(k=2.5)
    Traceback (most recent call last):
        ...
    steersman.errors.SteersmanError: k is 2.5, it should be a whole number
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        try:
            held = _held_to(_layer_as_text(value) if field.name in _HOOKS else value, hints[field.name])
        except (TypeError, ValueError):
            expected = _type_name(hints[field.name])
            whose = f"{field.name} {of}".strip()
            raise SteersmanError(f"{whose} is {shown(value)}, it should be {expected}") from None
        if held is not value:
            object.__setattr__(config, field.name, held)


_HOOKS = ("hook", "hooks", "hook_out")
"""Fields that name hook points, in which a layer's number means what its text does."""


def _layer_as_text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_layer_as_text, value))
    return str(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _held_to(value: Any, hint: Any) -> Any:
    """`value` if it is what `hint` says, in Python's own type; raises TypeError otherwise. A text is no number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _held_to(value, arguments[0])
    if origin in (Union, types.UnionType):
        for one in arguments:
            with contextlib.suppress(TypeError, ValueError):
                return _held_to(value, one)
        raise TypeError
    if hint is None or hint is type(None):
        kinds: Any = type(None)
    elif origin is Literal:
        return _as_type(value, hint)
    elif hint is bool or hint in _NUMBERS:
        if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
            if hint is bool:
                return bool(value)
            raise TypeError
        if hint is not bool and isinstance(value, _NUMBERS[hint]):
            return value if isinstance(value, int | float) else hint(value)
        raise TypeError
    elif origin is tuple:
        items = value if isinstance(value, list | tuple) else None
        if items is None or (arguments[-1] is not Ellipsis and len(arguments) != len(items)):
            raise TypeError
        of_items = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else arguments
        held = tuple(_held_to(item, kind) for item, kind in zip(items, of_items))
        return value if isinstance(value, tuple) and all(a is b for a, b in zip(held, value)) else held
    elif hint is str:
        kinds = (str, os.PathLike)
    else:
        kinds = {dict: Mapping, list: list | tuple}.get(origin or hint, origin or hint)
    is_known = isinstance(kinds, type | tuple | types.UnionType) and not getattr(kinds, "_is_protocol", False)
    if is_known and not isinstance(value, kinds):
        raise TypeError
    return value


_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}


def default_of(field: dataclasses.Field[Any], missing: Any = dataclasses.MISSING) -> Any:
    """A dataclass field's default, or `missing` where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return missing if field.default is dataclasses.MISSING else field.default


def _as_type(value: Any, hint: Any) -> Any:
    """`value`, which YAML gave, as `hint` says; numbers may be texts, as YAML takes `1e-3` for one. Raises TypeError
    or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _as_type(value, arguments[0])
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _as_one_of(value, arguments)
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):  # True == 1
            raise ValueError
        return value
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(items):
            raise ValueError
        return tuple(_as_type(item, kind) for item, kind in zip(items, kinds))
    if origin in (dict, list) or hint in (dict, list):
        if not isinstance(value, origin or hint):
            raise TypeError
        return value
    return _as_plain(value, hint)


def _as_one_of(value: Any, hints: tuple[Any, ...]) -> Any:
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        if hint is not type(None):
            try:
                return _as_type(value, hint)
            except (TypeError, ValueError, OverflowError):
                continue
    raise ValueError


def _as_plain(value: Any, hint: Any) -> Any:
    if hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
        raise TypeError
    if hint is str and isinstance(value, str | int | float):
        return str(value)
    if hint is float and isinstance(value, str | int | float):
        return float(value)
    if hint is int and isinstance(value, str | int | float):
        return whole_number(value)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise TypeError


def _type_name(hint: Any) -> str:
    """A type in words, for an error message."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return "a list, each " + _type_name(arguments[0])
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
