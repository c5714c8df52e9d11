"""How work is spread over processes: the mesh, checked without any process group, and the ranks that make it up.

A mesh has two axes. The ranks along `latent` share the latents: each owns L / latent of them with their optimiser
state, so that the gradients of weights stay where they are made and a step moves only the batch and the
reconstruction. The ranks along `data` share the batch; their gradients are summed over that axis alone. Neighbouring
ranks share latents, as those talk most: rank = data index * latent + latent index.

Shape letters: N tokens of a batch, L latents, D width.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from steersman.device import local_rank
from steersman.errors import LostRankError, PreemptedError, SteersmanError, UnfinishedError

__all__ = [
    "Mesh",
    "RankGroup",
    "Ranks",
    "comm_errors",
    "ending_on_sigterm",
    "process_group",
    "rank_and_world_size",
    "use_local_accelerator",
]

# Newer PyTorch has other names for the same functions.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The layout of a job: `data` replicas of `latent` ranks each, and which of them this process is.

    >>> mesh = Mesh.over(8, rank=5, d_sae=65536, batch_size=4096, latent=4)
    >>> mesh.data, mesh.data_index, mesh.latent_index, mesh.local_latents(65536), mesh.owned_latents(65536)
    (2, 1, 1, (16384, 32768), (24576, 32768))
    """

    data: int = 1
    """Replicas that share the batch."""
    latent: int = 1
    """Ranks that share the latents of a replica."""
    rank: int = 0
    """This process, from 0 to data * latent - 1."""

    def __post_init__(self) -> None:
        if self.data < 1 or self.latent < 1 or not 0 <= self.rank < self.data * self.latent:
            raise SteersmanError(f"rank {self.rank} has no place in a mesh of {self.data} x {self.latent} ranks")

    @classmethod
    def over(cls, world_size: int, *, rank: int = 0, d_sae: int, batch_size: int, latent: int | None = None) -> Self:
        """The mesh of `world_size` ranks, `latent` of which (all if None) share the latents.

        Raises a SteersmanError that names the nearest sizes that fit when latents or rows do not divide evenly.
        """
        latent = world_size if latent is None else latent
        if latent < 1 or world_size % latent:
            fits = [n for n in range(1, world_size + 1) if world_size % n == 0]
            raise SteersmanError(
                f"latent_shards = {latent} does not divide the {world_size} ranks of the job; use one of "
                f"{', '.join(map(str, fits))}, or start another number of ranks"
            )
        for name, value in (("d_sae", d_sae), ("batch_size", batch_size)):
            if value % world_size:
                below, above = value // world_size * world_size, -(-value // world_size) * world_size
                nearest = f"{below} or {above}" if below else f"{above}"
                raise SteersmanError(f"{name} = {value} cannot be split over {world_size} ranks; use {nearest}")
        return cls(data=world_size // latent, latent=latent, rank=rank)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.data * self.latent

    @property
    def data_index(self) -> int:
        """Which replica this rank belongs to."""
        return self.rank // self.latent

    @property
    def latent_index(self) -> int:
        """Which part of the latents this rank holds."""
        return self.rank % self.latent

    def local_latents(self, d_sae: int) -> tuple[int, int]:
        """First and end latent whose weights this rank holds and computes with."""
        size = d_sae // self.latent
        return self.latent_index * size, (self.latent_index + 1) * size

    def owned_latents(self, d_sae: int) -> tuple[int, int]:
        """First and end latent that this rank updates: its part, among the replicas, of `local_latents`."""
        size = d_sae // self.world_size
        start = self.local_latents(d_sae)[0] + self.data_index * size
        return start, start + size


def rank_and_world_size() -> tuple[int, int]:
    """Rank and number of ranks, as `torchrun` (or whatever set RANK and WORLD_SIZE) tells them; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    try:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise SteersmanError("RANK and WORLD_SIZE in the environment must be numbers; start with torchrun") from None
    if not 0 <= rank < world_size:
        raise SteersmanError(f"RANK {rank} is not below WORLD_SIZE {world_size}; start the ranks with torchrun")
    return rank, world_size


def use_local_accelerator() -> None:
    """Make `cuda` mean the device that LOCAL_RANK names, so that the ranks of one machine use one each."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[None]:
    """The process group of all ranks of the job: one made here, or the program's own if it has made one."""
    if dist.is_initialized():
        yield
        return
    use_local_accelerator()
    with comm_errors():
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield
    finally:
        dist.destroy_process_group()


class RankGroup:
    """Some ranks of the job and what they can do together. With one rank everything is done by doing nothing.

    Every collective here is called by all ranks of the group in the same order. When a rank is lost or does not answer
    in time, the others raise a `LostRankError` that says so.
    """

    def __init__(self, size: int = 1, index: int = 0, group: Any = None):
        self.size, self.index, self.group = size, index, group

    def all_reduce_sum_(self, x: Tensor) -> Tensor:
        """x becomes its sum over the ranks, the same bits on each."""
        return self._all_reduce_(x, dist.ReduceOp.SUM)

    def all_reduce_max_(self, x: Tensor) -> Tensor:
        """x becomes its largest over the ranks, element by element."""
        return self._all_reduce_(x, dist.ReduceOp.MAX)

    def all_reduce_min_(self, x: Tensor) -> Tensor:
        """x becomes its smallest over the ranks, element by element."""
        return self._all_reduce_(x, dist.ReduceOp.MIN)

    def _all_reduce_(self, x: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            with comm_errors():
                dist.all_reduce(x, op=op, group=self.group)
        return x

    def max_later(self, x: Tensor) -> Any:
        """Start `all_reduce_max_` of a group of several ranks; the returned handle's `wait` ends it."""
        with comm_errors():
            return dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, [...] -> [size, ...]."""
        return self.all_gather_later(x)()

    def all_gather_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Start `all_gather` and return the function that waits for it, so that work can go on meanwhile."""
        if self.size == 1:
            return lambda: x[None]
        x = x.contiguous()
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        with comm_errors():  # as bytes, since not every backend knows every type
            work: Any = _all_gather(
                out.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8), group=self.group, async_op=True
            )

        def finish() -> Tensor:
            with comm_errors():
                work.wait()
            return out

        return finish

    def reduce_scatter_sum(self, rows: Tensor) -> Tensor:
        """rows [size * n, ...] of every rank -> the sum over ranks of this rank's part of them, [n, ...].

        The ranks' parts are added in order of rank, so that the sum is the same in every run.
        """
        if self.size == 1:
            return rows
        rows = rows.contiguous()
        with comm_errors():
            if rows.device.type != "cpu":
                out = torch.empty((len(rows) // self.size, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
                _reduce_scatter(out, rows, group=self.group)
                return out
            # Gloo's own reduce-scatter is an all-reduce, which sends twice as much.
            parts = torch.empty_like(rows)
            dist.all_to_all_single(parts, rows, group=self.group)
        return parts.view(self.size, len(rows) // self.size, *rows.shape[1:]).sum(dim=0)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            self.all_reduce_sum_(torch.zeros(1, device=self._device))

    @property
    def _device(self) -> torch.device:
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


@contextmanager
def comm_errors() -> Iterator[None]:
    """Turn what a collective raises when another rank is gone or silent into one clear error."""
    try:
        yield
    except (SteersmanError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        rank, world_size = rank_and_world_size()
        timed_out = "imed out" in str(error) or "timeout" in str(error).lower()
        what = "another rank did not answer in time" if timed_out else "the connection to another rank was lost"
        raise LostRankError(
            f"rank {rank} of {world_size}: {what} (it was killed, hangs or met an error of its own); this rank ends "
            "too. Run the same command again to resume from what is saved"
        ) from error


class Ranks:
    """The process groups of a mesh, whose ranks are the first of the job.

    They are the `latent` and `data` axes, `world` (all ranks), `control`, which works on the CPU, and `background`, a
    group of its own for the thread that writes checkpoints.

    Use as a context manager. `Ranks(Mesh())` is one process and needs no process group.
    """

    def __init__(self, mesh: Mesh, timeout_seconds: float = 600.0):
        self.mesh = mesh
        self.latent = self.data = self.world = self.control = self.background = RankGroup()
        self._stack = ExitStack()
        if mesh.world_size == 1:
            return
        self.timeout = timedelta(seconds=timeout_seconds)
        self._stack.enter_context(process_group(timeout_seconds))
        every = list(range(mesh.world_size))
        self.latent = self._group([every[d * mesh.latent : (d + 1) * mesh.latent] for d in range(mesh.data)])
        self.data = self._group([every[i :: mesh.latent] for i in range(mesh.latent)])
        self.world = self._group([every])
        self.control = self._group([every], "gloo")
        self.background = self._group([every], "gloo")

    def _group(self, groups: list[list[int]], backend: str | None = None) -> RankGroup:
        mine = RankGroup()
        for members in groups:  # every rank makes every group, in the same order
            if len(members) == 1:
                continue
            with comm_errors():
                # The others of a job that does more than this mesh know nothing of its groups.
                alone = self.mesh.world_size < dist.get_world_size()
                group = dist.new_group(members, timeout=self.timeout, backend=backend, use_local_synchronization=alone)
            if self.mesh.rank in members:
                mine = RankGroup(len(members), members.index(self.mesh.rank), group)
        return mine

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the rank that writes what there is one of."""
        return self.mesh.rank == 0

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 while the others wait. What it returns (something that can be pickled) is returned on
        all of them; its SteersmanError is raised on all of them."""
        if self.mesh.world_size == 1:
            return action()
        answer: list[Any] = [None, None]
        if self.is_rank_zero:
            try:
                answer = [action(), None]
            except UnfinishedError:  # the others lose the connection, and end as unfinished too
                raise
            except SteersmanError as error:
                answer = [None, str(error)]
        with comm_errors():
            dist.broadcast_object_list(answer, src=0, group=self.control.group)
        if answer[1] is not None:
            raise SteersmanError(answer[1])
        return answer[0]

    def on_every_rank(self, action: Callable[[], object]) -> None:
        """Run `action` on every rank and wait for all. A SteersmanError of one of them is raised on all."""
        if self.mesh.world_size == 1:
            action()
            return
        mistake: SteersmanError | None = None
        try:
            action()
        except UnfinishedError:
            raise
        except SteersmanError as error:
            mistake = error
        said: list[Any] = [None] * self.mesh.world_size
        with comm_errors():
            dist.all_gather_object(said, None if mistake is None else str(mistake), group=self.control.group)
        if mistake is not None:
            raise mistake
        if elsewhere := [message for message in said if message is not None]:
            raise SteersmanError(elsewhere[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """While it is entered, SIGTERM raises a `PreemptedError` at once, for work that loses little when it is cut short.

    A handler that the program set itself is left alone, and so is all outside the main thread.
    """

    def end(*_: object) -> None:
        raise PreemptedError("asked to end")

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
