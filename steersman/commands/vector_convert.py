"""`steersman vector convert`."""

import dataclasses
from dataclasses import dataclass

from steersman.steer import (
    SteeringVector,
)


@dataclass(frozen=True, kw_only=True)
class VectorConvertCommand:
    """Convert a vector between safetensors and a GGUF control vector (llama.cpp, repeng), by the files' endings."""

    vector: str
    """File to read."""
    out: str
    """File to write: .safetensors or .gguf."""
    model_type: str | None = None
    """For GGUF: the model's type, such as llama or gemma2, where the vector does not record it."""


def run(config: VectorConvertCommand) -> None:
    """`steersman vector convert`."""
    v = SteeringVector.load(config.vector)
    if config.model_type is not None:
        v = dataclasses.replace(v, metadata={**v.metadata, "model_type": config.model_type})
    v.save(config.out)
    print(f"{v!r}\nwritten to {config.out}")
