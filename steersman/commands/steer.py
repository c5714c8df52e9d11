"""`steersman steer`."""

from dataclasses import dataclass

from steersman.commands.options import on_kernels
from steersman.device import pick_device
from steersman.kernels import Implementation
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer import SteerConfig, steer_and_compare


@dataclass(frozen=True, kw_only=True)
class SteerCommand(SteerConfig):
    """Continue prompts with an SAE's features edited and without, side by side, with what the edit cost."""

    model: str
    """Model folder or hub id."""
    sae: str
    """SAE folder or file."""
    device: str = "auto"
    """Device of the model and the SAE."""
    kernels: Implementation = "auto"
    """Implementation of the SAE's arithmetic: triton (NVIDIA GPUs), torch, or auto, the faster that the device has."""
    dtype: str | None = None
    """Dtype of the model: float32, bfloat16, ...; by default float32 on the CPU and the checkpoint's own elsewhere."""


@on_kernels
def run(config: SteerCommand) -> None:
    """`steersman steer`."""
    device = pick_device(config.device)
    sae = SAE.load(config.sae, device)
    lm = LanguageModel.load(config.model, device=device, dtype=config.dtype)
    print(steer_and_compare(lm, sae, config).to_text())
