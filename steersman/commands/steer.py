"""`steersman steer`."""

from dataclasses import dataclass

from steersman.commands.options import ComputeOptions, on_kernels
from steersman.config import part_of
from steersman.steer import SteerConfig, steer_and_compare


@dataclass(frozen=True, kw_only=True)
class SteerCommand(SteerConfig, ComputeOptions):
    """Continue prompts with an SAE's features edited and without, side by side, with what the edit cost."""

    model: str
    """Folder or hub id of the model."""
    sae: str
    """Folder, file or hub id of the SAE."""


@on_kernels
def run(config: SteerCommand) -> None:
    """`steersman steer`."""
    sae, lm = config.load_sae(config.sae), config.load_model(config.model)
    print(steer_and_compare(lm, sae, part_of(SteerConfig, config)).to_text())
