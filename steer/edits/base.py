"""What an edit is: something that changes what is at a hook point, at the tokens in scope.

`steersman.steer.steerer` opens edits in contexts, which give any `Edit` its scope, rows, trace and calibration.

Shape letters: B rows of the batch, S tokens of the pass, D width; R rows of parameters (1 for all, or one per prompt).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steersman.doors import number
from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel

PerRow = float | Sequence[float] | Tensor
"""A number for all rows, or one for each."""


class Edit:
    """Something that turns h into h': the hidden states [B, S, D] at a hook point, or its attention mask [B, H, S, K],
    or the logits [B, S, V]. A subclass needs `apply` alone; its parameters may differ per row.

    >>> class Double(Edit):
    ...     def apply(self, h, fwd, where):
    ...         return blend(h, 2 * h, where)
    """

    rows: int = 1
    """R, the rows of its parameters."""
    active: Tensor = torch.ones(1, dtype=torch.bool)
    """[R] bool: which rows it can change at all."""

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        """h', a new tensor, equal to h outside `where` ([B, S] bool, or True for every token)."""
        raise NotImplementedError  # each edit defines it

    def narrow(self, where: Tensor | bool, fwd: ForwardPass) -> Tensor | bool:
        """Of the tokens in scope, those this edit can change."""
        return where

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        """Raise a SteersmanError where the edit makes no sense at a hook point, before anything is run."""

    def scaled(self, factor: PerRow) -> "Edit":
        """The edit `factor` times as strong, a number or one per row: 0 changes nothing. For a search of the scale.

        Here h + factor (h' - h); an edit that has a strength of its own multiplies that.
        """
        return ScaledEdit(self, factor)

    def expand(self, table: Tensor, fwd: ForwardPass) -> Tensor:
        """A table [R, ...] as [B, ...], or [1, ...] when one row serves all."""
        if self.rows == 1:
            return table
        index = fwd.row_index(self.rows)
        return table if index is None else table[index]


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

    def __init__(self, edit: Edit, factor: PerRow) -> None:
        self.edit = edit
        self.factor = per_row(factor, "factor", edit.active.device)
        self.rows = common_rows(edit=edit.rows, factor=len(self.factor))
        self.active = edit.active & (self.factor != 0)

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        new = self.edit.apply(h, fwd, where)
        factor = self.expand(self.factor.to(h.device), fwd).view(-1, *[1] * (h.ndim - 1))
        # What is not changed stays as it is, infinite logits among it, and a factor of 1 gives h' to the last bit.
        return torch.where((new == h) | (factor == 1), new, (h + factor * (new - h)).to(h.dtype))

    def narrow(self, where: Tensor | bool, fwd: ForwardPass) -> Tensor | bool:
        return self.edit.narrow(where, fwd)

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        self.edit.check(lm, point)


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
        raise SteersmanError("rows disagree: " + ", ".join(f"{k} has {n}" for k, n in sizes.items()))
    return rows


def blend(h: Tensor, new: Tensor, where: Tensor | bool) -> Tensor:
    """`new` where steered, and exactly h elsewhere; of an attention mask [B, H, S, K] the queries in `where` [B, S]."""
    if isinstance(where, bool):
        return new
    return torch.where(where[:, None, :, None] if h.ndim == 4 else where[..., None], new, h)
