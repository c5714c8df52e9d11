"""`steersman methods`."""

import textwrap
from dataclasses import asdict, dataclass

from steersman.commands.options import PrintOptions
from steersman.errors import SteersmanError, near_names
from steersman.steer.presets import PRESETS
from steersman.steer.presets.listing import Listed, listing

KINDS = {
    "vector": "vectors from examples (steersman vector make --method NAME)",
    "edit": "trained edits (steersman vector make --method NAME)",
    "affine": "affine maps between two classes of texts",
    "score": "scores of an SAE's features (steersman scores --score NAME)",
    "decomposition": "ways to take a vector apart (steersman decompose --method NAME)",
    "preset": "published systems: preset(NAME).build(lm, ...)",
}


@dataclass(frozen=True, kw_only=True)
class MethodsCommand(PrintOptions):
    """List what vectors are made by, features scored by, vectors taken apart by, and the published systems that are
    presets, each with its source, what it needs and how surely it was checked."""

    kind: str | None = None
    """Only one kind: vector, edit, affine, score, decomposition or preset."""
    name: tuple[str, ...] = ()
    """Show all that is known of these presets: the authors' values, and the traps that are avoided."""


def run(config: MethodsCommand) -> None:
    """`steersman methods`."""
    if config.kind is not None and config.kind not in KINDS:
        raise SteersmanError(f"no kind {config.kind!r}; near it: {near_names(config.kind, list(KINDS), 1)}")
    if config.name:
        records = [PRESETS[name].record() for name in config.name]
        config.show(lambda: "\n\n".join(map(_whole, config.name)), records)
        return
    found = [entry for entry in listing() if config.kind in (None, entry.kind)]
    config.show(lambda: _table(found), [asdict(entry) for entry in found])


def _table(found: list[Listed]) -> str:
    lines: list[str] = []
    for kind, what in KINDS.items():
        entries = [entry for entry in found if entry.kind == kind]
        if not entries:
            continue
        lines += ["", what]
        width = max(len(entry.name) for entry in entries)
        for entry in entries:
            lines.append(f"  {entry.name:<{width}}  {entry.what} [{entry.source}]")
            rest = f"needs {entry.needs}; {entry.certainty}"
            rest += f"; not covered: {entry.not_covered}" if entry.not_covered else ""
            lines += textwrap.wrap(rest, 110, initial_indent=" " * (width + 4), subsequent_indent=" " * (width + 4))
    return "\n".join(lines).strip()


def _whole(name: str) -> str:
    one = PRESETS[name]
    lines = [f"{name}: {one.title}", f"  {one.source}; {one.certainty}", f"  {one.mechanism}"]
    for argument, need in one.needs.items():
        lines.append(f"  needs {argument}: {need.what}; {need.how}")
    lines += [f"  authors' {what}: {value}" for what, value in one.values.items()]
    lines += [f"  avoided: {trap}" for trap in one.traps]
    lines += [f"  not covered: {one.not_covered}"] if one.not_covered else []
    lines.append(f"  makes {one.makes}" if one.available else "  cannot be built")
    return "\n".join(lines)
