"""`steersman vector show`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steersman.commands.options import ComputeOptions, PrintOptions, as_json, on_kernels
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.lens import logit_lens
from steersman.steer import EditSet, Steerer, SteeringVector
from steersman.steer.methods.diagnostics import warnings
from steersman.visible import visible


def describe(v: SteeringVector) -> str:
    """What is known of a vector, for a terminal. Its metadata may be another program's."""
    lines, diagnostics = [repr(v)], _section(v.metadata, "diagnostics")
    for hook, direction in v.directions.items():
        lines.append(f"  {hook}: |v| {float(direction.norm()):.4g}, largest entry {float(direction.abs().max()):.4g}")
        if figures := _section(diagnostics, hook):
            named = [f"{k} {x:.3f}" for k, x in figures.items() if isinstance(x, float)]
            lines.append("    " + ", ".join(named) + ("" if figures.get("heldout") else " (in sample)"))
            lines += [f"    warning: {text}" for text in warnings(dict(figures))]
    if calibration := _section(v.metadata, "calibration"):
        state = "converged" if calibration.get("converged") else f"not converged ({calibration.get('reason')})"
        value = calibration.get("value")
        shown = f"{value:.4g}" if isinstance(value, int | float) else str(value)
        lines.append(f"  calibrated: {calibration.get('budget')} {shown}, {state}")
    rest = {k: x for k, x in v.metadata.items() if k not in ("diagnostics", "calibration", "settings")}
    lines += [f"  {k}: {x if isinstance(x, str) else json.dumps(x)}" for k, x in rest.items()]
    return "\n".join(map(visible, lines))


def _section(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = fields.get(name)
    return found if isinstance(found, Mapping) else {}


def record(v: SteeringVector) -> dict[str, Any]:
    """The same for a program."""
    directions = {
        hook: {"shape": list(direction.shape), "norm": float(direction.norm()), "largest": float(direction.abs().max())}
        for hook, direction in v.directions.items()
    }
    return {"model": v.model_name, "method": v.method, "directions": directions, "metadata": dict(v.metadata)}


def edits_record(edits: EditSet) -> dict[str, Any]:
    """What is known of the edits in a file, for a program."""
    kinds = {hook: edit.name for hook, edit in edits.items()}
    about = {"scope": edits.scope, "include_bos": edits.include_bos, "metadata": dict(edits.metadata)}
    return {"model": edits.model_name, "method": edits.method, "edits": kinds, **about}


@dataclass(frozen=True, kw_only=True)
class VectorShowCommand(ComputeOptions, PrintOptions):
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
    lenses = [{} if lm is None else _lens(lm, v, config.top) for v in vectors]
    cosines = [[a.cosine(b) if a.norm() and b.norm() else None for b in vectors] for a in vectors]
    if config.json:
        shown = [{"file": f, **record(v), "lens": lens} for f, v, lens in zip(config.vector, vectors, lenses)]
        print(as_json({"vectors": shown, "cosines": cosines}))
        return
    for path, v, lens in zip(config.vector, vectors, lenses):
        config.note(f"{path}: {describe(v)}")
        for hook, sides in lens.items():
            for what, tokens in sides.items():
                print(f"  {hook} {what} {' '.join(map(repr, tokens))}")
    if len(vectors) > 1:
        print("cosines:")
        for row, name in zip(cosines, config.vector):
            print("  " + " ".join("      -" if x is None else f"{x:>7.3f}" for x in row) + f"  {name}")


def _lens(lm: LanguageModel, v: SteeringVector, top: int) -> dict[str, dict[str, list[str]]]:
    """Hook point -> the tokens that the vector promotes and suppresses."""
    Steerer(lm).vector(v)  # refuses one of another model
    means = torch.stack([d if d.ndim == 1 else d.mean(0) for d in v.directions.values()])
    sides = zip(v.directions, logit_lens(lm, means, top))
    return {hook: {"promotes": list(raised), "suppresses": list(lowered)} for hook, (raised, lowered) in sides}
