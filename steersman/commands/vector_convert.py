"""`steersman vector convert`."""

import dataclasses
from dataclasses import dataclass

from steersman.commands.options import PrintOptions
from steersman.commands.vector_show import record
from steersman.errors import SteersmanError
from steersman.steer import SteeringVector


@dataclass(frozen=True, kw_only=True)
class VectorConvertCommand(PrintOptions):
    """Convert a vector between safetensors and a GGUF control vector (llama.cpp, repeng), by the files' endings.

    llama.cpp takes one as --control-vector-scaled FILE:SCALE, and steers the beginning-of-sequence token too.
    """

    vector: str
    """File to read."""
    out: str
    """File to write: .safetensors or .gguf."""
    model_type: str | None = None
    """For GGUF: the model's type, such as llama or gemma2, where the vector does not record it."""
    layers: str | None = None
    """Keep only the directions of these blocks, first and last, such as 13:22 (repeng's files hold one for every block,
    also for those it was not trained on)."""


def _range(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise SteersmanError(f"--layers {text!r} should be the first and the last block, such as 13:22")
    return int(parts[0]), int(parts[1])


def run(config: VectorConvertCommand) -> None:
    """`steersman vector convert`."""
    v = SteeringVector.load(config.vector)
    if config.layers is not None:
        first, last = _range(config.layers)
        v = v.layers(first, last + 1)
    if config.model_type is not None:
        v = dataclasses.replace(v, metadata={**v.metadata, "model_type": config.model_type})
    v.save(config.out)
    config.show(lambda: f"{v!r}\nwritten to {config.out}", {**record(v), "path": config.out})
