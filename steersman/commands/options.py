"""What several commands share: loading what their flags name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from steersman.config import setting
from steersman.device import pick_device
from steersman.errors import SteersmanError
from steersman.kernels import Implementation, using
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer.methods import Examples, as_examples, read_examples
from steersman.text import read_texts


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and how a command computes: the same flags, with the same meaning, of each that loads a model or an SAE."""

    device: str = setting("auto", identity=False)
    """Where to run: auto (the accelerator there is; under torchrun each process its own), cpu, cuda, cuda:1, ..."""
    dtype: str | None = None
    """Dtype of the model: float32, bfloat16, ...; by default float32 on the CPU and the checkpoint's own elsewhere."""
    revision: str | None = None
    """Revision of the model on the hub."""
    kernels: Implementation = setting("auto", identity=False)
    """Implementation of the SAE's arithmetic: triton (NVIDIA GPUs), torch, or auto, the faster that the device has."""

    def load_model(self, name: str) -> LanguageModel:
        """The language model `name`, a folder or hub id."""
        return LanguageModel.load(name, device=self.device, dtype=self.dtype, revision=self.revision)

    def load_sae(self, name: str) -> SAE:
        """The SAE `name`, a folder, file or hub id."""
        return SAE.load(name, pick_device(self.device))


def on_kernels(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """A command that computes with the implementation that its `kernels` asks for, or fails at once."""

    @wraps(run)
    def run_with(config: Any) -> None:
        with using(config.kernels, pick_device(config.device)):
            run(config)

    return run_with


def examples_of(data: str | None, positive: str | None, negative: str | None) -> Examples | None:
    if data is not None:
        if positive or negative:
            raise SteersmanError("give either --data, or --positive and --negative, not both")
        return read_examples(data)
    if positive is None and negative is None:
        return None
    if positive is None:
        raise SteersmanError("--negative needs --positive")
    sides = [as_examples(read_texts(path), side) if path else [] for path, side in
             ((positive, "positive"), (negative, "negative"))]  # fmt: skip
    return Examples(positive=sides[0], negative=sides[1])


def heldout_line(sae: SAE) -> str:
    """What a trained SAE measured on the rows held out of its training."""
    heldout = sae.cfg.metadata["heldout"]
    return f"FVU {heldout['fvu']:.4f}, L0 {heldout['l0']:.1f}, dead {100 * heldout['dead_share']:.2f} %"
