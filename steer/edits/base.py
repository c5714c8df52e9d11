"""What an edit is: something that changes what is at a hook point, at the tokens in scope.

`steersman.steer.steering` opens edits in contexts, which give any `Edit` its scope, rows, trace and calibration.

Shape letters: B rows of the batch, S tokens of the pass, D width; R rows of parameters (1 for all, or one per prompt).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from steersman.doors import number
from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.registry import Registry

PerRow = float | Sequence[float] | Tensor
"""A number for all rows, or one for each."""


HookReader = Callable[[Tensor, ForwardPass], None]
"""Looks at what a hook point holds in a pass, and changes nothing."""


class Saved(NamedTuple):
    """What a part of steering is made from, as files hold it."""

    settings: dict[str, Any]
    """Values that JSON can hold."""
    tensors: dict[str, Tensor]
    """By name."""


EDITS: Registry[type["Edit"]] = Registry("edit")
"""Every edit that files and recipes know, by name."""


class Map(NamedTuple):
    """h' = A h + c, for every state. All float64, on the CPU."""

    matrix: Tensor | None
    """A [D, D]; None for the identity."""
    offset: Tensor
    """c [D]."""

    def scaled(self, factor: float) -> "Map":
        """h + factor (h' - h)."""
        if self.matrix is None:
            return Map(None, factor * self.offset)
        identity = torch.eye(len(self.matrix), dtype=self.matrix.dtype)
        return Map(identity + factor * (self.matrix - identity), factor * self.offset)


class Part:
    """What edits, gates and readings share: one that says its `name`, and how it is `saved` and `restored`, can be kept
    in files."""

    name: ClassVar[str] = ""
    """What files call it."""
    rows: int = 1
    """R, the rows of its parameters."""

    def saved(self) -> Saved:
        """What `restored` makes it from. Raises SteersmanError for one that lives in this process only."""
        raise SteersmanError(f"{type(self).__name__} says no way to keep it in a file")

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        """The one that was `saved`."""
        raise SteersmanError(f"{cls.__name__} says no way to make it from a file")


class ActingPart(Part):
    """What edits and gates share: they may look at hook points in a pass, and forget between texts."""

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        """Raise a SteersmanError where it makes no sense at the hook point that is edited, before anything is run."""

    def readers(self, lm: LanguageModel, point: HookPoint) -> Mapping[str, HookReader]:
        """Hook points that it looks at, beside the one that is edited, while it is open at `point`. Where it reads and
        edits the same hook point, it reads what is there before any edit of its own context."""
        return {}

    def reset(self) -> None:
        """Forget what the passes before have shown: a context opens."""


class Edit(ActingPart):
    """Something that turns h into h': the hidden states [B, S, D] at a hook point, or its attention mask [B, H, S, K],
    or the logits [B, S, V]. A subclass needs `apply` alone; its parameters may differ per row. One that says its
    `name`, and how it is `saved` and `restored`, can be kept in files.

    >>> class Double(Edit):
    ...     def apply(self, h, fwd, where):
    ...         return blend(h, 2 * h, where)
    """

    active: Tensor = torch.ones(1, dtype=torch.bool)
    """[R] bool: which rows it can change at all."""

    def __init_subclass__(cls) -> None:
        EDITS.register(cls, cls)

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        """h', a new tensor, equal to h outside `where` ([B, S] bool, or True for every token)."""
        raise NotImplementedError  # each edit defines it

    def narrow(self, where: Tensor | bool, fwd: ForwardPass, h: Tensor) -> Tensor | bool:
        """Of the tokens in scope, those this edit can change, given what is at the hook point."""
        return where

    def scaled(self, factor: PerRow) -> "Edit":
        """The edit `factor` times as strong, a number or one per row: 0 changes nothing. For a search of the scale.

        Here h + factor (h' - h); an edit that has a strength of its own multiplies that.
        """
        return ScaledEdit(self, factor)

    def gated(self, gates: Sequence[Any]) -> "Edit | None":
        """The edit behind gates (`steersman.steer.edits.gates`), for one that has a strength of its own which they
        should multiply; None for h + g (h' - h)."""
        return None

    def as_map(self, width: int) -> Map | None:
        """What it does to states of a width, where that is one affine map of them all; None where it is not. Asked for
        by what writes edits into weights."""
        return None

    def expand(self, table: Tensor, fwd: ForwardPass) -> Tensor:
        """A table [R, ...] as [B, ...], or [1, ...] when one row serves all."""
        return expand(table, fwd)


class FunctionEdit(Edit):
    """h' = fn(h, fwd), a function of the whole tensor that must not write into it.

    >>> edit = FunctionEdit(lambda logits, fwd: logits / 0.7)
    """

    def __init__(self, fn: Callable[[Tensor, ForwardPass], Tensor]) -> None:
        self.fn = fn

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        return blend(h, self.fn(h, fwd), where)


class ScaledEdit(Edit):
    """h + factor (h' - h), with h' from another edit: between h (0) and h' (1), or beyond it."""

    name = "scaled"

    def __init__(self, edit: Edit, factor: PerRow) -> None:
        self.edit = edit
        self.factor = per_row(factor, "factor", edit.active.device)
        self.rows = common_rows(edit=edit.rows, factor=len(self.factor))
        self.active = edit.active & (self.factor != 0)

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        new = self.edit.apply(h, fwd, where)
        return towards(h, new, self.expand(self.factor.to(h.device), fwd)[:, None])

    def narrow(self, where: Tensor | bool, fwd: ForwardPass, h: Tensor) -> Tensor | bool:
        return self.edit.narrow(where, fwd, h)

    def readers(self, lm: LanguageModel, point: HookPoint) -> Mapping[str, HookReader]:
        return self.edit.readers(lm, point)

    def reset(self) -> None:
        self.edit.reset()

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        self.edit.check(lm, point)

    def saved(self) -> Saved:
        inner = packed({"edit": self.edit})
        return Saved(inner.settings, {**inner.tensors, "factor": self.factor})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls(unpacked(saved, "edit", EDITS), saved.tensors["factor"])

    def as_map(self, width: int) -> Map | None:
        inner = self.edit.as_map(width)
        return None if inner is None or self.rows > 1 else inner.scaled(float(self.factor))


def towards(h: Tensor, new: Tensor, factor: Tensor) -> Tensor:
    """h + factor (new - h), `factor` [B or 1, S or 1]: h to the last bit where it is 0, `new` where it is 1. What is
    not changed stays as it is, infinite logits among it. Of an attention mask the factor is its queries'."""
    factor = factor[:, None, :, None] if h.ndim == 4 else factor[..., None]
    between = (h + factor * (new - h)).to(h.dtype)
    return torch.where(factor == 0, h, torch.where((new == h) | (factor == 1), new, between))


def packed(parts: Mapping[str, Any]) -> Saved:
    """Edits or gates, each under a key, as one: {key: {"name": ..., "settings": ...}} and their tensors as key/name."""
    settings: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for key, part in parts.items():
        saved = part.saved()
        settings[key] = {"name": part.name, "settings": saved.settings}
        tensors |= {f"{key}/{name}": tensor for name, tensor in saved.tensors.items()}
    return Saved(settings, tensors)


def unpacked(saved: Saved, key: str, registry: Mapping[str, Any]) -> Any:
    """The part that `packed` put under `key`, of a kind that `registry` knows by name."""
    record = saved.settings[key]
    tensors = {name[len(key) + 1 :]: t for name, t in saved.tensors.items() if name.startswith(f"{key}/")}
    return registry[record["name"]].restored(Saved(record["settings"], tensors))


def expand(table: Tensor, fwd: ForwardPass) -> Tensor:
    """A table [R, ...] as [B, ...], for R rows that `generate` or the pass was given; one row serves all."""
    if len(table) == 1:
        return table
    index = fwd.row_index(len(table))
    return table if index is None else table[index.to(table.device)]


def per_row(value: PerRow, what: str, device: torch.device) -> Tensor:
    """A number or one per row as a tensor [1] or [R] of fp32. Raises SteersmanError unless finite."""
    if not isinstance(value, Tensor):
        value = number(value, what) if isinstance(value, str) or not hasattr(value, "__iter__") else value
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SteersmanError(f"{what} must be a number or one number per row, got {value!r}") from error
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if tensor.ndim != 1 or tensor.numel() == 0:
        raise SteersmanError(f"{what} must be a number or one number per row, got shape {tuple(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise SteersmanError(f"{what} must be finite, got {tensor.tolist()}")
    return tensor


def common_rows(**sizes: int) -> int:
    """The number of rows that all parameters share; those of one row serve every row."""
    rows = max(sizes.values())
    if any(n not in (1, rows) for n in sizes.values()):
        raise SteersmanError("rows disagree: " + ", ".join(f"{k} has {n}" for k, n in sizes.items() if n > 1))
    return rows


def blend(h: Tensor, new: Tensor, where: Tensor | bool) -> Tensor:
    """`new` where steered, and exactly h elsewhere; of an attention mask [B, H, S, K] the queries in `where` [B, S]."""
    if isinstance(where, bool):
        return new
    return torch.where(where[:, None, :, None] if h.ndim == 4 else where[..., None], new, h)
