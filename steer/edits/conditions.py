"""Gates that look at the model: one per token, and one per row that is decided while the prompt is read.

| gate | open where | decided |
|---|---|---|
| `TokenGate` | what is read of the token's own state is above a threshold | at each token |
| `Condition` | what is read of the prompt is above a threshold (CAST, arXiv 2409.05907) | once, for the row |
| `AnyOf` | one of several gates is | as they are |

A gate reads what the pass has come to: its hook point lies at the edit's or before it. A `Condition` may lie behind it
where its edit waits for the first generated token, or where the prompt is read twice.

Shape letters: B rows of the batch, S tokens of the pass, D width; P rows of the prompt's pass, R rows of parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.edits.base import HookReader, PerRow, Saved, common_rows, expand, packed, per_row, unpacked
from steersman.steer.edits.gates import GATES, Gate, merged_readers
from steersman.steer.edits.reads import READS, ReadLike, as_read

Pool = Literal["mean", "last", "max"]
Prompt = Literal["later_layers", "none", "second_pass"]
KEPT = 64  # texts of plain passes whose decision is remembered


class _Reading(Gate):
    """What compares a reading with a threshold."""

    def __init__(self, read: ReadLike, threshold: PerRow, above: bool, hook: HookName | None) -> None:
        self.read = as_read(read)
        if self.read.size != 1:
            raise SteersmanError(f"a gate reads one number, and this reading gives {self.read.size}: use AnyOf")
        self.threshold = per_row(threshold, "threshold", torch.device("cpu"))
        self.above = bool(above)
        self.hook = hook
        self.rows = common_rows(read=self.read.rows, threshold=len(self.threshold))

    def compare(self, values: Tensor, fwd: ForwardPass) -> Tensor:
        """Readings [B, ...] -> bool."""
        limit = expand(self.threshold.to(values.device), fwd).view(-1, *[1] * (values.ndim - 1))
        return values > limit if self.above else values < limit

    def values(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        """What is read of h [B, S, D]: [B, S]."""
        row = None
        if self.read.rows > 1:
            index = fwd.row_index(self.read.rows)
            index = torch.arange(len(h), device=h.device) if index is None else index.to(h.device)
            row = index.repeat_interleave(h.shape[1])
        return self.read.values(h.reshape(-1, h.shape[-1]).float(), row).reshape(h.shape[:2])

    def saved(self) -> Saved:
        parts = packed({"read": self.read})
        settings = {**parts.settings, "above": self.above, "hook": self.hook}
        return Saved(settings, {**parts.tensors, "threshold": self.threshold})


class TokenGate(_Reading):
    """1 at each token whose reading is above `threshold` (below it with `above=False`), else 0.

    Args:
        read: a vector, (w, b) of a probe (threshold 0 is where it decides), or `Feature(sae, j)`.
        threshold: a number or [R], in units of the reading.
        above: which side is open.
        hook: where it reads; None is where the edit stands. An earlier hook point is read as it is before the edits
            of the same context there.

    >>> gate = TokenGate(torch.tensor([1.0, 0.0]), threshold=2.0)
    """

    name = "token"

    def __init__(
        self, read: ReadLike, threshold: PerRow = 0.0, *, above: bool = True, hook: HookName | None = None
    ) -> None:
        super().__init__(read, threshold, above, hook)

    def _elsewhere(self, lm: LanguageModel, point: HookPoint) -> HookPoint | None:
        if self.hook is None:
            return None
        place = lm.hook_point(self.hook)
        return None if place == point else place

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        place = self._elsewhere(lm, point) or point
        if not (place < point or place == point):
            raise behind(place, point, "read it there or earlier")
        self.read.check(lm, place)

    def readers(self, lm: LanguageModel, point: HookPoint) -> Mapping[str, HookReader]:
        place = self._elsewhere(lm, point)
        return {} if place is None else {place.name: self._look}

    def _look(self, h: Tensor, fwd: ForwardPass) -> None:
        if self not in fwd.memo:
            fwd.memo[self] = self.values(h, fwd)

    def value(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        seen = fwd.whole.memo.get(self)
        values = self.values(h, fwd) if seen is None else seen[:, -fwd.length :].to(h.device)
        return self.compare(values, fwd).float()

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        read = unpacked(saved, "read", READS)
        return cls(read, saved.tensors["threshold"], above=saved.settings["above"], hook=saved.settings["hook"])


class _Decision:
    """What a `Condition` knows about one text."""

    def __init__(self) -> None:
        self.total: Tensor | None = None  # [P, D] sum of states, [P] sum or largest of readings
        self.count: Tensor | None = None  # [P] tokens in it
        self.end = 0  # columns that were looked at
        self.open: Tensor | None = None  # [P] bool
        self.whole = False  # whether all of the prompt has been read


class Condition(_Reading):
    """1 in the rows whose prompt reads above `threshold` (below it with `above=False`), else 0.

    It is decided when the prompt has been read and holds for the row from then on: in every decoding step, for beams
    and copies, with the prompt read in one pass or in chunks. Padding has no part in it, nor has the BOS.

    CAST as published is `read=TanhSimilarity(c)` at the input of a block (`hook_resid_pre`), pool "mean"; it cannot
    tell c from -c. Its fixed form reads `Projection(c)` or a probe. The published code makes vectors at the output of a
    block and compares them with its input, decides by the first row of a batch alone, and counts padding in the mean;
    its comparator "smaller" means that the THRESHOLD is the smaller one.

    Args:
        hook: where it reads; None is where `read` was made.
        read: a vector, (w, b) of a probe, `Feature(sae, j)`, or `TanhSimilarity(c)`.
        threshold: a number or [R], in units of the reading.
        above: which side is open.
        pool: `mean` over the prompt's tokens, its `last` token, or the `max` over them.
        prompt: what becomes of the prompt itself, of which nothing is decided before it has been read.
            `later_layers`: edits behind the hook point act on it; `none`: edits act on generated tokens alone;
            `second_pass`: the prompt is read once before, unedited up to the hook point, and edits at any layer act on
            all of it.
    """

    name = "condition"

    def __init__(
        self,
        hook: HookName | None,
        read: ReadLike,
        threshold: PerRow = 0.0,
        *,
        above: bool = True,
        pool: Pool = "mean",
        prompt: Prompt = "later_layers",
    ) -> None:
        super().__init__(read, threshold, above, hook)
        if pool not in get_args(Pool):
            raise SteersmanError(f"unknown pool {pool!r}: use one of {', '.join(get_args(Pool))}")
        if prompt not in get_args(Prompt):
            raise SteersmanError(f"unknown prompt {prompt!r}: use one of {', '.join(get_args(Prompt))}")
        if pool == "max" and self.read.of_means:
            raise SteersmanError(f"{self.read.what} is compared with a mean state: use pool 'mean' or 'last'")
        if hook is None and not self.read.origin.hook_name:
            raise SteersmanError("this condition does not say where it reads: give its hook point")
        self.hook = self.read.origin.hook_name if hook is None else hook
        self.pool: Pool = pool
        self.prompt: Prompt = prompt
        self._plain: dict[int, _Decision] = {}
        self._lm: LanguageModel | None = None

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        place = lm.hook_point(self.hook)  # pyright: ignore[reportArgumentType]
        self.read.check(lm, place)
        if self.prompt == "later_layers" and not place < point:
            raise behind(place, point, "read it earlier, or choose prompt='none' or 'second_pass'")
        self._lm = lm

    def readers(self, lm: LanguageModel, point: HookPoint) -> Mapping[str, HookReader]:
        return {lm.resolve_hook(self.hook): self._look}  # pyright: ignore[reportArgumentType]

    def reset(self) -> None:
        self._plain.clear()

    def decision(self, fwd: ForwardPass) -> _Decision:
        """What is known about the text of a pass."""
        if fwd.run is not None:
            return fwd.run.memo.setdefault(self, _Decision())
        if fwd.sequence not in self._plain:
            while len(self._plain) >= KEPT:
                del self._plain[next(iter(self._plain))]
            self._plain[fwd.sequence] = _Decision()
        return self._plain[fwd.sequence]

    def _look(self, h: Tensor, fwd: ForwardPass) -> None:
        known = self.decision(fwd)
        end = fwd.past + fwd.length
        if known.whole or fwd.phase == "generation" or end <= known.end:
            return  # decided, or seen by another edit with this gate
        self._add(known, h, fwd)
        known.end = end
        # Outside generate more of the prompt may follow: what was decided is then decided again.
        complete = fwd.run is None or end >= fwd.prompt_columns
        if complete:
            known.open = self._decide(known, fwd)
            known.whole = fwd.run is not None

    def _add(self, known: _Decision, h: Tensor, fwd: ForwardPass) -> None:
        chosen = (fwd.in_prompt & ~fwd.is_bos).to(h.device)
        if self.pool == "last":
            chosen = chosen & (fwd.positions == fwd.prompt_length[:, None] - 1).to(h.device)
        if self.pool == "max":
            values = self.values(h, fwd).masked_fill(~chosen, -torch.inf).amax(1)
            known.total = values if known.total is None else torch.maximum(known.total, values)
        elif self.read.of_means:
            states = torch.where(chosen[..., None], h.float(), 0.0).sum(1)
            known.total = states if known.total is None else known.total + states
        else:
            values = torch.where(chosen, self.values(h, fwd), 0.0).sum(1)
            known.total = values if known.total is None else known.total + values
        count = chosen.sum(1)
        known.count = count if known.count is None else known.count + count

    def _decide(self, known: _Decision, fwd: ForwardPass) -> Tensor:
        assert known.total is not None
        assert known.count is not None
        value = known.total
        if self.pool != "max":
            count = known.count.clamp(min=1)
            value = value / (count[:, None] if value.ndim == 2 else count)
        if self.read.of_means:
            value = self.values(value[:, None], fwd)[:, 0]
        return self.compare(value, fwd) & (known.count > 0)

    def _read_ahead(self, known: _Decision, fwd: ForwardPass) -> None:
        """Decide by reading the whole prompt once more, unedited, up to the hook point."""
        assert self._lm is not None
        lm, hook, run = self._lm, str(self.hook), fwd.run
        whole = fwd.past == 0 and (run is None or fwd.length >= fwd.prompt_columns)
        ids = fwd.input_ids if whole else None if run is None else run.input_ids
        if ids is None:
            raise SteersmanError(
                "this condition has to read the prompt before its first layers are edited, and this pass holds a part "
                "of it: give the prompt in one pass, or choose prompt='none'"
            )
        mask = fwd.mask if whole else None if run is None else run.mask
        mask = None if mask is None else mask[:, : ids.shape[1]]
        if run is not None and len(ids) > run.rows:  # copies of a prompt are read once
            each = len(ids) // run.rows
            ids, mask = ids[::each], None if mask is None else mask[::each]
        known.total = known.count = None

        def look(h: Tensor, again: ForwardPass) -> Tensor:
            self._add(known, h, again)
            known.open = self._decide(known, again)
            return h

        with lm.unedited(), lm.edit(hook, look):
            if run is not None:  # what was generated is no part of it
                ids = ids[:, : fwd.prompt_columns]
                mask = None if mask is None else mask[:, : fwd.prompt_columns]
            lm.capture(ids, mask, hooks=hook, prompt_length=fwd.declared)
        known.end, known.whole = fwd.prompt_columns, run is not None

    def value(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        known = self.decision(fwd)
        generated = fwd.phase == "generation"
        if self.prompt == "none" and fwd.phase == "prompt":
            return torch.zeros(1, 1, device=h.device)
        if known.open is None:
            if generated:
                raise SteersmanError(
                    "this condition is decided while the prompt is read, and the prompt was read before it was open: "
                    "open the context before generating"
                )
            self._read_ahead(known, fwd)
        assert known.open is not None
        rows = known.open.to(h.device)
        if len(rows) != fwd.batch:
            if fwd.batch % len(rows):
                raise SteersmanError(f"this condition was decided for {len(rows)} rows and the pass has {fwd.batch}")
            rows = rows.repeat_interleave(fwd.batch // len(rows))
        gate = rows[:, None].float()
        return gate if generated or self.prompt != "none" else gate * fwd.generated.to(h.device)

    def saved(self) -> Saved:
        settings, tensors = super().saved()
        return Saved({**settings, "pool": self.pool, "prompt": self.prompt}, tensors)

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        known = saved.settings
        rest = {name: known[name] for name in ("above", "pool", "prompt")}
        return cls(known["hook"], unpacked(saved, "read", READS), saved.tensors["threshold"], **rest)


class AnyOf(Gate):
    """The largest of several gates: open where one of them is. (Gates given as a list multiply: open where all are.)"""

    name = "any_of"

    def __init__(self, gates: Sequence[Gate]) -> None:
        self.gates = list(gates)
        if not self.gates or not all(isinstance(gate, Gate) for gate in self.gates):
            raise SteersmanError("AnyOf takes one gate or more")
        self.rows = common_rows(**{f"gate {i}": gate.rows for i, gate in enumerate(self.gates)})

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        for gate in self.gates:
            gate.check(lm, point)

    def readers(self, lm: LanguageModel, point: HookPoint) -> Mapping[str, HookReader]:
        return merged_readers([gate.readers(lm, point) for gate in self.gates])

    def reset(self) -> None:
        for gate in self.gates:
            gate.reset()

    def value(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        value = self.gates[0].value(h, fwd)
        for gate in self.gates[1:]:
            value = torch.maximum(value, gate.value(h, fwd))
        return value

    def saved(self) -> Saved:
        parts = packed({f"gate{i}": gate for i, gate in enumerate(self.gates)})
        return Saved({**parts.settings, "gates": len(self.gates)}, parts.tensors)

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls([unpacked(saved, f"gate{i}", GATES) for i in range(saved.settings["gates"])])


def behind(place: HookPoint, point: HookPoint, fix: str) -> SteersmanError:
    """The error for a gate that reads where a pass comes later than to its edit."""
    return SteersmanError(
        f"the edit at {point.name} has a gate that reads {place.name}, which the pass comes to after it: {fix}; two "
        "gates that need each other's layers cannot both be decided in one pass"
    )
