"""`steersman convert`."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from steersman.commands.options import PrintOptions
from steersman.sae.formats import convert
from steersman.train.run.checkpoints import checkpoint_to_sae, is_unfinished_run


@dataclass(frozen=True, kw_only=True)
class ConvertCommand(PrintOptions):
    """Write an SAE of any format in one that another library opens; of a run that is not finished, its newest
    checkpoint."""

    source: Positional[str]
    """Folder or file, or repo-id[/subfolder][@revision] on the hub; or a run folder, or one of its checkpoints."""
    target: Positional[str]
    """New folder."""
    to: Literal["saelens", "sparsify", "dictionary_learning"]
    """Format to write. One that cannot express what the SAE computes is refused."""
    format: str | None = None
    """Read the source as this format, whatever the files look like."""


def run(config: ConvertCommand) -> None:
    """`steersman convert`."""
    source = checkpoint_to_sae(config.source) if is_unfinished_run(config.source) else config.source
    sae = convert(source, config.target, to=config.to, format=config.format)
    record = {"path": config.target, "format": config.to, "architecture": sae.cfg.architecture, "d_sae": sae.cfg.d_sae}
    config.show(lambda: f"{config.target}: {sae.cfg.architecture} of {sae.cfg.d_sae:,} features as {config.to}", record)
