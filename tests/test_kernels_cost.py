"""The cost model of the kernels: consistent with itself and with a count of candidates; and the table of tiles."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from steersman.kernels import tiles
from steersman.kernels.tools import cost

SHAPES = [*cost.SHAPES, (8192, 1 << 20, 4096, 64)]
TILE = tiles.WAVE[90, torch.bfloat16][0]


def by_passes(shape: tiles.Shape, tile: tiles.Tile, reached: int) -> float:
    """Cycles of an epilogue that takes one candidate from each quarter of each row in a pass over the tile. A quarter
    has Poisson many; the fullest of them decides."""
    mean = shape[3] / reached * tile.BN / 4
    expected, below, term = 0.0, 0.0, math.exp(-mean)
    for n in range(100):
        below += term
        term *= mean / (n + 1)
        expected += 1.0 - min(below, 1.0) ** (4 * tile.BM)
    return 2 * (1188 + 1394 * expected) + 2500


# Kernels with none of what makes the shipped ones cheap: wgmma that waits, a program a tile, two-byte gathers, a row
# written twice, AuxK in every step. Their cost was worked out by hand, from the same counts, kernel by kernel.
PLAIN = cost.Design(
    serial=1.12, epilogue=by_passes, tighten=10_400, prepare_bytes=50, gather=1.3, sums_apart=True,
    update_bytes={"float32": 62.0}, launches=60, aux_always=True,
)  # fmt: skip
BY_HAND = {(8192, 131072, 4096, 64): 3.5, (8192, 131072, 1024, 32): 3.7, (4096, 65536, 2304, 64): 5.8}
"""Whole steps over the bare product."""


def over_product(shape: tiles.Shape, ms: float) -> float:
    return ms * cost.H100.tflops * 1e9 / cost.gemm(shape).flops


@pytest.mark.parametrize("shape", SHAPES)
def test_the_buffers_are_a_small_share_of_the_pre_activations(shape: tiles.Shape) -> None:
    N, L, _, _ = shape
    assert cost.buffer_bytes(shape) <= (0.02 if L > 500_000 else 0.10) * 2 * N * L


@pytest.mark.parametrize(("shape", "expected"), BY_HAND.items())
def test_a_step_costs_what_was_worked_out_by_hand(shape: tiles.Shape, expected: float) -> None:
    tile = replace(TILE, persistent=False)
    parts = cost.step(shape, tile, cost.H100, PLAIN)
    assert over_product(shape, sum(parts.values())) == pytest.approx(expected, rel=0.1)
    shipped = cost.step(shape, TILE, cost.H100)
    assert all(shipped[name] <= parts[name] for name in shipped)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_epilogue_costs_less_than_the_product(shape: tiles.Shape) -> None:
    """The model's own consistency, and what the choice of design rests on; no measurement."""
    encode, product = cost.encode(shape, TILE, cost.H100), cost.gemm(shape)
    assert product.flops == encode.flops
    assert 0 < encode.extra_ms < 0.5 * product.ms(cost.H100)
    assert encode.extra_ms < cost.encode(shape, replace(TILE, persistent=False), cost.H100).extra_ms


def test_smaller_moments_cost_less_until_instructions_bind() -> None:
    by_bytes = replace(cost.SHIPPED, update_instructions={})
    for shape in cost.SHAPES:
        parts = {
            moments: [
                cost.step(shape, TILE, cost.H100, design, moments)["update"] for design in (by_bytes, cost.SHIPPED)
            ]
            for moments in ("float32", "bfloat16", "int8")
        }
        assert parts["float32"][0] > parts["bfloat16"][0] > parts["int8"][0]
        assert parts["float32"][0] == parts["float32"][1]
        assert parts["int8"][0] < parts["int8"][1]


def test_the_update_took_as_long_as_its_instructions() -> None:
    """A count of the machine code that an H200 ran at (4096, 65536, 2304, 64), in pieces of 1024 columns by 8 warps:
    3.34 ms with fp32 moments."""
    instructions = 65536 * 8 * (2220 + 3 * 588)
    assert instructions / (4 * cost.H200.processors * cost.ISSUED * 1e6) == pytest.approx(3.34, rel=0.2)
    shipped = cost.update_instructions((4096, 65536, 2304, 64), cost.SHIPPED, "float32")
    assert shipped == pytest.approx(0.6 * instructions, rel=0.05)


def test_fewer_dead_latents_cost_less() -> None:
    for shape in cost.SHAPES:
        none, few, many = (sum(cost.step(shape, TILE, cost.H100, n_aux=n).values()) for n in (0, 256, 1024))
        assert none < few < many


def test_steering_is_bound_by_reading_the_encoder() -> None:
    few = cost.encode((1, 65536, 2304, 64), TILE, cost.H100)
    read = 2 * 65536 * 2304 / (cost.H100.bandwidth * 1e9)
    assert read < few.ms(cost.H100) < read / 0.7


@pytest.mark.parametrize("K", [8, 64, 512])
def test_groups_that_have_candidates_are_those_in_random_places(K: int) -> None:
    reached, n_tiles = 16384, 200
    candidate = torch.rand(n_tiles * TILE.BM, TILE.BN, generator=torch.Generator().manual_seed(0)) < K / reached
    # Eight rows, of which each thread has two columns of every eight: those of 32 side by side are a group.
    groups = candidate.view(-1, 8, TILE.BN // 32, 32).any(dim=3).any(dim=1).float()
    assert cost.taken((1, 65536, 1, K), reached, 256) == pytest.approx(float(groups.mean()), rel=0.05)


class TestTable:
    def entry(self, shape: tiles.Shape, BM: int) -> dict[str, object]:
        return tiles.entry(shape, 90, torch.bfloat16, tiles.Tile(BM=BM, BN=64, BK=64, warps=4, stages=3), 1.0, "test")

    def test_a_table_begins_where_there_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "tiles.json"
        tiles.extend([self.entry((1, 2, 3, 4), 16)], path)
        assert [entry["shape"] for entry in json.loads(path.read_text())["entries"]] == [[1, 2, 3, 4]]

    def test_the_rule_where_nothing_was_measured(self) -> None:
        assert tiles.choice((8192, 131072, 1024, 32), 90, torch.bfloat16).BN % 8 == 0
        assert all(set(e) == set(self.entry((1, 1, 1, 1), 64)) for cc in (80, 90, 100) for e in tiles.entries(cc))

    def test_the_nearest_measured_shape_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        table = tmp_path / "tiles.json"
        table.write_text('{"entries": []}')
        monkeypatch.setattr(tiles, "TABLE", table)
        tiles.extend([self.entry((4096, 65536, 2304, 64), 16), self.entry((8192, 65536, 2304, 64), 32)], table)
        try:
            assert tiles.choice((4096, 65536, 2304, 64), 90, torch.bfloat16).BM == 16
            assert tiles.choice((7000, 70000, 2304, 64), 90, torch.bfloat16).BM == 32
            assert tiles.choice((7000, 70000, 768, 64), 90, torch.bfloat16) == TILE
            assert tiles.choice((4096, 65536, 2304, 64), 80, torch.bfloat16) == tiles.WAVE[80, torch.bfloat16][0]
            tiles.extend([self.entry((4096, 65536, 2304, 64), 64)], table)
            assert len(json.loads(table.read_text())["entries"]) == 2
        finally:
            monkeypatch.undo()
            tiles._table.cache_clear()
            tiles._find.cache_clear()
