"""Training straight from the model on several processes: the last `model_ranks` of them run it, the others train.

Which rows make a batch follows from the tokens of the text. So every model rank tokenizes all of it and knows the order
of all rows, runs the model over every M-th forward batch, and holds that part of the shuffling buffer. The first
trainer asks for a batch; each model rank then sends each trainer those rows of the trainer's part that it has. Put
together, they are the batch that one process would have made, bit for bit, whatever the numbers of ranks.

A model rank computes ahead at most half a buffer more than was asked for and sends nothing that was not; a trainer
reads two batches ahead. The faster side waits for the slower one, and memory stays bounded. Activations travel from GPU
to GPU where every rank has one of its own, else through host memory; neither side's device waits for the other's.

Shape letters: N rows of a trainer's part of a batch, D width, T trainers, M model ranks.
"""

import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steersman.errors import LostRankError, PreemptedError, SteersmanError
from steersman.lm.hooks import several_hooks
from steersman.parallel import RankGroup, comm_errors, process_group, rank_and_world_size, use_local_accelerator
from steersman.train.capture.capture import in_background
from steersman.train.capture.stream import ActivationStream
from steersman.train.capture.stream_rows import StreamRows, batch_of
from steersman.train.mesh.preemption import Preemption
from steersman.train.mesh.wires import Wire, from_gpu_to_gpu, gpu_of
from steersman.train.store.batch import ActivationBatch, ActivationSource, batches_in
from steersman.train.store.statistics import ActivationStats, stats_side_by_side

_FACTS, _BUSY, _FAILED, _END = -1, -2, -3, -4
"""What stands in the head of a message in place of a number of rows."""
_UNRECEIVED = 2
"""Batches that a model rank has under way to the trainers."""


@contextmanager
def stream_from_model_ranks(
    make_stream: Callable[[], ActivationSource],
    n_model_ranks: int,
    timeout_seconds: float,
    device: torch.device,
) -> "Iterator[RemoteStream | None]":
    """The stream that the last `n_model_ranks` of the job make, for the block in which the other ranks train on it, on
    `device`.

    Called by all ranks. Those that run the model call `make_stream`, serve the trainers to their end, and get None.
    """
    rank, n_ranks = rank_and_world_size()
    n_trainers = n_ranks - n_model_ranks
    if n_trainers < 1:
        raise SteersmanError(
            f"model_ranks = {n_model_ranks} leaves none of the {n_ranks} ranks of the job to train; start more "
            "with torchrun, or use fewer"
        )
    with process_group(timeout_seconds):
        timeout = timedelta(seconds=timeout_seconds)
        with comm_errors():
            group = dist.new_group(backend="gloo", timeout=timeout)
        control = Wire(group, torch.device("cpu"))
        channel = _Channel(control, _wire_of_rows(control, device, timeout), n_trainers, n_model_ranks)
        if rank >= n_trainers:
            with ThreadPoolExecutor(1, "steersman-model", initializer=use_local_accelerator) as pool:
                _ModelRank(channel, make_stream, pool, timeout_seconds).serve()
            yield None
        else:
            with RemoteStream(channel) as source:
                yield source
        RankGroup(n_ranks, rank, group).barrier()


def _wire_of_rows(control: Wire, device: torch.device, timeout: timedelta) -> Wire:
    """What activations travel on. All ranks choose together."""
    gpus: list[str | None] = [None] * dist.get_world_size()
    with comm_errors():
        dist.all_gather_object(gpus, gpu_of(device), group=control.group)
        if not from_gpu_to_gpu(gpus):
            return control
        return Wire(dist.new_group(backend="nccl", timeout=timeout), device)


class _Head(NamedTuple):
    """What every message of a model rank begins with."""

    reading: int
    """Which call of `batches` it answers."""
    n: int
    """Rows of the trainer's part of the batch, or one of the words above."""
    here: int
    """How many of them this model rank sends, [here, D]; of other words, the bytes that follow."""
    preempted: int
    """Whether the rank was asked to end."""


class _Channel:
    """The messages between trainers and model ranks."""

    def __init__(self, control: Wire, rows: Wire, n_trainers: int, n_model_ranks: int) -> None:
        self.control, self.rows, self.group, self.rank = control, rows, control.group, dist.get_rank()
        self.trainers = range(n_trainers)
        self.model_ranks = range(n_trainers, n_trainers + n_model_ranks)

    def broadcast(self, *request: Any) -> None:
        """Send a request from rank 0 to all model ranks; the other trainers send nothing."""
        if self.rank == 0:
            with comm_errors():
                for model_rank in self.model_ranks:
                    dist.send_object_list([request], dst=model_rank, group=self.group)

    def receive_request(self) -> tuple[Any, ...]:
        """The next request of rank 0."""
        found: list[Any] = [None]
        with comm_errors():
            dist.recv_object_list(found, src=0, group=self.group)
        return found[0]


# The model's side


class _ModelRank:
    """Runs the model ahead of what the trainers ask for and answers them."""

    def __init__(
        self, channel: _Channel, make_stream: Callable[[], ActivationSource], pool: ThreadPoolExecutor, timeout: float
    ) -> None:
        self._channel, self._pool, self._make, self._timeout = channel, pool, make_stream, timeout
        self._part = channel.rank - channel.model_ranks.start
        self._stream: ActivationStream | None = None
        self._reading = 0
        self._batches: Generator[list[StreamRows]] | None = None
        self._ahead: deque[Future[list[StreamRows] | None]] = deque()
        self._sent: deque[list[Callable[[], Any]]] = deque()
        self._preempted = False

    def serve(self) -> None:
        """Answer until the trainers have ended; their error is raised here too."""
        with Preemption(RankGroup()) as preemption, ExitStack() as stack:
            stack.callback(self._abandon)
            while True:
                what, *rest = self._channel.receive_request()
                self._preempted = preemption.now()
                if what == "end":
                    if rest:
                        kind, message = rest
                        kinds = {"PreemptedError": PreemptedError, "KeyboardInterrupt": KeyboardInterrupt}
                        raise kinds.get(kind, SteersmanError)(message)
                    return
                try:
                    {"facts": self._send_facts, "read": self._read, "next": self._next, "stop": self._stop}[what](*rest)
                except LostRankError:
                    raise
                except SteersmanError as error:
                    self._reply(_FAILED, str(error).encode())

    def _send_facts(self) -> None:
        stream = self._await(self._pool.submit(self._make), count().__next__)
        if not isinstance(stream, ActivationStream):
            raise SteersmanError("model_ranks is for training straight from a model; a store needs no model to run")
        self._stream = stream
        stream.run_part(self._part, len(self._channel.model_ranks))
        facts = self._await(self._pool.submit(_facts_of, stream, self._part == 0), lambda: stream.n_passed)
        self._reply(_FACTS, pickle.dumps(facts))

    def _read(self, reading: int, world_size: int, options: dict[str, Any]) -> None:
        assert self._stream is not None
        self._reading, self._batches = reading, self._splits(self._stream, world_size, options)
        for _ in range(max(self._stream.buffer_rows // 2 // options["batch_size"], _UNRECEIVED)):
            self._ahead.append(self._pool.submit(next, self._batches, None))

    def _splits(
        self, stream: ActivationStream, world_size: int, options: dict[str, Any]
    ) -> Generator[list[StreamRows]]:
        """Of each batch, what every trainer is to know and to get from here."""
        for rows in stream.whole_batches(**options):
            sendable = replace(rows, x=self._channel.rows.ready(rows.x))
            yield sendable.splits(len(self._channel.trainers), world_size)

    def _next(self) -> None:
        stream, batches = self._stream, self._batches
        assert stream is not None
        assert batches is not None
        splits = self._await(self._ahead.popleft(), lambda: stream.n_passed)
        self._ahead.append(self._pool.submit(next, batches, None))
        if splits is None:
            self._reply(_END)
            return
        sending, channel = [], self._channel
        for trainer, rows in zip(channel.trainers, splits):
            sending.append(_send(channel.control, self._head(len(rows), len(rows.x)), trainer))
            if self._part == 0 and len(rows):
                info = np.ascontiguousarray(rows.info)
                sending.append(_send(channel.control, torch.from_numpy(info), trainer))
            if rows.x.numel():
                sending.append(_send(channel.rows, rows.x, trainer))
        self._under_way(sending)

    def _stop(self) -> None:
        self._abandon()
        self._reply(_END)

    def _abandon(self) -> None:
        """Stop computing what was being read."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        if self._batches is not None:
            self._pool.submit(self._batches.close)
            self._batches = None

    def _await(self, future: "Future[Any]", progress: Callable[[], int]) -> Any:
        """What `future` gives. Meanwhile the trainers are sent BUSY, while `progress` shows that the work advances."""
        seen = None
        while True:
            try:
                return future.result(timeout=self._timeout / 4)
            except TimeoutError:
                if future.done():
                    raise
                if (now := progress()) != seen:
                    seen = now
                    self._reply(_BUSY)

    def _reply(self, word: int, content: bytes = b"") -> None:
        sending, control = [], self._channel.control
        for trainer in self._channel.trainers:
            sending.append(_send(control, self._head(word, len(content)), trainer))
            if content:
                sending.append(_send(control, torch.frombuffer(bytearray(content), dtype=torch.uint8), trainer))
        self._under_way(sending)

    def _head(self, n: int, here: int) -> Tensor:
        return torch.tensor(_Head(self._reading, n, here, int(self._preempted)))

    def _under_way(self, sending: list[Callable[[], Any]]) -> None:
        self._sent.append(sending)
        while len(self._sent) > _UNRECEIVED:
            for finish in self._sent.popleft():
                with suppress(LostRankError):  # see `_send`
                    finish()


def _send(wire: Wire, tensor: Tensor, trainer: int) -> Callable[[], Any]:
    """See `Wire.send`. A trainer that is gone gets nothing: why they end is for the first of them to say, which may
    come later, and if that one is gone too, its next request is what is lost."""
    try:
        return wire.send(tensor, trainer)
    except LostRankError:
        return lambda: None


@dataclass(frozen=True)
class _Facts:
    """What trainers must know of a stream; its numbers from one model rank are enough."""

    names: dict[str, str]
    """What the hook points were called when the stream was asked for -> their canonical names."""
    widths: dict[str, int]
    """Those of the hook points, by their canonical names, in their order."""
    model_name: str
    dtype: torch.dtype
    fingerprint: str
    contents: dict[str, str]
    rows: dict[str, int | None]
    stats: dict[str, ActivationStats]


def _facts_of(stream: ActivationStream, all_of_them: bool) -> _Facts:
    rows = {split: stream.n_batches(1, split=split) for split in ("train", "heldout")} if all_of_them else {}
    return _Facts(
        names={str(name): hook for name, hook in zip(several_hooks(stream.config.hook), stream.hooks)},
        widths={hook: stream.width(hook) for hook in stream.hooks},
        model_name=stream.model_name,
        dtype=stream.dtype,
        fingerprint=stream.fingerprint,
        contents=stream.contents() if all_of_them else {},
        rows=rows,
        stats={hook: stream.stats(hook) for hook in stream.hooks} if all_of_them else {},
    )


# The trainers' side


class RemoteStream:
    """A stream that other ranks of the job make: an `ActivationSource` of those that train.

    Use as a context manager: leaving it ends the model ranks, with the same error if there is one.
    """

    def __init__(self, channel: _Channel) -> None:
        self._channel, self._reading = channel, 0
        self._open: Generator[ActivationBatch] | None = None
        self.preempted = False
        """Whether a model rank was asked to end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._close()
        if error is None:
            self._channel.broadcast("end")
        elif isinstance(error, SteersmanError | KeyboardInterrupt) and not isinstance(error, LostRankError):
            with suppress(LostRankError):  # this error is the one to be seen
                self._channel.broadcast("end", type(error).__name__, str(error))

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None

    @cached_property
    def _facts(self) -> _Facts:
        self._channel.broadcast("facts")
        found: list[_Facts] = []
        for model_rank in self._channel.model_ranks:
            n = self._head(model_rank).here
            found.append(pickle.loads(self._channel.control.receive(model_rank, (n,), torch.uint8).numpy().tobytes()))
            if found[-1].fingerprint != found[0].fingerprint:
                first = self._channel.model_ranks.start
                raise SteersmanError(
                    f"rank {model_rank} has another model, text or settings than rank {first}: all model ranks must "
                    "see the same"
                )
        return found[0]

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hook points, by their canonical names."""
        return tuple(self._facts.widths)

    @property
    def hook_name(self) -> str:
        """That of the stream."""
        return "+".join(self.hooks)

    def resolve_hook(self, hook: str) -> str:
        """The canonical name of one of the hook points; any other as it is."""
        return self._facts.names.get(hook, hook)

    def width(self, hook: str) -> int:
        """Width of one of the hook points."""
        return self._facts.widths[hook]

    @property
    def model_name(self) -> str:
        """The model that runs."""
        return self._facts.model_name

    @property
    def d_in(self) -> int:
        """Width D of a row."""
        return sum(self._facts.widths.values())

    @property
    def fingerprint(self) -> str:
        """That of the stream."""
        return self._facts.fingerprint

    def contents(self) -> dict[str, str]:
        """Those of the stream."""
        return self._facts.contents

    def stats(self, hook: str | None = None) -> ActivationStats:
        """Those of the stream."""
        found = self._facts.stats
        return stats_side_by_side(list(found.values())) if hook is None else found[self.resolve_hook(hook)]

    def n_batches(
        self, batch_size: int, *, split: str = "train", heldout_fraction: float = 0.05, drop_last: bool = True
    ) -> int | None:
        """As of the stream."""
        rows = self._facts.rows[split]
        return None if rows is None else batches_in(rows, batch_size, drop_last)

    def batches(
        self,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        **reading: Any,
    ) -> Iterator[ActivationBatch]:
        """The stream's batches, on the CPU or on the GPU that they were sent to. All trainers call this together; which
        rows are this one's follows from `world_size`; see `StreamRows.splits`. Ends what was read before."""
        assert rank == self._channel.rank * world_size // len(self._channel.trainers)
        self._close()
        self._reading += 1
        self._channel.broadcast("read", self._reading, world_size, {"batch_size": batch_size, **reading})
        self._open = self._received()
        return self._open

    def _received(self) -> Generator[ActivationBatch]:
        receiver = ThreadPoolExecutor(1, "steersman-receive", initializer=use_local_accelerator)
        try:
            yield from in_background(self._receive(), receiver, ahead=2)
        finally:  # other trainers may wait for a batch that the first one no longer asks for
            self._channel.broadcast("stop")

    def _receive(self) -> Iterator[ActivationBatch]:
        channel, first = self._channel, self._channel.model_ranks.start
        while True:
            channel.broadcast("next")
            heads = [self._head(model_rank) for model_rank in channel.model_ranks]
            n = heads[0].n
            if n == _END:
                return
            info = channel.control.receive(first, (n, 5), torch.int64).numpy()
            x = channel.rows.empty((n, self.d_in), self._facts.dtype)
            for part, (model_rank, head) in enumerate(zip(channel.model_ranks, heads)):
                rows = channel.rows.receive(model_rank, (head.here, self.d_in), x.dtype)
                with channel.rows.beside():
                    x.index_copy_(0, torch.from_numpy(np.flatnonzero(info[:, 4] == part)).to(x.device), rows)
            yield batch_of(channel.rows.arrived(x), info)

    def _head(self, model_rank: int) -> _Head:
        """The head of this reading's next message; what is still on its way from one that was closed is passed over."""
        channel = self._channel
        while True:
            head = _Head(*channel.control.receive(model_rank, (4,), torch.int64).tolist())
            self.preempted = self.preempted or bool(head.preempted)
            if head.n == _FAILED:
                message = channel.control.receive(model_rank, (head.here,), torch.uint8)
                raise SteersmanError(message.numpy().tobytes().decode())
            if head.reading == self._reading and head.n != _BUSY:
                return head
            if head.n > 0:
                if model_rank == channel.model_ranks.start:
                    channel.control.receive(model_rank, (head.n, 5), torch.int64)
                channel.rows.receive(model_rank, (head.here, self.d_in), self._facts.dtype)
