"""Run a function in several processes that form one job, as torchrun would start them."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "matplotlib.figure",
        "transformers.models.llama.modeling_llama",
        "steersman.train.mesh.model_ranks",
    ]
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _enter(rank: int, n: int, port: int, out: Connection, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "STEERSMAN_PROGRESS": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOKENIZERS_PARALLELISM": "false"}
    try:
        out.send_bytes(pickle.dumps((True, job(*args))))
    except BaseException as error:
        out.send_bytes(pickle.dumps((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")))
    finally:
        out.close()


@contextmanager
def as_rank(rank: int, n: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block runs as rank `rank` of n, in this process."""
    with monkeypatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n}.items():
            patch.setenv(name, str(value))
        yield


def start_ranks(n: int, job: Callable[..., Any], *args: Any) -> list[tuple[Any, Connection]]:
    """Start n processes that call `job(*args)`; (process, connection to its answer) of each."""
    port, started = free_port(), []
    for rank in range(n):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_enter, args=(rank, n, port, there, job, args), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    return started


def answers(started: list[tuple[Any, Connection]], timeout: float = 100.0) -> list[tuple[bool, Any]]:
    """(whether it went well, what was returned or the error's text) of each process; None when it was killed."""
    found: list[tuple[bool, Any]] = []
    for _, here in started:
        try:
            found.append(pickle.loads(here.recv_bytes()) if here.poll(timeout) else (False, "no answer in time"))
        except EOFError:
            found.append((False, "killed"))
    for process, _ in started:
        process.join(10)
        process.kill()
    return found


def run_ranks(n: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What `job(*args)` returns in each of n processes that form one job; the first error of any is raised."""
    found = answers(start_ranks(n, job, *args))
    for rank, (ok, value) in enumerate(found):
        assert ok, f"rank {rank} of {n}: {value}"
    return [value for _, value in found]
