"""Steering by weights: differences between two models, added to the weights while a context is open.

    theta' = theta + sum_k w_k (mask_k * (theta_a - theta_b))

Safety Arithmetic (arXiv 2406.11801, equation 1) subtracts the tenth of a harmful fine-tune's difference that is largest
in size: `WeightDelta.between(tuned, base).top(0.1)` at weight -lam. Soteria (2502.11244) subtracts the columns of the
output projection that chosen heads are read by: `.only(head_columns(lm, heads))`. Neither needs a copy of a model.

A model's weights are one for all threads: while a context is open, every pass of every thread has the new ones. So a
second thread that opens one is refused until the first has closed.
"""

import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import same_model
from steersman.lm.unwinding import Opened, Unwinding
from steersman.reading import parse_json
from steersman.steer.edits.heads import head_shape, z_hook
from steersman.steer.weights.linear import output_layer
from steersman.tensor_files import check_format, load_tensors, save_tensors

FORMAT, VERSION = "steersman.weight_delta", 1

Weights = LanguageModel | nn.Module | Mapping[str, Tensor]
"""A model, or its parameters by name."""
Masks = Mapping[str, Tensor]
"""Name of a parameter -> bool, of its shape or one that broadcasts to it. Parameters that are not named stay out."""


class Entries(NamedTuple):
    """The part of one parameter that a difference has."""

    indices: Tensor
    """[K] int64: places in the flattened parameter, rising."""
    values: Tensor
    """[K] fp32."""
    shape: tuple[int, ...]
    """Of the parameter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightDelta:
    """mask * (theta_a - theta_b), as the entries that are not zero, in fp32."""

    entries: Mapping[str, Entries]
    """Name of a parameter -> its part; parameters without one are left alone."""
    model_name: str = ""
    """The model that the difference is added to; empty for any of its shapes."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: whatever JSON can hold."""

    @classmethod
    def between(cls, a: Weights, b: Weights, *, only: Masks | None = None) -> "WeightDelta":
        """theta_a - theta_b, or the part of it that the masks `only` choose. Names and shapes must be the same."""
        first, second = _parameters(a), _parameters(b)
        if missing := sorted(set(first) ^ set(second)):
            raise SteersmanError(
                f"the two models do not have the same parameters: {', '.join(missing[:3])} is in one of them"
                + (f" (and {len(missing) - 3} more)" if len(missing) > 3 else "")
            )
        entries = {}
        for name, value in first.items():
            _check_shape(name, tuple(value.shape), tuple(second[name].shape), "one model", "the other")
            with torch.no_grad():
                difference = (value.to("cpu", torch.float32) - second[name].to("cpu", torch.float32)).flatten()
            if not bool(difference.isfinite().all()):
                raise SteersmanError(f"{name} holds NaN or infinite values")
            indices = difference.nonzero()[:, 0]
            entries[name] = Entries(indices, difference[indices], tuple(value.shape))
        names = [one.name if isinstance(one, LanguageModel) else "" for one in (a, b)]
        made = cls(entries=entries, model_name=names[1], metadata={"between": names})
        return made if only is None else made.only(only)

    def __len__(self) -> int:
        """How many numbers it holds."""
        return sum(len(part.indices) for part in self.entries.values())

    def __repr__(self) -> str:
        return f"WeightDelta({len(self):,} numbers in {len(self.entries)} parameters; {self.model_name or 'any model'})"

    def top(self, fraction: float) -> "WeightDelta":
        """The largest |tau| over all parameters: exactly round(fraction * N) of N numbers, zeros of the difference
        counted in N; equal ones in the order of the parameters and of their entries. (Fewer only where fewer are not
        zero.)"""
        if not 0 < fraction <= 1:
            raise SteersmanError(f"the fraction of a difference to keep must be above 0 and at most 1, got {fraction}")
        total = sum(torch.Size(part.shape).numel() for part in self.entries.values())
        return self.largest(round(fraction * total))

    def largest(self, k: int) -> "WeightDelta":
        """The k numbers of largest size, equal ones in order."""
        if k < 1:
            raise SteersmanError(f"of a difference at least one number must be kept, got {k}")
        threshold, ties = _kth([part.values for part in self.entries.values()], k)
        entries = {}
        for name, part in self.entries.items():
            size = part.values.abs()
            keep = size > threshold
            equal = (size == threshold).nonzero()[:ties, 0]
            keep[equal] = True
            ties -= len(equal)
            entries[name] = Entries(part.indices[keep], part.values[keep], part.shape)
        return replace(self, entries=entries, metadata={**self.metadata, "largest": k})

    def only(self, masks: Masks) -> "WeightDelta":
        """The part that masks choose. Raises SteersmanError for a parameter that is not there, or of another shape."""
        entries = {}
        for name, mask in masks.items():
            if name not in self.entries:
                raise SteersmanError(f"the difference has no parameter {name!r}")
            part = self.entries[name]
            try:
                chosen = mask.cpu().bool().expand(part.shape).reshape(-1)
            except RuntimeError as error:
                raise SteersmanError(
                    f"the mask of {name} is {list(mask.shape)}, the parameter {list(part.shape)}"
                ) from error
            keep = chosen[part.indices]
            entries[name] = Entries(part.indices[keep], part.values[keep], part.shape)
        return replace(self, entries=entries)

    def applied(self, lm: LanguageModel, weight: float = 1.0) -> "Reweighted":
        """The context in which the model's weights are theta + weight * difference: see `Reweighted`."""
        return Reweighted(lm, [(weight, self)])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the safetensors file `path`, whole or not at all."""
        tensors, shapes = {}, {}
        for name, part in self.entries.items():
            tensors |= {f"{name}/indices": part.indices, f"{name}/values": part.values}
            shapes[name] = list(part.shape)
        contents = {"shapes": shapes, "model_name": self.model_name, "metadata": dict(self.metadata)}
        header = {"format": FORMAT, "version": str(VERSION), "contents": json.dumps(contents)}
        save_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "WeightDelta":
        """Read the file `path`. Raises SteersmanError that names it where it holds no difference of weights."""
        path = Path(path)
        tensors, header = load_tensors(path)
        check_format(path, header, FORMAT, VERSION, "difference of weights")
        try:
            known = parse_json(header["contents"], f"{path}: the contents in its header")
            entries = {}
            for name, shape in known["shapes"].items():
                part = Entries(tensors[f"{name}/indices"].long(), tensors[f"{name}/values"].float(), tuple(shape))
                _check_entries(part)
                entries[name] = part
            return cls(entries=entries, model_name=str(known["model_name"]), metadata=dict(known["metadata"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SteersmanError(f"{path}: the difference in it cannot be read ({error!r})") from error


class Reweighted(Opened):
    """While open, the model's weights are theta + sum_k w_k tau_k, formed in fp32 and cast to the weights' dtype.

    The entries that change are kept as they were, and put back to the last bit when it closes, by an exception too.
    Contexts of one thread nest and close in the opposite order; closing one before those opened inside it is an error,
    and its entries are put back when they have closed. Raises SteersmanError for a difference of other shapes, of
    another model, and while another thread has one open on the model.

        with Reweighted(lm, [(-3.0, safety), (0.5, style)]):
            lm.generate("Once upon a time")
    """

    def __init__(self, lm: LanguageModel, deltas: Sequence[tuple[float, WeightDelta]]) -> None:
        super().__init__()
        self.lm = lm
        self.deltas = list(deltas)
        parameters = _parameters(lm)
        for _, delta in self.deltas:
            if not same_model(delta.model_name, lm.name):
                raise SteersmanError(
                    f"this difference of weights is for {delta.model_name!r}, the model is {lm.name!r}"
                )
            for name, part in delta.entries.items():
                if name not in parameters:
                    raise SteersmanError(f"{lm.name} has no parameter {name!r}, which the difference changes")
                _check_shape(name, part.shape, tuple(parameters[name].shape), "the difference", lm.name)

    def _open(self, stack: Unwinding) -> None:
        layers = _STACKS.setdefault(self.lm.model, _Stack())
        layer = _Layer()
        layers.enter(layer)
        stack.undo(layers.leave, layer)
        parameters = _parameters(self.lm)
        for name in dict.fromkeys(name for _, delta in self.deltas for name in delta.entries):
            parts = [(w, delta.entries[name]) for w, delta in self.deltas if name in delta.entries and w != 0]
            if parts:
                layer.add(parameters[name], parts)


class _Layer:
    """What one context has changed: (parameter, places, what was there)."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self.closed = False

    @torch.no_grad()
    def add(self, parameter: Tensor, parts: list[tuple[float, Entries]]) -> None:
        places = parts[0][1].indices if len(parts) == 1 else torch.cat([p.indices for _, p in parts]).unique()
        if not len(places):
            return
        wide = torch.zeros(len(places), dtype=torch.promote_types(parameter.dtype, torch.float32))
        for weight, part in parts:
            wide[torch.searchsorted(places, part.indices)] += weight * part.values.to(wide)
        flat, places = parameter.view(-1), places.to(parameter.device)
        before = flat[places]
        self.kept.append((parameter, places, before))
        flat[places] = (before.to(wide.dtype) + wide.to(before.device)).to(before.dtype)

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, places, before in reversed(self.kept):
            parameter.view(-1)[places] = before


class _Stack:
    """The contexts that are open on one model, the innermost last, all of one thread."""

    def __init__(self) -> None:
        self.layers: list[_Layer] = []
        self.thread = 0
        self.lock = threading.Lock()

    def enter(self, layer: _Layer) -> None:
        with self.lock:
            here = threading.get_ident()
            if self.layers and self.thread != here:
                raise SteersmanError(
                    "another thread has changed this model's weights, which all threads share: wait until its context "
                    "has closed, or load the model a second time"
                )
            self.thread = here
            self.layers.append(layer)

    def leave(self, layer: _Layer) -> None:
        with self.lock:
            if layer.closed:
                return
            layer.closed = True
            inside = layer in self.layers and self.layers[-1] is not layer
            while self.layers and self.layers[-1].closed:
                self.layers[-1].restore()
                self.layers.pop()
        if inside:
            raise SteersmanError(
                "a difference of weights was closed before another that was opened inside it: both are undone when "
                "that one closes"
            )


_STACKS: "weakref.WeakKeyDictionary[nn.Module, _Stack]" = weakref.WeakKeyDictionary()


def head_columns(lm: LanguageModel, heads: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Masks of the output projections' columns by which (layer, head)s are read: of head n those from n d on, d wide,
    with d the projection's width over the number of query heads."""
    masks: dict[str, Tensor] = {}
    for layer, head in heads:
        H, d = head_shape(lm, z_hook(layer))
        if not 0 <= head < H:
            raise SteersmanError(f"there is no head {head} in layer {layer}: {lm.name} has {H} (0 to {H - 1})")
        write = output_layer(lm, layer, "attn")
        name = f"{write.path}.weight"
        shape = (H * d, 1) if write.turned else (1, H * d)
        columns = masks.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        columns.view(-1)[head * d : (head + 1) * d] = True
    return masks


def _parameters(weights: Weights) -> dict[str, Tensor]:
    """Parameters by name, each once where it has several. Raises SteersmanError for what is quantised or elsewhere."""
    model = weights.model if isinstance(weights, LanguageModel) else weights
    found: dict[str, Tensor] = dict(model.named_parameters() if isinstance(model, nn.Module) else model.items())
    for name, value in found.items():
        if not value.is_floating_point() or value.device.type == "meta":
            raise SteersmanError(f"{name} is quantised or kept elsewhere: load the model whole, in floating point")
    return found


def _check_shape(name: str, a: tuple[int, ...], b: tuple[int, ...], one: str, other: str) -> None:
    if a != b:
        raise SteersmanError(f"{name} is {list(a)} in {one} and {list(b)} in {other}: they are not of one architecture")


def _check_entries(part: Entries) -> None:
    n = torch.Size(part.shape).numel()
    rising = len(part.indices) < 2 or bool((part.indices.diff() > 0).all())
    inside = len(part.indices) == 0 or (int(part.indices[0]) >= 0 and int(part.indices[-1]) < n)
    if part.indices.shape != part.values.shape or part.indices.ndim != 1 or not (rising and inside):
        raise ValueError("places that are not in a parameter's order")
    if not bool(part.values.isfinite().all()):
        raise ValueError("values that are not finite")


def _kth(values: Sequence[Tensor], k: int) -> tuple[float, int]:
    """The k-th largest size among all values, and how many of that very size belong to the k largest.

    Two passes over the upper and the lower half of the bits, which order sizes as numbers do: nothing is joined.
    """
    if k >= sum(len(part) for part in values):
        return -1.0, 0
    prefix, left = 0, k
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for part in values:
            bits = part.abs().view(torch.int32)
            if shift == 0:
                bits = bits[bits >> 16 == prefix]
            counts += ((bits >> shift) & 0xFFFF).bincount(minlength=1 << 16)
        above = counts.flip(0).cumsum(0)  # how many are in this bin or a higher one
        at = int((above >= left).nonzero()[0, 0])
        left -= int(above[at - 1]) if at else 0
        prefix = prefix << 16 | (1 << 16) - 1 - at
    return float(torch.tensor([prefix], dtype=torch.int32).view(torch.float32)), left
