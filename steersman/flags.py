"""Flags and YAML files as the dataclass of a command: how `steersman` reads what it is given.

A field `batch_size` is the flag `--batch-size` and the YAML key `batch_size`. Flags win over the file.
"""

import contextlib
import dataclasses
import io
import logging
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from steersman.config import default_of, read_yaml, whole_number
from steersman.errors import SteersmanError, UnfinishedError, near_names
from steersman.visible import visible

log = logging.getLogger(__name__)

_TYRO_MISTAKE = 2


def parse(config_type: type[Any], args: list[str], program: str) -> Any:
    """An instance of the dataclass `config_type` from flags and, where `--config` names one, a YAML file.

    Raises a SteersmanError for an unknown flag or key, a missing or malformed value, and what the dataclass refuses.
    """
    import tyro

    args, path = _without_file(_renamed(config_type, args))
    options: dict[str, Any] = {} if path is None else {"default": _defaults(config_type, path, args)}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                config_type,
                args=args,
                prog=program,
                return_unknown_args=True,
                config=(tyro.conf.UseAppendAction,),
                registry=_registry(),
                **options,
            )
    except SystemExit as stop:
        if stop.code == _TYRO_MISTAKE:
            told = _one_line(complaint.getvalue())
            refused = told.removeprefix(f"Error parsing {config_type.__name__}: ")
            if refused != told:  # by the dataclass
                raise SteersmanError(shell_words(refused, _switches(config_type))) from None
            raise SteersmanError(f"{told} (see {program} --help)") from None
        raise
    if unknown:
        flags = [flag_of(field.name) for field in dataclasses.fields(config_type)]
        raise SteersmanError(f"{program} has no flag {unknown[0]}; near it: {near_names(unknown[0], flags, 3)}")
    return config


def flag_of(field: str) -> str:
    """The flag of a field.

    >>> flag_of("batch_size")
    '--batch-size'
    """
    return f"--{field.replace('_', '-')}"


def config_type(function: Callable[[Any], None]) -> type[Any]:
    """The dataclass of a command's flags: the annotation of its function's one argument."""
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    (config,) = hints.values()
    return config


def _switches(config_type: type[Any]) -> dict[str, bool]:
    return {field.name: field.type is bool for field in dataclasses.fields(config_type)}


def shell_words(text: str, fields: Mapping[str, bool]) -> str:
    """`text` with the names of settings as the flags that they are on a command line.

    `fields` says of each name whether it is a switch, `--name` or `--no-name`. A name of one word is a flag only where
    a value is given to it or it stands between backticks, as it may be a word of the sentence as well.

    >>> switches = {"k": False, "lr": False, "batch_size": False, "ema": True}
    >>> shell_words("k = 9: give `lr`, batch_size or ema=False", switches)
    '--k 9: give `--lr`, --batch-size or --no-ema'
    """
    for name in sorted(fields, key=len, reverse=True):
        flag = flag_of(name)
        start = r"(?<![\w./\\'\"`=-])"
        if fields[name]:
            text = re.sub(rf"{start}{name} ?= ?False\b", f"--no-{flag[2:]}", text)
            text = re.sub(rf"{start}{name} ?= ?True\b", flag, text)
        text = re.sub(rf"{start}{name}(?: = |=)(?=[\w'\"-])", f"{flag} ", text)
        text = re.sub(rf"{start}{name}=(?=[\s,;:)]|$)", flag, text)
        text = text.replace(f"`{name}`", f"`{flag}`")
        if "_" in name:
            text = re.sub(rf"{start}{name}(?![\w/(\[]|\.\w|['\"])", flag, text)
    return text


@contextlib.contextmanager
def in_words_of_the_shell(config_type: type[Any]) -> Iterator[None]:
    """Within the block a mistake is told in flags rather than in the names of Python's settings."""
    try:
        yield
    except UnfinishedError:
        raise
    except SteersmanError as error:
        told = shell_words(str(error), _switches(config_type))
        if told == str(error):
            raise
        raise SteersmanError(told) from error


class ShellFormatter(logging.Formatter):
    """Messages with the settings of `config_type` as the flags that they are, and nothing that moves the terminal."""

    def __init__(self, config_type: type[Any]) -> None:
        super().__init__("%(message)s")
        self._switches = _switches(config_type)

    def format(self, record: logging.LogRecord) -> str:
        return visible(shell_words(super().format(record), self._switches), newline="\n")


def _registry() -> Any:
    """How tyro reads whole numbers: as YAML does."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def whole(info: Any) -> Any:
        if info.type is not int:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda args: whole_number(args[0]),
            is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _one_line(complaint: str) -> str:
    """The message inside tyro's box."""
    lines = [line.strip(" │|") for line in complaint.splitlines()]
    body = [line for line in lines[1:] if line and set(line) - set("-─╭╮╰╯")]
    ends = [i for i, line in enumerate(body) if line.startswith(("For full helptext", "Argument helptext"))]
    return " ".join(body[: ends[0]] if ends else body) or "these flags cannot be read"


def _renamed(config_type: type[Any], args: list[str]) -> list[str]:
    """The flags with those that an earlier version called otherwise under their names of today, each said once."""
    names = {field.name for field in dataclasses.fields(config_type)}
    old = {o: new for o, new in getattr(config_type, "old_fields", {}).items() if new and o not in names}
    flags = {flag_of(o): flag_of(new) for o, new in old.items()}
    renamed = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag in flags:
            log.warning("%s is called %s now; the old name goes with the next release", flag, flags[flag])
        renamed.append(flags.get(flag, flag) + equals + value)
    return renamed


def _without_file(args: list[str]) -> tuple[list[str], Path | None]:
    """The flags without `--config FILE`, and the file."""
    for i, arg in enumerate(args):
        if arg.startswith("--config="):
            return args[:i] + args[i + 1 :], Path(arg.removeprefix("--config="))
        if arg == "--config":
            if i + 1 == len(args):
                raise SteersmanError("--config needs the name of a YAML file")
            return args[:i] + args[i + 2 :], Path(args[i + 1])
    return args, None


def _defaults(config_type: type[Any], path: Path, args: list[str]) -> Any:
    """What the YAML file at `path` holds, as the defaults of the flags: an instance whose rules are not checked yet.

    A flag that may be repeated adds to its default, so the file's value of one that is given is left out.
    """
    import tyro

    settings = read_yaml(path, config_type)
    given = {arg.split("=")[0].removeprefix("--").replace("-", "_") for arg in args}
    defaults = object.__new__(config_type)  # not through __init__, whose checks need the flags as well
    for field in dataclasses.fields(config_type):
        value = default_of(field, tyro.MISSING)
        if field.name in settings and not (field.name in given and isinstance(settings[field.name], tuple)):
            value = settings[field.name]
        object.__setattr__(defaults, field.name, value)
    return defaults
