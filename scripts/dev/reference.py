"""An extension of griffe, for the API reference: what a package's own names are, and examples in docstrings as blocks.

A function that its package has from a module of the same name (`steersman.steer.decompose`) is the package's name, not
the module. Examples (`>>> ...`) are fenced, as Markdown would read them as quotations of quotations.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 .*)*", flags=re.MULTILINE)


class Reference(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        hidden = []
        for module in modules(pkg):
            for name in map(str, module.exports or ()):
                member = module.members.get(name)
                if isinstance(member, griffe.Alias):
                    member.resolve_target()  # now, as the way there may lead through what is replaced below
                elif isinstance(member, griffe.Module) and name in module.imports:
                    hidden.append((module, name, pkg.modules_collection[module.imports[name]]))
        for module, name, target in hidden:
            module.set_member(name, griffe.Alias(name, target, parent=module))


def modules(module: griffe.Module) -> Iterator[griffe.Module]:
    """A module and those below it."""
    yield module
    for member in module.members.values():
        if isinstance(member, griffe.Module):
            yield from modules(member)


def fenced(example: re.Match[str]) -> str:
    indent = example[1]
    return f"\n{indent}```pycon\n{example[0]}\n{indent}```"
