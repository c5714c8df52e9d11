"""Runs the Python source of `kernels.gluon_wave` on the CPU: threads for its warps, barriers with phases, memory that
shows when it is used too early or too late.

Tensors are PyTorch's, layouts nothing. A copy spoils its destination when it starts and fills it some time later; a
product reads its operands at the last moment that its waits allow. A wait that nothing ends is an error. The two pieces
of inline assembly are replaced by their definitions.
"""

import queue
import random
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

PATIENCE = 3.0
"""Seconds after which a wait counts as one without end."""


class Deadlock(Exception):
    """A barrier's phase did not end."""


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all expected bytes have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0

    def update(self, arrivals: int, bytes: int) -> None:
        with self.changed:
            assert self.count > 0, "a barrier is used before it is initialised"
            self.pending -= arrivals
            self.bytes += bytes
            assert self.pending >= 0, "more arrivals than a phase has"
            if self.pending == 0 and self.bytes == 0:
                self.phase += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.count > 0, "a barrier is waited for before it is initialised"
            if not self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE):
                raise Deadlock(f"nobody ends phase {self.phase}")


class SharedMemory:
    """S stages of a tile, or S barriers."""

    def __init__(self, dtype: Any, shape: list[int]) -> None:
        self.stages = [Barrier() if dtype == torch.int64 else torch.full(shape[1:], torch.nan) for _ in range(shape[0])]

    def index(self, i: int) -> Any:
        return self.stages[i]


class Descriptor:
    """A tensor [rows, D] that is copied by boxes; past its ends are zeros."""

    dtype = torch.bfloat16
    layout = None

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def box(self, corner: list[int], shape: torch.Size) -> Tensor:
        there = self.tensor[corner[0] : corner[0] + shape[0], corner[1] : corner[1] + shape[1]]
        out = torch.zeros(shape)
        out[: there.shape[0], : there.shape[1]] = there
        return out


class Pointer:
    """Elements of a tensor's memory."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, offsets: Any) -> "Pointer":
        return Pointer(self.memory, self.at + offsets)

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.memory, self.at[index])

    def to(self, dtype: Any) -> "Pointer":
        return self


class Accumulator:
    """A tile with products that may not have been made yet."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.clone()
        self.pending: list[tuple[Tensor, Tensor]] = []


class Machine:
    """One multiprocessor: what a program's functions see as `gl`, `hopper`, `mbarrier` and `load_box`."""

    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    where = staticmethod(torch.where)
    static_range = staticmethod(range)
    minimum = staticmethod(min)

    def __init__(self, program: int, n_programs: int, seed: int) -> None:
        self.program, self.n_programs = program, n_programs
        self.random = random.Random(seed)
        self.copies: queue.Queue[tuple[Tensor, Tensor, Barrier] | None] = queue.Queue()

    # --- gl ---

    def program_id(self, axis: int) -> int:
        return self.program

    def num_programs(self, axis: int) -> int:
        return self.n_programs

    def assume(self, condition: bool) -> None:
        assert condition

    static_assert = assume

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    def arange(self, start: int, end: int, layout: Any) -> Tensor:
        return torch.arange(start, end, dtype=torch.int32)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return x.sum(dim=axis, dtype=x.dtype)

    def permute(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        return x.permute(order)

    def reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.reshape(shape)

    def layout(self, *args: Any, **kwargs: Any) -> None:
        return None

    SliceLayout = BlockedLayout = NVMMADistributedLayout = MBarrierLayout = layout

    def convert_layout(self, x: Tensor, layout: Any) -> Tensor:
        return x

    def load(self, pointer: Pointer, mask: Tensor, other: float) -> Tensor:
        mask = mask.expand_as(pointer.at)
        memory = pointer.memory.view(-1)
        assert not mask.any() or (pointer.at[mask].min() >= 0 and pointer.at[mask].max() < len(memory))
        return torch.where(mask, memory[pointer.at.clamp(0, len(memory) - 1).long()], other)

    def atomic_add(self, pointer: Pointer, value: Tensor, mask: Tensor, sem: str) -> Tensor:
        before = torch.full_like(value, 123_456_789)  # what is masked has no value
        places = mask.expand_as(value).nonzero().tolist()
        self.random.shuffle(places)
        for place in map(tuple, places):
            before[place] = pointer.memory[pointer.at[place]]
            pointer.memory[pointer.at[place]] += value[place]
        return before

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> SharedMemory:
        return SharedMemory(dtype, shape)

    def warp_specialize(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any):
        errors: list[BaseException] = []

        def run(function: Callable[..., None], *args: Any) -> None:
            try:
                function(*args)
            except BaseException as error:
                errors.append(error)

        engine = threading.Thread(target=run, args=(self._copy_all,))
        threads = [threading.Thread(target=run, args=(function, *args)) for function, args in parts]
        for thread in (engine, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        self.copies.put(None)
        engine.join()
        if errors:
            raise errors[0]

    # --- hopper, mbarrier, tma ---

    def fence_async_shared(self) -> None:
        pass

    def warpgroup_mma(self, a: Tensor, b: Tensor, acc: Any, is_async: bool) -> Accumulator:
        assert is_async
        acc = acc if isinstance(acc, Accumulator) else Accumulator(acc)
        acc.pending.append((a, b))
        return acc

    def warpgroup_mma_wait(self, n: int, deps: tuple[Accumulator]) -> Any:
        (acc,) = deps
        while len(acc.pending) > n:
            a, b = acc.pending.pop(0)
            acc.value += a @ b
        return acc if n else acc.value

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def wait(self, barrier: Barrier, parity: int) -> None:
        barrier.wait(parity)

    def expect(self, barrier: Barrier, bytes: int) -> None:
        barrier.update(1, bytes)

    def arrive(self, barrier: Barrier, count: int, pred: bool = True) -> None:
        if pred:
            barrier.update(count, 0)
            time.sleep(0.0005)  # whoever waited for this goes first

    def load_box(self, source: Descriptor, corner: list[int], barrier: Barrier, out: Tensor) -> None:
        out.fill_(torch.nan)
        self.copies.put((out, source.box(corner, out.shape), barrier))

    def _copy_all(self) -> None:
        while (copy := self.copies.get()) is not None:
            out, box, barrier = copy
            if self.random.random() < 0.2:
                time.sleep(0.002)
            out.copy_(box)
            barrier.update(0, -2 * box.numel())


def count_hits(values: Tensor, tau: Tensor) -> Tensor:
    """See `gluon_wave.count_hits`."""
    hits = ~(values <= tau)
    out = torch.zeros_like(values, dtype=torch.int32)
    out[..., ::8] = hits.unflatten(-1, (-1, 8)).sum(dim=-1, dtype=torch.int32)
    return out


def append_hits(
    values: Tensor, tau: Tensor, counts: Tensor, before: Tensor, start: Tensor, shift: Tensor, low: Tensor,
    base: Pointer, slots: Tensor,
) -> None:  # fmt: skip
    """See `gluon_wave.append_hits`."""
    hits = ~(values <= tau)
    assert base.at.shape == values.shape
    memory = base.memory.view(-1)
    for *quarter, group in (counts != 0).nonzero().tolist():
        at = (*quarter, group)
        slot = int(start[at]) + ((int(before[at]) & 0xFFFFFFFF) >> int(shift[at]) & 255)
        for i in range(8):
            here = (*quarter, group + i)
            if hits[here]:
                if slot < slots[at]:
                    memory[int(base.at[at]) + slot] = key_of(values[here], int(low[at]) - (i // 2 * 8 + i % 2))
                slot += 1


def key_of(value: Tensor, low: int) -> int:
    """A key of `triton_select.make_key` from its value and its lower half."""
    bits = 0x7FC00000 if value.isnan() else int((value + 0.0).view(torch.int32))
    return ((bits ^ (0x7FFFFFFF if bits < 0 else 0)) << 32) | low


def emulate(
    module: types.ModuleType, n_programs: int, constants: dict[str, int], x: Tensor, w: Tensor, bias: Tensor,
    tau: Tensor, buffer: Tensor, count: Tensor, wave: tuple[int, int], seed: int = 0,
) -> None:  # fmt: skip
    """Run `module.filter_kernel` in every program; x and w are fp32 with values that the products' dtype has."""
    for program in range(n_programs):
        machine: Any = Machine(program, n_programs, seed + program)
        names = dict(vars(module))
        functions = {name: value for name, value in names.items() if isinstance(value, JITFunction)}
        for name, function in functions.items():
            names[name] = types.FunctionType(function.fn.__code__, names, name)
        names |= {"gl": machine, "hopper": machine, "mbarrier": machine, "load_box": machine.load_box}
        names |= {"count_hits": count_hits, "append_hits": append_hits, "quarters_layout": machine.layout}
        names["filter_kernel"](
            Descriptor(x), Descriptor(w), Pointer(bias), Pointer(tau), Pointer(buffer), Pointer(count),
            len(x), x.shape[1], *wave, **constants,
        )  # fmt: skip
