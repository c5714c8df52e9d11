"""What attention and MLP of each block really add to the residual stream, measured on a few tokens.

A module's name says what it is, not what the block does with its output: Granite multiplies it, Gemma 2 normalises it,
MPT's MLP has added the stream already, and some blocks add a third thing. So the modules that the layout names are
tried against the sums that the block makes, then what stands after or inside them, with the factors that the
configuration holds. What fits is used; what does not is left out, with the reason.

B rows, S tokens, D width: every tensor here is [B, S, D].
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steersman.lm.probe import first_input, probe, states_of

__all__ = ["BlockSums", "Summand", "measure_sums"]

ROUNDING = 8
"""Roundings of the coarsest dtype involved that a sum may be off, relative to its terms."""
_SMALL = 1e-30
_TRIED = 12  # modules that may be the summand, in a block whose layout's own is none


@dataclass(frozen=True)
class Summand:
    """A part of the sum: `factor` times what the module at `path` (within the block) returns."""

    path: str
    factor: float = 1.0


@dataclass
class BlockSums:
    """What one block adds, and the stream between."""

    attn: Summand | None = None
    mlp: Summand | None = None
    mid: bool = False
    """Whether the module that the layout names reads the stream between attention and MLP."""
    why: str = ""
    """Why a part is missing."""


@dataclass
class _Record:
    """One run of one block: its input and output, and what its modules were given and returned, in order."""

    pre: Tensor | None = None
    post: Tensor | None = None
    runs: int = 0
    inputs: list[tuple[int, str, Tensor]] = field(default_factory=list)
    outputs: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    began: dict[str, int] = field(default_factory=dict)
    moment: int = 0

    def tick(self) -> int:
        self.moment += 1
        return self.moment


def measure_sums(
    model: nn.Module,
    blocks: nn.ModuleList,
    width: int,
    parts: list[dict[str, str | None]],
    numbers: Iterable[float],
    also: Callable[[], list[Any]] = list,
) -> list[BlockSums]:
    """What each of `blocks` adds to a stream of `width`.

    `parts` holds for each block the paths within it that its layout names (`attn`, `mlp`: whose outputs are added;
    `mid`: whose input is the stream between; `attn_in`, `mlp_in`: that read for them); `numbers` are the factors a
    block may multiply with. `also()` attaches what else reads the same pass.
    """
    found = [BlockSums(why="it did not run in a pass over text") for _ in blocks]
    known = sorted({float(n) for n in numbers if n and n != 1})

    def attach() -> list[Any]:
        return [*also(), *(handle for i, block in enumerate(blocks) for handle in _record(block, width, done(i)))]

    def done(i: int) -> Callable[[_Record], None]:
        def judge(record: _Record) -> None:
            own = {float(v) for v in vars(blocks[i]).values() if isinstance(v, float) and v not in (0.0, 1.0)}
            found[i] = _judge(record, blocks[i], parts[i], sorted({*known, *own}))

        return judge

    probe(model, attach)
    return found


def _record(block: nn.Module, width: int, done: Callable[[_Record], None]) -> Iterator[Any]:
    record = _Record()

    def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
        runs = record.runs
        record.__init__(pre=_kept(first_input(args, kwargs), width), runs=runs + 1)

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        record.post = _kept(output, width)
        done(record)
        record.inputs, record.outputs = [], {}

    def given(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            moment = record.tick()
            record.began.setdefault(path, moment)
            if (x := _kept(first_input(args, kwargs), width)) is not None:
                record.inputs.append((moment, path, x))

        return hook

    def returned(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if (x := _kept(output, width)) is not None:
                record.outputs[path] = (record.tick(), x)

        return hook

    yield block.register_forward_pre_hook(begin, with_kwargs=True)
    for path, module in block.named_modules():
        if path and ".experts." not in f".{path}.":
            yield module.register_forward_pre_hook(given(path), with_kwargs=True)
            yield module.register_forward_hook(returned(path))
    yield block.register_forward_hook(end)


def _kept(value: Any, width: int) -> Tensor | None:
    x = states_of(value, width)
    return None if x is None else x.detach().clone()  # blocks write into the tensors that they are given


def _judge(record: _Record, block: nn.Module, parts: dict[str, str | None], numbers: list[float]) -> BlockSums:
    if record.runs > 1:
        return BlockSums(why="it runs several times in a pass")
    if record.pre is None or record.post is None:
        return BlockSums(why="it does not read and return one hidden state a token")
    sums = _Sums(record, block, parts, numbers)
    found = BlockSums()
    if parts["attn"]:
        found.attn, stream = sums.attention()
    else:
        stream = None
    if parts["mlp"]:
        found.mlp, stream = sums.mlp(stream)
    if found.attn is None and found.mlp is None and parts["attn"] and parts["mlp"]:
        found.attn, found.mlp = sums.side_by_side()
    if parts["mid"] and stream is not None:
        found.mid = any(path == parts["mid"] and sums.same(x, stream) for _, path, x in record.inputs)
    if (parts["attn"] and found.attn is None) or (parts["mlp"] and found.mlp is None):
        found.why = "what the block adds is no multiple of what this part of it returns"
    return found


class _Sums:
    """The sums of one run of a block."""

    def __init__(self, record: _Record, block: nn.Module, parts: dict[str, str | None], numbers: list[float]) -> None:
        assert record.pre is not None
        assert record.post is not None
        self.record, self.block, self.parts, self.numbers = record, block, parts, numbers
        self.pre, self.post = record.pre, record.post
        first_mlp = parts["mlp_in"] and record.began.get(parts["mlp_in"])
        self.mlp_began = first_mlp or record.moment + 1
        self.attn_began = (parts["attn_in"] and record.began.get(parts["attn_in"])) or 0

    def attention(self) -> tuple[Summand | None, Tensor | None]:
        """What attention adds to the block's input, and the sum, where a later module or the block's end sees it."""
        for path, (moment, x) in self._candidates("attn", lambda m: self.attn_began <= m):
            for later, _, stream in self.record.inputs:
                if later > moment and (factor := self.factor(stream, self.pre, x)) is not None:
                    return Summand(path, factor), stream
            if not self.parts["mlp"] and (factor := self.factor(self.post, self.pre, x)) is not None:
                return Summand(path, factor), None
        return None, None

    def mlp(self, stream: Tensor | None) -> tuple[Summand | None, Tensor | None]:
        """What the MLP adds to the stream before it, and that stream."""
        before = [] if stream is None else [stream]
        if stream is None:
            before = [x for m, _, x in self.record.inputs if m <= self.mlp_began] + [self.pre]
        normalised = [x for m, x in self.record.outputs.values() if m <= self.mlp_began]
        ends = [(self.record.moment + 1, self.post)]
        for path, (_, out) in self.record.outputs.items():  # the block's last step may normalise the sum
            if self.same(out, self.post):
                ends += [(m, x) for m, own, x in self.record.inputs if own == path and x is not self.post]
        for path, (moment, x) in self._candidates("mlp", lambda m: m >= self.mlp_began):
            for later, end in ends:
                for base in (*before, *normalised) if later > moment else ():
                    if (factor := self.factor(end, base, x)) is not None:
                        return Summand(path, factor), base
        return None, stream

    def side_by_side(self) -> tuple[Summand | None, Summand | None]:
        """Attention and MLP that read the same stream and are added together."""
        change, post = (self.post - self.pre).double().flatten(), self.post
        for a_path, (_, a) in self._candidates("attn", lambda m: m >= self.attn_began):
            for m_path, (_, m) in self._candidates("mlp", lambda m: m >= self.mlp_began):
                if a_path == m_path:
                    continue
                both = torch.stack([a.double().flatten(), m.double().flatten()])
                normal, right = (both @ both.T).cpu(), (both @ change).cpu()
                if float(torch.linalg.det(normal)) < _SMALL:
                    continue
                f, g = (self.snapped(x) for x in torch.linalg.solve(normal, right).tolist())
                if self.fits(post, self.pre, f * a.float(), g * m.float()):
                    return Summand(a_path, f), Summand(m_path, g)
        return None, None

    def _candidates(self, part: str, when: Callable[[int], bool]) -> list[tuple[str, tuple[int, Tensor]]]:
        """Modules whose output may be the summand: the one that the layout names, then all others that ran, the ones
        nearest to the block first, those that only pass on last."""
        named, outputs = self.parts[part], self.record.outputs
        words = ("attn", "attention") if part == "attn" else ()

        def rank(item: tuple[str, Any]) -> tuple[bool, bool, bool, int]:
            path = item[0]
            passes_on = type(self.block.get_submodule(path)).__name__ in ("Dropout", "Identity")
            return path != named, passes_on, bool(words) and not any(w in path for w in words), path.count(".")

        own = [(path, found) for path, found in outputs.items() if when(found[0])]
        if named in outputs and named not in dict(own):
            own.append((str(named), outputs[str(named)]))
        return sorted(own, key=rank)[:_TRIED]

    def factor(self, total: Tensor, base: Tensor, x: Tensor) -> float | None:
        """The factor f of total = base + f x, where there is one."""
        change, x64 = (total.double() - base.double()).flatten(), x.double().flatten()
        size = float(x64 @ x64)
        if size < _SMALL:
            return 1.0 if self.fits(total, base) else None
        f = self.snapped(float(change @ x64) / size)
        return f if abs(f) > 1e-3 and self.fits(total, base, f * x.float()) else None

    def snapped(self, f: float) -> float:
        """The factor as the configuration writes it, where it is within what rounding lets it be measured to."""
        near = 1e-5 if self.pre.dtype in (torch.float32, torch.float64) else 0.02
        best = min((1.0, -1.0, *self.numbers), key=lambda n: abs(n - f))
        return best if abs(best - f) <= near * abs(f) else f

    def same(self, a: Tensor, b: Tensor) -> bool:
        return self.fits(a, b)

    def fits(self, total: Tensor, *terms: Tensor) -> bool:
        """Whether `total` is the sum of `terms` up to rounding, nearly everywhere."""
        eps = max(torch.finfo(x.dtype).eps for x in (total, self.pre, self.post))
        error, size = total.float(), total.float().abs()
        for x in terms:
            error, size = error - x.float(), size + x.float().abs()
        return float((error.abs() <= ROUNDING * eps * size + _SMALL).float().mean()) > 0.99
