"""`steersman inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from steersman.commands.looks import Record, kind_of, look, look_at_model
from steersman.commands.options import PrintOptions
from steersman.config import setting
from steersman.errors import SteersmanError
from steersman.visible import visible


@dataclass(frozen=True, kw_only=True)
class InspectCommand(PrintOptions):
    """See what something holds: a model, a store of activations, a run, an SAE of any format, a steering vector (also
    GGUF), edits, measured effects or an effect map."""

    path: Positional[str]
    """Folder or file; of an SAE also repo-id[/subfolder][@revision] on the hub, of a model its hub id."""
    kind: Literal["model", "store", "run", "SAE", "vector", "edits", "effects", "effect map"] | None = None
    """What it is; found by its files if not given."""
    format: str | None = None
    """Read an SAE as this format, whatever the files look like."""
    verify: bool = setting(False, identity=False)
    """Read everything, and compare it with its checksums."""


def run(config: InspectCommand) -> None:
    """`steersman inspect`."""
    kind = config.kind or kind_of(config.path)
    try:
        found = look(config.path, kind, format=config.format, verify=config.verify)
    except SteersmanError:
        if config.kind is not None or kind != "SAE" or Path(config.path).expanduser().exists():
            raise
        found = _model_of_the_hub(config.path)
        if found is None:
            raise
    config.show(lambda: to_text(found), {name: value for name, value in found.items() if name != "text"})


def _model_of_the_hub(path: str) -> Record | None:
    try:
        return {"kind": "model", "path": path, **look_at_model(path)}
    except SteersmanError:
        return None


def to_text(record: Record) -> str:
    """A line for each thing, aligned; what is nested is indented."""
    if "text" in record and record["kind"] == "SAE":
        return record["text"] + ("\nverified: True" if record.get("verified") else "")
    return "\n".join(_lines(record, ""))


def _lines(record: Record, indent: str) -> list[str]:
    width = max((len(str(name)) for name, value in record.items() if not _nested(value)), default=0)
    lines = []
    for name, value in record.items():
        if name == "SAE" and isinstance(value, dict) and "text" in value:
            lines += ["SAE", *(f"  {line}" for line in value["text"].splitlines())]
        elif _nested(value):
            entries: Any = value if isinstance(value, dict) else dict.fromkeys(value)
            lines += [f"{indent}{name}", *_lines(entries, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<{width}}  {_shown(value)}".rstrip())
    return lines


def _nested(value: Any) -> bool:
    return bool(value) and (isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], str)))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return visible(str(value))
