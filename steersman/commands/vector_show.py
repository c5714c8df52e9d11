"""`steersman vector show`."""

import json
from dataclasses import dataclass

import torch

from steersman.commands.options import ComputeOptions, on_kernels
from steersman.errors import SteersmanError
from steersman.lm.lens import logit_lens
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
class VectorShowCommand(ComputeOptions):
    """Show vectors: shape, norm, where they come from, the cosines between several, and the tokens they promote."""

    vector: tuple[str, ...]
    """Vector file; several are compared."""
    model: str | None = None
    """Folder or hub id of the model, to show the tokens that each vector promotes (logit lens)."""
    top: int = 10
    """Tokens to show."""


@on_kernels
def run(config: VectorShowCommand) -> None:
    """`steersman vector show`."""
    if not config.vector:
        raise SteersmanError("no vector to show: give --vector FILE")
    vectors = [SteeringVector.load(path) for path in config.vector]
    lm = None if config.model is None else config.load_model(config.model)
    if lm is not None:
        lm.unembed()  # refuses a model without an output layer
    for path, v in zip(config.vector, vectors):
        print(f"{path}: {describe(v)}")
        if lm is not None:
            Steerer(lm).vector(v)  # refuses one of another model
            means = torch.stack([d if d.ndim == 1 else d.mean(0) for d in v.directions.values()])
            for hook, sides in zip(v.directions, logit_lens(lm, means, config.top)):
                raised, lowered = (" ".join(map(repr, tokens)) for tokens in sides)
                print(f"  {hook} promotes {raised}\n  {hook} suppresses {lowered}")
    if len(vectors) > 1:
        print("cosines:")
        for a, name in zip(vectors, config.vector):
            row = " ".join(f"{a.cosine(b):>7.3f}" if a.norm() and b.norm() else "      -" for b in vectors)
            print(f"  {row}  {name}")
