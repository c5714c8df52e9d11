"""Print docs/api.md: the public names of each package, with the first sentence of what each says of itself.

python scripts/dev/api_page.py > docs/api.md
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import tyro

PACKAGES = ("steersman", "steersman.lm", "steersman.kernels", "steersman.sae", "steersman.train", "steersman.steer")
HEAD = """\
# Public names

What scripts and your own code may rely on: the `__all__` of these packages. Anything else may change without notice. A
name that is renamed works for one more release, with a DeprecationWarning. Written by `scripts/dev/api_page.py`."""


def source_of(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    ends = [found.start() for found in re.finditer(r"\.(?= +[A-Z`(\[]|$)", paragraph)]
    whole = (paragraph[:end] for end in ends if paragraph[:end].count("(") == paragraph[:end].count(")"))
    return next(whole, paragraph).removesuffix(":")


def said_of_constant(package: str, name: str) -> str:
    """The string below the assignment of `name`, in the module that the package has it from."""
    nodes = ast.walk(source_of(importlib.import_module(package)))
    home = next(node.module for node in nodes if isinstance(node, ast.ImportFrom) and name in names_in(node))
    body = source_of(importlib.import_module(home or "")).body
    for node, below in zip(body, [*body[1:], None]):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                return str(below.value.value)
            raise SystemExit(f"api_page: {home}.{name} has no docstring below it")
    return said_of_constant(home or "", name)  # a package that has it from elsewhere


def names_in(node: ast.ImportFrom) -> set[str]:
    return {alias.name for alias in node.names}


def kind_of(value: Any) -> str:
    return "Classes" if inspect.isclass(value) else "Functions" if inspect.isroutine(value) else "Constants"


def section(package: str) -> Iterator[str]:
    """The lines of one package."""
    module = importlib.import_module(package)
    yield f"\n## {package}\n\n{first_sentence(module.__doc__ or '')}."
    said: dict[str, list[str]] = {"Classes": [], "Functions": [], "Constants": []}
    for name in module.__all__:
        value = getattr(module, name)
        kind = kind_of(value)
        doc = said_of_constant(package, name) if kind == "Constants" else inspect.getdoc(value)
        if not doc:
            raise SystemExit(f"api_page: {package}.{name} has no docstring")
        item = f"- `{name}`: {first_sentence(doc)}"
        said[kind].append(
            textwrap.fill(item, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        )
    for kind, items in said.items():
        if items:
            yield "\n".join([f"\n### {kind}\n", *items])


def page() -> str:
    return "\n".join([HEAD, *(line for package in PACKAGES for line in section(package))])


def main() -> None:
    print(page())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
