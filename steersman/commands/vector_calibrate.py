"""`steersman vector calibrate`."""

from dataclasses import dataclass

from steersman.commands.options import ComputeOptions, on_kernels
from steersman.config import part_of
from steersman.steer import CalibrateConfig, SteeringVector
from steersman.steer.calibrate import calibrate, refuse_unmet
from steersman.text import read_texts


@dataclass(frozen=True, kw_only=True)
class VectorCalibrateCommand(CalibrateConfig, ComputeOptions):
    """Scale a vector so that steering with it costs a budget: --target-kl, --target-loss or --target-norm."""

    vector: str
    """Vector file."""
    model: str
    """Folder or hub id of the model."""
    out: str
    """File to write the scaled vector to."""
    text: str | None = None
    """File of held-out texts, one per line (or .jsonl with text); without it the model writes its own."""
    texts: int = 64
    """Texts to use, at most."""


@on_kernels
def run(config: VectorCalibrateCommand) -> None:
    """`steersman vector calibrate`."""
    v = SteeringVector.load(config.vector)
    texts = None if config.text is None else read_texts(config.text, config.texts)
    found = calibrate(v, config.load_model(config.model), texts=texts, config=part_of(CalibrateConfig, config))
    refuse_unmet(found).save(config.out)
    for scale, value in found.search.evaluations:
        print(f"  scale {scale:.4g}: {found.budget} {value:.4g}")
    print(f"{found}\nwritten to {config.out}")
