"""`steersman COMMAND --help`, read from the source of the command's dataclass, as documentation tools read it.

Nothing is imported, so help is there at once: the classes of a command lie in modules that load PyTorch. A test holds
what is read to the dataclasses themselves.
"""

import ast
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from steersman.flags import flag_of, shell_words

_ROOT = Path(__file__).parent.parent
_KINDS = {"int": "N", "float": "X", "str": "TEXT"}
_COLUMN = 30

HOW_IT_RUNS = "How it runs; changes none of what is computed"


class Scope(NamedTuple):
    """A statement of a module and the module it stands in, where the names in it are looked up."""

    module: str
    node: ast.AST


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag, as its field says."""

    field: str
    """Name of the field."""
    value: str
    """What follows the flag; empty for a switch."""
    default: str | None
    """The default as it is written; None where the flag must be given."""
    doc: str
    """The docstring under the field."""
    part: str
    """The group that it is shown in."""
    repeatable: bool = False
    """Whether it may be given more than once."""
    positional: bool = False
    """Whether it is given without its name."""


def help_text(function: str, program: str) -> str:
    """The help of the command whose function is `module:function`."""
    doc, flags = flags_of(function)
    names = {flag.field: not flag.value for flag in flags}
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    places = " ".join(flag.field.upper() for flag in flags if flag.positional)
    lines = [f"usage: {program} {places + ' ' if places else ''}[FLAGS] [--config FILE.yaml]", ""]
    lines += textwrap.wrap(shell_words(doc, names), width)
    parts: dict[str, list[Flag]] = {}
    for flag in flags:
        parts.setdefault("Needed" if flag.default is None else flag.part, []).append(flag)
    last = parts.pop(HOW_IT_RUNS, [])
    needed = parts.pop("Needed", [])
    for title, members in [("Needed", needed), *parts.items(), (HOW_IT_RUNS, last)]:
        if members:
            lines += ["", f"{title}:"]
            lines += [line for flag in members for line in _shown(flag, names, width)]
    lines += ["", "Whole numbers may be written 20k, 10M or 1e6. Every flag is a key of a --config file as well:"]
    return "\n".join([*lines, "`batch_size: 64` for `--batch-size 64`; flags win over the file."])


def _shown(flag: Flag, names: Mapping[str, bool], width: int) -> list[str]:
    if flag.positional:
        head = f"  {flag.field.upper()}"
    elif flag.value:
        head = f"  {flag_of(flag.field)} {flag.value}"
    else:
        head = f"  {flag_of(flag.field)}"
    doc = shell_words(flag.doc, names)
    if flag.repeatable and "repeated" not in doc:
        doc += " May be repeated."
    if not flag.value and not flag.positional and flag.default == "True":
        doc += f" On; off with --no-{flag_of(flag.field)[2:]}."
    elif flag.value and flag.default not in (None, "None", "()", "''"):
        doc += f" (default {flag.default})"
    wrapped = textwrap.wrap(doc, max(width - _COLUMN, 30))
    if len(head) < _COLUMN - 1 and wrapped:
        return [f"{head:<{_COLUMN}}{wrapped[0]}", *(" " * _COLUMN + line for line in wrapped[1:])]
    return [head, *(" " * _COLUMN + line for line in wrapped)]


def flags_of(function: str) -> tuple[str, list[Flag]]:
    """The docstring of a command's dataclass and its flags, those of its own first."""
    module, _, name = function.partition(":")
    found = _find(module, name)
    assert found is not None
    assert isinstance(found.node, ast.FunctionDef)
    annotation = found.node.args.args[0].annotation
    assert isinstance(annotation, ast.Name)
    config = _find(found.module, annotation.id)
    assert config is not None
    classes = _bases(config)
    flags: dict[str, Flag] = {}
    for scope in reversed(classes):
        for flag in _fields(scope, own=scope == config):
            flags[flag.field] = flag
    order = [_title(scope, own=scope == config) for scope in classes]
    rest = sorted(flags.values(), key=lambda flag: order.index(flag.part) if flag.part in order else len(order))
    return _doc(config.node), rest


def _bases(config: Scope) -> list[Scope]:
    """The class and its bases in the package, each before those it builds on."""
    assert isinstance(config.node, ast.ClassDef)
    found = [config]
    for base in config.node.bases:
        scope = _find(config.module, base.id) if isinstance(base, ast.Name) else None
        if scope is not None and isinstance(scope.node, ast.ClassDef):
            found += [one for one in _bases(scope) if one not in found]
    return found


def _doc(node: ast.AST) -> str:
    assert isinstance(node, ast.ClassDef)
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def _title(scope: Scope, *, own: bool) -> str:
    return "Of this command" if own else _doc(scope.node).split(".")[0].split(":")[0]


def _fields(scope: Scope, *, own: bool) -> list[Flag]:
    assert isinstance(scope.node, ast.ClassDef)
    body, found = scope.node.body, []
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(node.annotation):
            continue
        value, repeatable, positional = _kind(Scope(scope.module, node.annotation))
        if value is None:
            continue  # a mapping, which only YAML can give
        default, identity = _default(scope.module, node.value)
        has_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        doc = " ".join(str(after.value.value).split()) if has_doc else ""  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        part = _title(scope, own=own) if identity else HOW_IT_RUNS
        flag = Flag(field=node.target.id, value=value, default=default, doc=doc, part=part)
        found.append(Flag(**{**vars(flag), "repeatable": repeatable, "positional": positional}))
    return found


def _kind(scope: Scope) -> tuple[str | None, bool, bool]:
    """What follows the flag (None: nothing can), whether it is repeatable, whether it stands without its name."""
    node = scope.node
    if isinstance(node, ast.BinOp):  # X | None
        kinds = [_kind(Scope(scope.module, side)) for side in (node.left, node.right)]
        named = [kind for kind in kinds if kind[0] != "None"]
        value = "|".join(dict.fromkeys(str(kind[0]) or "True|False" for kind in named))
        return value, any(kind[1] for kind in named), False
    if isinstance(node, ast.Constant):
        return str(node.value), False, False
    if isinstance(node, ast.Name):
        return _named(scope.module, node.id)
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return "TEXT", False, False
    arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if node.value.id == "Literal":
        return "|".join(str(one.value) for one in arguments if isinstance(one, ast.Constant)), False, False
    if node.value.id == "dict":
        return None, False, False
    kinds = [_kind(Scope(scope.module, one)) for one in arguments]
    if node.value.id == "tuple":
        endless = isinstance(arguments[-1], ast.Constant) and arguments[-1].value is ...
        return str(kinds[0][0]) if endless else " ".join(str(kind[0]) for kind in kinds), endless, False
    return kinds[0][0], kinds[0][1], node.value.id == "Positional"


def _named(module: str, name: str) -> tuple[str | None, bool, bool]:
    if name in _KINDS or name == "bool":
        return _KINDS.get(name, ""), False, False
    alias = _find(module, name)
    return ("TEXT", False, False) if alias is None else _kind(alias)


def _default(module: str, node: ast.expr | None) -> tuple[str | None, bool]:
    """The default as it is written (None: it must be given), and whether the field is part of what the work is."""
    identity = True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        identity = "identity" not in options
        if "default_factory" in options:
            return ast.unparse(options["default_factory"]) + "()", identity
        node = node.args[0] if node.args else options.get("default")
    if node is None:
        return None, identity
    return _written(module, node), identity


def _written(module: str, node: ast.AST) -> str:
    """A default's value as text; constants are followed to where they are written."""
    if isinstance(node, ast.Name) and (found := _find(module, node.id)) is not None:
        return _written(*found)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = _find(module, node.value.id)
        if owner is None:
            return node.attr  # math.inf
        for base in _bases(owner):
            assert isinstance(base.node, ast.ClassDef)
            for one in base.node.body:
                if isinstance(one, ast.AnnAssign) and ast.unparse(one.target) == node.attr and one.value is not None:
                    return _written(base.module, one.value)
    try:
        value = ast.literal_eval(node)  # pyright: ignore[reportArgumentType]
    except ValueError:
        return ast.unparse(node)
    return " ".join(map(str, value)) if isinstance(value, tuple) and value else str(value)


@cache
def _names(module: str) -> dict[str, Scope | tuple[str, str]]:
    """What a module of the package defines, and the names it takes from others: name -> (module, name)."""
    path = _ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names: dict[str, Scope | tuple[str, str]] = {}
    for node in ast.walk(ast.parse(path.read_text())) if path.is_file() else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.setdefault(node.name, Scope(module, node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steersman"):
            names.update({alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names})
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.setdefault(node.targets[0].id, Scope(module, node.value))
    return names


def _find(module: str, name: str) -> Scope | None:
    """Where a name that a module of the package uses is defined; None for names from elsewhere."""
    found = _names(module).get(name)
    if found is None or isinstance(found, Scope):
        return found
    return _find(*found)
