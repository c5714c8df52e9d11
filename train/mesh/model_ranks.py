"""Training straight from the model on several processes: the last `model_ranks` of them run it, the others train.

Which rows make a batch follows from the tokens of the text. So every model rank tokenizes all of it and knows the order
of all rows, runs the model over every M-th forward batch, and holds that part of the shuffling buffer. The first
trainer asks for a batch; each model rank then sends each trainer those rows of the trainer's share that it has. Put
together, they are the batch that one process would have made, bit for bit, whatever the numbers of ranks.

A model rank computes ahead at most half a buffer more than was asked for and sends nothing that was not; a trainer
reads two batches ahead. The faster side waits for the slower one, and memory stays bounded. Activations travel through
host memory (gloo), so that neither side's device waits for the other's.

Shape letters: N rows of a trainer's share of a batch, D width, T trainers, M model ranks.
"""

import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from steersman.device import pick_device
from steersman.errors import LostRankError, PreemptedError, SteersmanError
from steersman.parallel import RankGroup, comm_errors, process_group, rank_and_world_size, use_local_accelerator
from steersman.sae import SAE
from steersman.train.capture.capture import in_background
from steersman.train.capture.stream import ActivationStream
from steersman.train.capture.stream_rows import StreamRows, batch_of
from steersman.train.mesh.cluster import train_on_ranks
from steersman.train.run.preemption import Preemption
from steersman.train.run.recipe import TrainConfig
from steersman.train.run.trainer import train_alone
from steersman.train.store.batch import ActivationBatch, ActivationSource
from steersman.train.store.statistics import ActivationStats

_FACTS, _BUSY, _FAILED, _END = -1, -2, -3, -4
"""What the head of a message says in place of a number of rows."""
_UNRECEIVED = 2
"""Batches that a model rank has under way to the trainers."""


def train_from_model_ranks(make_stream: Callable[[], ActivationSource], config: TrainConfig, out: Path) -> SAE:
    """See `train_sae`. Called by all ranks of the job; `make_stream` by the model ranks alone."""
    rank, n_ranks = rank_and_world_size()
    n_trainers = n_ranks - config.model_ranks
    if n_trainers < 1:
        raise SteersmanError(
            f"model_ranks = {config.model_ranks} leaves none of the {n_ranks} ranks of the job to train; start more "
            "with torchrun, or use fewer"
        )
    with process_group(config.timeout_seconds):
        with comm_errors():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_seconds))
        line = _Line(group, n_trainers, config.model_ranks)
        if rank >= n_trainers:
            with ThreadPoolExecutor(1, "steersman-model", initializer=use_local_accelerator) as pool:
                _ModelRank(line, make_stream, pool, config.timeout_seconds).serve()
        else:
            with RemoteStream(line) as source:
                if n_trainers == 1:
                    train_alone(source, config, out)
                else:
                    train_on_ranks(source, config, out, rank, n_trainers)
        RankGroup(n_ranks, rank, group).barrier()
    return SAE.load(out, pick_device(config.device) if rank == 0 else "cpu")


class _Head(NamedTuple):
    """What every message of a model rank begins with."""

    reading: int
    """Which call of `batches` it answers."""
    n: int
    """Rows of the trainer's share of the batch, or one of the words above."""
    here: int
    """How many of them this model rank sends, [here, D]; of other words, the bytes that follow."""
    preempted: int
    """Whether the rank was asked to end."""


class _Line:
    """What trainers and model ranks say to one another."""

    def __init__(self, group: Any, n_trainers: int, n_model_ranks: int) -> None:
        self.group, self.rank = group, dist.get_rank()
        self.trainers = range(n_trainers)
        self.model_ranks = range(n_trainers, n_trainers + n_model_ranks)

    def tell(self, *request: Any) -> None:
        """From the first trainer to all model ranks; the other trainers say nothing."""
        if self.rank == 0:
            with comm_errors():
                for model_rank in self.model_ranks:
                    dist.send_object_list([request], dst=model_rank, group=self.group)

    def hear(self) -> tuple[Any, ...]:
        """What the first trainer tells."""
        found: list[Any] = [None]
        with comm_errors():
            dist.recv_object_list(found, src=0, group=self.group)
        return found[0]

    def send(self, x: Tensor, to: int) -> Callable[[], Any]:
        """Begin to send a tensor; the returned function waits until it is taken."""
        x = x.contiguous()
        with comm_errors():
            work: Any = dist.isend(x.view(torch.uint8), dst=to, group=self.group)

        def finish() -> Tensor:
            with comm_errors():
                work.wait()
            return x  # held until here

        return finish

    def receive(self, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor from a rank."""
        x = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
        if x.numel():
            with comm_errors():
                dist.recv(x.view(torch.uint8), src=source, group=self.group)
        return x


# The model's side


class _ModelRank:
    """Runs the model ahead of what the trainers ask for and answers them."""

    def __init__(
        self, line: _Line, make_stream: Callable[[], ActivationSource], pool: ThreadPoolExecutor, timeout: float
    ) -> None:
        self._line, self._pool, self._make, self._timeout = line, pool, make_stream, timeout
        self._part = line.rank - line.model_ranks.start
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
                what, *rest = self._line.hear()
                self._preempted = preemption.now()
                if what == "end":
                    if rest:
                        kind, message = rest
                        raise (PreemptedError if kind == "PreemptedError" else SteersmanError)(message)
                    return
                try:
                    {"facts": self._tell_facts, "read": self._read, "next": self._next, "stop": self._stop}[what](*rest)
                except LostRankError:
                    raise
                except SteersmanError as error:
                    self._say(_FAILED, str(error).encode())

    def _tell_facts(self) -> None:
        stream = self._await(self._pool.submit(self._make), count().__next__)
        if not isinstance(stream, ActivationStream):
            raise SteersmanError("model_ranks is for training straight from a model; a store needs no model to run")
        self._stream = stream
        stream.run_part(self._part, len(self._line.model_ranks))
        facts = self._await(self._pool.submit(_facts_of, stream, self._part == 0), lambda: stream.n_passed)
        self._say(_FACTS, pickle.dumps(facts))

    def _read(self, reading: int, world_size: int, options: dict[str, Any]) -> None:
        assert self._stream is not None
        self._reading, self._batches = reading, self._shares(self._stream, world_size, options)
        for _ in range(max(self._stream.buffer_rows // 2 // options["batch_size"], _UNRECEIVED)):
            self._ahead.append(self._pool.submit(next, self._batches, None))

    def _shares(
        self, stream: ActivationStream, world_size: int, options: dict[str, Any]
    ) -> Generator[list[StreamRows]]:
        """Of each batch, what every trainer is to know and to get from here."""
        for rows in stream.whole_batches(**options):
            on_host = replace(rows, x=rows.x.cpu())
            yield on_host.shares(len(self._line.trainers), world_size)

    def _next(self) -> None:
        stream, batches = self._stream, self._batches
        assert stream is not None
        assert batches is not None
        shares = self._await(self._ahead.popleft(), lambda: stream.n_passed)
        self._ahead.append(self._pool.submit(next, batches, None))
        if shares is None:
            self._say(_END)
            return
        sending = []
        for trainer, share in zip(self._line.trainers, shares):
            sending.append(self._line.send(self._head(len(share), len(share.x)), trainer))
            parts = [torch.from_numpy(share.info)] if self._part == 0 else []
            sending += [self._line.send(part, trainer) for part in [*parts, share.x] if part.numel()]
        self._under_way(sending)

    def _stop(self) -> None:
        self._abandon()
        self._say(_END)

    def _abandon(self) -> None:
        """Stop computing what was being read."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        if self._batches is not None:
            self._pool.submit(self._batches.close)
            self._batches = None

    def _await(self, future: "Future[Any]", signs: Callable[[], int]) -> Any:
        """What `future` gives. Meanwhile the trainers are told now and then to be patient, while `signs` change."""
        seen = None
        while True:
            try:
                return future.result(timeout=self._timeout / 4)
            except TimeoutError:
                if future.done():
                    raise
                if (now := signs()) != seen:
                    seen = now
                    self._say(_BUSY)

    def _say(self, word: int, content: bytes = b"") -> None:
        sending = []
        for trainer in self._line.trainers:
            sending.append(self._line.send(self._head(word, len(content)), trainer))
            if content:
                sending.append(self._line.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), trainer))
        self._under_way(sending)

    def _head(self, n: int, here: int) -> Tensor:
        return torch.tensor(_Head(self._reading, n, here, int(self._preempted)))

    def _under_way(self, sending: list[Callable[[], Any]]) -> None:
        self._sent.append(sending)
        while len(self._sent) > _UNRECEIVED:
            for finish in self._sent.popleft():
                finish()


@dataclass(frozen=True)
class _Facts:
    """What trainers must know of a stream; its numbers from one model rank are enough."""

    hook_name: str
    model_name: str
    d_in: int
    dtype: torch.dtype
    fingerprint: str
    rows: dict[str, int | None]
    stats: ActivationStats | None


def _facts_of(stream: ActivationStream, all_of_them: bool) -> _Facts:
    rows = {split: stream.n_batches(1, split=split) for split in ("train", "heldout")} if all_of_them else {}
    return _Facts(
        hook_name=stream.hook_name,
        model_name=stream.model_name,
        d_in=stream.d_in,
        dtype=stream.dtype,
        fingerprint=stream.fingerprint,
        rows=rows,
        stats=stream.stats() if all_of_them else None,
    )


# The trainers' side


class RemoteStream:
    """A stream that other ranks of the job make: an `ActivationSource` of those that train.

    Use as a context manager: leaving it ends the model ranks, with the same error if there is one.
    """

    def __init__(self, line: _Line) -> None:
        self._line, self._reading = line, 0
        self._open: Generator[ActivationBatch] | None = None
        self.preempted = False
        """Whether a model rank was asked to end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._close()
        if error is None:
            self._line.tell("end")
        elif isinstance(error, SteersmanError) and not isinstance(error, LostRankError):
            with suppress(LostRankError):  # this error is the one to be seen
                self._line.tell("end", type(error).__name__, str(error))

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None

    @cached_property
    def _facts(self) -> _Facts:
        self._line.tell("facts")
        found: list[_Facts] = []
        for model_rank in self._line.model_ranks:
            n = self._head(model_rank).here
            found.append(pickle.loads(self._line.receive(model_rank, (n,), torch.uint8).numpy().tobytes()))
            if found[-1].fingerprint != found[0].fingerprint:
                raise SteersmanError(
                    f"rank {model_rank} has another model, text or settings than rank {self._line.model_ranks.start}: "
                    "all model ranks must see the same"
                )
        return found[0]

    @property
    def hook_name(self) -> str:
        """The hook point, by its canonical name."""
        return self._facts.hook_name

    @property
    def model_name(self) -> str:
        """The model that runs."""
        return self._facts.model_name

    @property
    def d_in(self) -> int:
        """Width D of the hook point."""
        return self._facts.d_in

    @property
    def fingerprint(self) -> str:
        """That of the stream."""
        return self._facts.fingerprint

    def stats(self) -> ActivationStats:
        """Those of the stream."""
        assert self._facts.stats is not None
        return self._facts.stats

    def n_batches(
        self, batch_size: int, *, split: str = "train", heldout_fraction: float = 0.05, drop_last: bool = True
    ) -> int | None:
        """As of the stream."""
        rows = self._facts.rows[split]
        return None if rows is None else rows // batch_size if drop_last else -(-rows // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        **reading: Any,
    ) -> Iterator[ActivationBatch]:
        """The stream's batches, on the CPU. All trainers call this together; which rows are this one's follows from
        `world_size`; see `StreamRows.shares`. Ends what was read before."""
        assert rank == self._line.rank * world_size // len(self._line.trainers)
        self._close()
        self._reading += 1
        self._line.tell("read", self._reading, world_size, {"batch_size": batch_size, **reading})
        self._open = self._received()
        return self._open

    def _received(self) -> Generator[ActivationBatch]:
        receiver = ThreadPoolExecutor(1, "steersman-receive", initializer=use_local_accelerator)
        try:
            yield from in_background(self._receive(), receiver, ahead=2)
        finally:  # other trainers may wait for a batch that the first one no longer asks for
            self._line.tell("stop")

    def _receive(self) -> Iterator[ActivationBatch]:
        line, first = self._line, self._line.model_ranks.start
        while True:
            line.tell("next")
            heads = [self._head(model_rank) for model_rank in line.model_ranks]
            n = heads[0].n
            if n == _END:
                return
            info = line.receive(first, (n, 5), torch.int64).numpy()
            x = torch.empty(n, self.d_in, dtype=self._facts.dtype, pin_memory=torch.cuda.is_available())
            for part, (model_rank, head) in enumerate(zip(line.model_ranks, heads)):
                rows = line.receive(model_rank, (head.here, self.d_in), x.dtype)
                x[torch.from_numpy(info[:, 4] == part)] = rows
            yield batch_of(x, info)

    def _head(self, model_rank: int) -> _Head:
        """The head of this reading's next message; what is still on its way from one that was closed is passed over."""
        line = self._line
        while True:
            head = _Head(*line.receive(model_rank, (4,), torch.int64).tolist())
            self.preempted = self.preempted or bool(head.preempted)
            if head.n == _FAILED:
                message = line.receive(model_rank, (head.here,), torch.uint8)
                raise SteersmanError(message.numpy().tobytes().decode())
            if head.reading == self._reading and head.n != _BUSY:
                return head
            if head.n > 0:
                if model_rank == line.model_ranks.start:
                    line.receive(model_rank, (head.n, 5), torch.int64)
                line.receive(model_rank, (head.here, self.d_in), self._facts.dtype)
