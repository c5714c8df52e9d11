"""`steersman steer`."""

from steersman.commands.options import on_kernels
from steersman.device import pick_device
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer import SteerConfig, steer_and_compare


@on_kernels
def run(config: SteerConfig) -> None:
    """`steersman steer`."""
    device = pick_device(config.device)
    sae = SAE.load(config.sae, device)
    lm = LanguageModel.load(config.model, device=device, dtype=config.dtype)
    print(steer_and_compare(lm, sae, config).to_text())
