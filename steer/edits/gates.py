"""Gates: how much of an edit acts, per row, token and generated step; several multiply.

| gate | acts |
|---|---|
| a number, or one per row | that much |
| `Schedule` | as a table over the generated steps says |

A gate of 0 leaves the state to the last bit and is no part of the trace; a gate of 1 gives the edit's own result.

Shape letters: B rows of the batch, S tokens of the pass; R rows of parameters, T steps.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.registry import Registry
from steersman.steer.edits.base import (
    EDITS,
    ActingPart,
    Edit,
    HookReader,
    PerRow,
    Saved,
    common_rows,
    expand,
    packed,
    per_row,
    towards,
    unpacked,
)

GATES: Registry[type["Gate"]] = Registry("gate")
"""Every gate that files and recipes know, by name."""


class Gate(ActingPart):
    """How much of an edit acts at each token. A subclass needs `value` alone."""

    def __init_subclass__(cls) -> None:
        GATES.register(cls, cls)

    def value(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        """[B or 1, S or 1] fp32, from what is at the edit's hook point."""
        raise NotImplementedError  # each gate defines it


class RowGate(Gate):
    """A number for all rows, or one for each."""

    name = "rows"

    def __init__(self, factor: PerRow) -> None:
        self.factor = per_row(factor, "gate", torch.device("cpu"))
        self.rows = len(self.factor)

    def value(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        factor = self.factor.to(h.device)
        return expand(factor, fwd)[:, None]

    def saved(self) -> Saved:
        return Saved({}, {"factor": self.factor})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls(saved.tensors["factor"])


class Schedule(Gate):
    """A table [T] or [R, T] over the generated steps (`ForwardPass.steps`).

    Column 0 is for the last token of the prompt, whose output chooses the first generated token, and for the tokens
    before it; column t for generated token t; the last column is held.

    >>> Schedule([1.0, 0.5, 0.0]).table
    tensor([[1.0000, 0.5000, 0.0000]])
    """

    name = "schedule"

    def __init__(self, table: Sequence[float] | Tensor) -> None:
        given = torch.as_tensor(table, dtype=torch.float32)
        if given.ndim not in (1, 2) or given.numel() == 0 or not bool(given.isfinite().all()):
            raise SteersmanError(f"a schedule must be finite numbers [T] or [R, T], got shape {tuple(given.shape)}")
        self.table = given.reshape(-1, given.shape[-1])
        self.rows = len(self.table)

    @classmethod
    def of(cls, given: "ScheduleLike") -> "Schedule":
        """A schedule from what a user writes: `start` (the last prompt token and those before it alone),
        `diminishing:T` (1 - t / T, and 0 from T on), or a table."""
        if isinstance(given, Schedule):
            return given
        if isinstance(given, str):
            head, _, tail = given.strip().partition(":")
            if head == "start" and not tail:
                return cls([1.0, 0.0])
            if head == "diminishing" and tail.isdecimal() and 1 <= int(tail) <= 1_000_000:
                return cls(1 - torch.arange(int(tail) + 1) / int(tail))
            raise SteersmanError(
                f"unknown schedule {given!r}: use start, diminishing:T (such as diminishing:30), or a table"
            )
        return cls(given)

    def value(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        table = expand(self.table.to(h.device), fwd)
        step = fwd.steps.to(h.device).clamp(0, table.shape[1] - 1)
        return table.expand(len(step), -1).gather(1, step)

    def saved(self) -> Saved:
        return Saved({}, {"table": self.table})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls(saved.tensors["table"])


ScheduleLike = Schedule | str | Sequence[float] | Tensor
"""What `Schedule.of` takes."""


class GatedEdit(Edit):
    """h + g (h' - h), with h' from another edit and g the product of the gates."""

    name = "gated"

    def __init__(self, edit: Edit, gates: Sequence[Gate]) -> None:
        self.edit, self.gates = edit, list(gates)
        sizes = {f"gate {i}": gate.rows for i, gate in enumerate(self.gates)}
        self.rows = common_rows(edit=edit.rows, **sizes)
        self.active = edit.active.expand(self.rows)

    def value(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        """[B or 1, S or 1] fp32: the product of the gates."""
        product = self.gates[0].value(h, fwd)
        for gate in self.gates[1:]:
            product = product * gate.value(h, fwd)
        return product

    def narrow(self, where: Tensor | bool, fwd: ForwardPass, h: Tensor) -> Tensor | bool:
        if isinstance(where, bool) and not where:
            return False
        where = self.edit.narrow(where, fwd, h)
        if isinstance(where, bool) and not where:
            return False
        value = fwd.memo[self] = self.value(h, fwd)  # `apply` follows, with the same h
        on = (value != 0).expand(fwd.batch, fwd.length)
        return on if isinstance(where, bool) else where & on.to(where.device)

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        value = fwd.memo.pop(self, None)
        value = self.value(h, fwd) if value is None else value
        return towards(h, self.edit.apply(h, fwd, where), value)

    def scaled(self, factor: PerRow) -> Self:
        return type(self)(self.edit.scaled(factor), self.gates)

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        self.edit.check(lm, point)
        for gate in self.gates:
            gate.check(lm, point)

    def readers(self, lm: LanguageModel, point: HookPoint) -> Mapping[str, HookReader]:
        return merged_readers([part.readers(lm, point) for part in (self.edit, *self.gates)])

    def reset(self) -> None:
        for part in (self.edit, *self.gates):
            part.reset()

    def saved(self) -> Saved:
        parts = packed({"edit": self.edit, **{f"gate{i}": gate for i, gate in enumerate(self.gates)}})
        return Saved({**parts.settings, "gates": len(self.gates)}, parts.tensors)

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        gates = [unpacked(saved, f"gate{i}", GATES) for i in range(saved.settings["gates"])]
        return cls(unpacked(saved, "edit", EDITS), gates)


def merged_readers(found: Sequence[Mapping[str, HookReader]]) -> dict[str, HookReader]:
    """The readers of several parts: each hook point has one, which shows it to all that look there."""

    def each(readers: Sequence[HookReader]) -> HookReader:
        def read(h: Tensor, fwd: ForwardPass) -> None:
            for reader in readers:
                reader(h, fwd)

        return read

    return {hook: each([part[hook] for part in found if hook in part]) for part in found for hook in part}


GateLike = PerRow | Gate | Sequence[Gate]
"""How much of an edit acts: a number, one per row, a `Gate`, or several that multiply."""


def gated(edit: Edit, gate: GateLike, schedule: ScheduleLike | None = None) -> Edit:
    """`edit` behind a gate and a schedule. Numbers multiply the edit's own strength (`Edit.scaled`)."""
    gates: list[Gate] = []
    if isinstance(gate, Gate):
        gates.append(gate)
    elif isinstance(gate, list | tuple) and gate and all(isinstance(one, Gate) for one in gate):
        gates += [one for one in gate if isinstance(one, Gate)]
    elif not (isinstance(gate, int | float) and gate == 1):
        edit = edit.scaled(per_row(gate, "gate", edit.active.device))  # pyright: ignore[reportArgumentType]
    if schedule is not None:
        gates.append(Schedule.of(schedule))
    return (edit.gated(gates) or GatedEdit(edit, gates)) if gates else edit
