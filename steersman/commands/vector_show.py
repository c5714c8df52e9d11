"""`steersman vector show`."""

import json
from dataclasses import dataclass

import torch

from steersman.commands.options import load_model
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import Steerer, SteeringVector
from steersman.steer.methods.diagnostics import warnings


def describe(v: SteeringVector) -> str:
    """What is known of a vector, for a terminal."""
    lines = [repr(v)]
    for hook, direction in v.directions.items():
        lines.append(f"  {hook}: |v| {float(direction.norm()):.4g}, largest entry {float(direction.abs().max()):.4g}")
        figures = v.metadata.get("diagnostics", {}).get(hook)
        if figures:
            named = [f"{k} {x:.3f}" for k, x in figures.items() if isinstance(x, float)]
            lines.append("    " + ", ".join(named) + ("" if figures.get("heldout") else " (in sample)"))
            lines += [f"    warning: {text}" for text in warnings(figures)]
    calibration = v.metadata.get("calibration")
    if calibration:
        state = "converged" if calibration["converged"] else f"not converged ({calibration['reason']})"
        lines.append(f"  calibrated: {calibration['budget']} {calibration['value']:.4g}, {state}")
    rest = {k: x for k, x in v.metadata.items() if k not in ("diagnostics", "calibration", "settings")}
    lines += [f"  {k}: {x if isinstance(x, str) else json.dumps(x)}" for k, x in rest.items()]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class VectorShowCommand:
    """Show vectors: shape, norm, where they come from, the cosines between several, and the tokens they promote."""

    vector: tuple[str, ...]
    """Vector file; several are compared."""
    model: str | None = None
    """Folder or hub id of the model, to show the tokens that each vector promotes (logit lens)."""
    top: int = 10
    """Tokens to show."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""
    dtype: str | None = None
    """Dtype of the model."""


def run(config: VectorShowCommand) -> None:
    """`steersman vector show`."""
    if not config.vector:
        raise SteersmanError("no vector to show: give --vector FILE")
    vectors = [SteeringVector.load(path) for path in config.vector]
    lm = None if config.model is None else load_model(config)
    for path, v in zip(config.vector, vectors):
        print(f"{path}: {describe(v)}")
        if lm is not None:
            Steerer(lm).vector(v)  # refuses one of another model
            for hook, direction in v.directions.items():
                raised, lowered = _promoted(lm, direction if direction.ndim == 1 else direction.mean(0), config.top)
                print(f"  {hook} promotes {raised}\n  {hook} suppresses {lowered}")
    if len(vectors) > 1:
        print("cosines:")
        for a, name in zip(vectors, config.vector):
            row = " ".join(f"{a.cosine(b):>7.3f}" if a.norm() and b.norm() else "      -" for b in vectors)
            print(f"  {row}  {name}")


@torch.no_grad()
def _promoted(lm: LanguageModel, direction: torch.Tensor, top: int) -> tuple[str, str]:
    """The tokens whose logits the direction raises and lowers most, past the final norm's gain."""
    W_U, norm = lm.unembed()
    gain = getattr(norm, "weight", torch.ones((), device=W_U.device))
    logits = (direction.to(W_U.device) * gain.float()) @ W_U.float()
    sides = (logits.topk(min(top, len(logits))).indices, (-logits).topk(min(top, len(logits))).indices)
    raised, lowered = (" ".join(repr(lm.tokenizer.decode([i])) for i in ids.tolist()) for ids in sides)
    return raised, lowered
