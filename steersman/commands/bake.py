"""`steersman bake`."""

from collections.abc import Mapping
from dataclasses import dataclass

from steersman.commands.options import ComputeOptions, PrintOptions, on_kernels
from steersman.errors import SteersmanError
from steersman.steer import Edit, SteeringVector, ablate, bake
from steersman.steer.edits.file import EditSet


@dataclass(frozen=True, kw_only=True)
class BakeCommand(ComputeOptions, PrintOptions):
    """Write an edit into a copy of the model's weights, which then is steered wherever it is opened: a vector
    (--vector), its direction taken out (--vector, --ablate), or edits from a file (--edits)."""

    model: str
    """Folder or hub id of the model."""
    out: str
    """Folder to write the new model to; must not exist, or be empty."""
    vector: str | None = None
    """Vector file."""
    scale: float = 1.0
    """Times the vector."""
    ablate: bool = False
    """Take the vector's direction out of everything that writes to the residual stream, and add nothing."""
    edits: str | None = None
    """File of edits, with a scope of all."""
    include_bos: bool = False
    """Weights act on the beginning-of-sequence token too: say that this is meant. A file of edits says so itself."""


@on_kernels
def run(config: BakeCommand) -> None:
    """`steersman bake`."""
    if (config.vector is None) == (config.edits is None):
        raise SteersmanError("give either --vector or --edits: what is to be written into the weights")
    if config.vector is None and (config.ablate or config.scale != 1):
        raise SteersmanError("--ablate and --scale are for a --vector")
    if config.ablate and config.scale != 1:
        raise SteersmanError("--ablate takes a direction out whole: leave out --scale")
    v = None if config.vector is None else SteeringVector.load(config.vector)
    edits = None if config.edits is None else EditSet.load(config.edits)
    lm = config.load_model(config.model)
    what: Mapping[str, Edit] | SteeringVector
    if v is None:
        assert edits is not None
        what = edits
    else:
        what = ablate(lm, v) if config.ablate else v * config.scale
    baked = bake(lm, what, config.out, include_bos=config.include_bos)
    config.show(lambda: str(baked), baked)
