"""What may be given as a steering vector, and the one parser of it."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.lm.origin import check_fits
from steersman.steer.vectors.vector import SteeringVector, VectorLike

log = logging.getLogger(__name__)

_SHARED = {
    "mistral": "llama", "mixtral": "llama", "ministral": "llama", "phi": "phi2", "phimoe": "phi3", "cohere": "commandr",
    "gptbigcode": "starcoder", "mistral3": "llama",
}  # fmt: skip
"""What llama.cpp calls types by another name than transformers."""

Direction = Tensor | Sequence[float] | Sequence[Sequence[float]]
"""[D], or [B, D] with a vector for each row."""
VectorInput = SteeringVector | Sequence[SteeringVector] | VectorLike | Direction | Mapping[HookName, Direction]
"""A `SteeringVector` (or a list of them, one per row), an object with `hook_name` and `vector`, a tensor, which needs
`hook`, or a mapping {hook: tensor}."""


def directions_of(lm: LanguageModel, vector: VectorInput, hook: HookName | None = None) -> dict[str, Tensor]:
    """Hook point -> [D], [B, D] or, of a `SteeringVector` with positions, [P, D], on the model's device.

    Raises SteersmanError for what is no vector, for one whose hook point is not said, and for one of another model or
    hook point.
    """
    parts = _parts(lm, vector, hook)
    tensors = {name: torch.as_tensor(part).to(lm.device) for name, part in parts.items()}
    return {name: v if v.is_floating_point() else v.float() for name, v in tensors.items()}


def _parts(lm: LanguageModel, vector: Any, hook: HookName | None) -> Mapping[str, Any]:
    if isinstance(vector, SteeringVector):
        return _recorded(lm, vector.directions, vector, hook)
    if isinstance(vector, Mapping):
        if hook is not None:
            raise SteersmanError("a mapping of vectors names its own hook points: leave out hook=")
        return {lm.resolve_hook(name): v for name, v in vector.items()}
    if isinstance(vector, list | tuple) and vector and isinstance(vector[0], SteeringVector):
        return _one_per_row(lm, vector, hook)
    if isinstance(vector, Tensor | list | tuple):
        if hook is None:
            raise SteersmanError("name the hook point of the vector with hook=, such as 'blocks.2.hook_resid_post'")
        return {lm.resolve_hook(hook): vector}
    if isinstance(vector, VectorLike):
        return _recorded(lm, {vector.hook_name: vector.vector}, vector, hook)
    raise SteersmanError(f"a vector is a tensor, a mapping of them, or has .hook_name and .vector; got {vector!r}")


def _recorded(lm: LanguageModel, parts: Mapping[str, Tensor], owner: Any, hook: HookName | None) -> dict[str, Tensor]:
    """The parts of a vector that records where it was made, after checking that it fits this model."""
    model_name = getattr(owner, "model_name", "") or ""
    placed = {
        check_fits(lm, what="this vector", model_name=model_name, hook_name=name, width=None, hook=hook): v
        for name, v in parts.items()
    }
    kind, own = getattr(owner, "metadata", {}).get("model_type"), getattr(lm.config, "model_type", "")
    if kind and own and not same_type(str(kind), own):
        log.warning("this vector says that it is for a model of type %r, %r is %r", kind, lm.name, own)
    return placed


def same_type(a: str, b: str) -> bool:
    """Whether two names of a model's type mean one: as transformers writes it, or as llama.cpp does in GGUF files,
    where several types that are computed alike share a name.

    >>> same_type("llama", "mistral"), same_type("gemma3", "gemma3_text"), same_type("llama", "gpt2")
    (True, True, False)
    """
    return _plain_type(a) == _plain_type(b)


def _plain_type(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", name.lower().removesuffix("_text"))
    return _SHARED.get(plain, plain)


def _one_per_row(lm: LanguageModel, vectors: Sequence[Any], hook: HookName | None) -> dict[str, Tensor]:
    """Several vectors, one per row of the batch: [B, D] at each hook point."""
    for i, v in enumerate(vectors):
        if not isinstance(v, SteeringVector) or v.positions is not None:
            raise SteersmanError(
                f"row {i} of a list of vectors must be a SteeringVector with one direction for all positions"
            )
    rows = [_recorded(lm, v.directions, v, hook) for v in vectors]
    names = list(dict.fromkeys(name for parts in rows for name in parts))
    for name in names:
        widths = sorted({len(parts[name]) for parts in rows if name in parts})
        if len(widths) > 1:
            raise SteersmanError(f"vectors of different widths at {name}: {' and '.join(map(str, widths))}")
    width = {name: len(next(parts[name] for parts in rows if name in parts)) for name in names}
    return {n: torch.stack([parts.get(n, torch.zeros(width[n])) for parts in rows]) for n in names}
