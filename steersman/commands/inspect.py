"""`steersman inspect`."""

from dataclasses import dataclass

from tyro.conf import Positional

from steersman.sae.formats.inspection import inspect


@dataclass(frozen=True, kw_only=True)
class InspectCommand:
    """See what an SAE's files hold: format, architecture, widths, hook point, model, size, norms, warnings."""

    path: Positional[str]
    """Folder or file, or repo-id[/subfolder][@revision] on the hub."""
    format: str | None = None
    """Read it as this format, whatever the files look like."""


def run(config: InspectCommand) -> None:
    """`steersman inspect`."""
    print(inspect(config.path, config.format).to_text())
