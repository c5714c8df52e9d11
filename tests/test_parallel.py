"""Ranks and their groups: one process is a job of one rank; two that talk give what the docstrings say."""

from typing import Any

import pytest
import torch
from support.ranks import run_ranks

from steersman.errors import LostRankError, SteersmanError
from steersman.parallel import Mesh, RankGroup, Ranks, comm_errors, rank_and_world_size


def test_one_rank_does_nothing() -> None:
    x, group = torch.arange(6.0).reshape(3, 2), RankGroup()
    for same in (group.all_reduce_sum_(x), group.all_reduce_max_(x), group.all_reduce_min_(x)):
        assert same is x
    assert torch.equal(group.all_gather(x), x[None])
    assert group.reduce_scatter_sum(x) is x
    group.barrier()
    with Ranks(Mesh()) as ranks:
        assert ranks.is_rank_zero
        done: list[int] = []
        ranks.on_rank_zero(lambda: done.append(1))
        assert done == [1]


@pytest.mark.parametrize(
    ("rank", "world_size", "expected"),
    [(None, None, (0, 1)), ("3", "8", (3, 8)), ("8", "8", "RANK 8 is not below"), ("x", "2", "must be numbers")],
)
def test_what_torchrun_says(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world_size: str | None, expected: Any
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(SteersmanError, match=expected):
            rank_and_world_size()
    else:
        assert rank_and_world_size() == expected


def test_only_errors_of_communication_become_lost_ranks() -> None:
    with pytest.raises(LostRankError, match="did not answer in time"), comm_errors():
        raise RuntimeError("[gloo] Timed out waiting 2000ms for recv")
    with pytest.raises(LostRankError, match="connection to another rank was lost"), comm_errors():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(SteersmanError, match="mine"), comm_errors():
        raise SteersmanError("mine")
    with pytest.raises(torch.OutOfMemoryError), comm_errors():
        raise torch.OutOfMemoryError("too large")
    with pytest.raises(KeyError), comm_errors():
        raise KeyError("no communication")


def talk() -> dict[str, Any]:
    rank, n = rank_and_world_size()
    with Ranks(Mesh(data=n, rank=rank), 60) as ranks:
        x = torch.tensor([1.0 + rank, 10.0 * rank])

        def refuse() -> None:
            raise SteersmanError("refused on rank 0")

        try:
            ranks.on_rank_zero(refuse)
            said = ""
        except SteersmanError as error:
            said = str(error)
        later = ranks.world.all_gather_later(x)
        return {
            "sum": ranks.world.all_reduce_sum_(x.clone()),
            "max": ranks.world.all_reduce_max_(x.clone()),
            "min": ranks.world.all_reduce_min_(x.clone()),
            "gathered": later(),
            "scattered": ranks.data.reduce_scatter_sum(torch.arange(4.0).reshape(4, 1) * (1 + rank)),
            "sizes": (ranks.world.size, ranks.data.size, ranks.latent.size, ranks.control.size),
            "said": said,
        }


def test_two_ranks() -> None:
    found = run_ranks(2, talk)
    for rank, one in enumerate(found):
        assert one["sum"].tolist() == [3.0, 10.0]
        assert one["max"].tolist() == [2.0, 10.0]
        assert one["min"].tolist() == [1.0, 0.0]
        assert one["gathered"].tolist() == [[1.0, 0.0], [2.0, 10.0]]
        assert one["scattered"].flatten().tolist() == ([0.0, 3.0] if rank == 0 else [6.0, 9.0])
        assert one["sizes"] == (2, 2, 1, 2)
        assert one["said"] == "refused on rank 0"
