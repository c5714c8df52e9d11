"""The cost model of the kernels: consistent with itself and with a count of candidates; and the table of tiles."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from steersman.kernels import tiles
from steersman.kernels.tools import cost

SHAPES = [(8192, 131072, 1024, 32), (4096, 65536, 2304, 64), (8192, 131072, 4096, 64), (8192, 1 << 20, 4096, 64)]
TILE = tiles.WAVE[90, torch.bfloat16][0]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_buffers_are_a_small_share_of_the_pre_activations(shape: tiles.Shape) -> None:
    N, L, _, _ = shape
    assert cost.buffer_bytes(shape) <= (0.02 if L > 500_000 else 0.10) * 2 * N * L


@pytest.mark.parametrize("shape", SHAPES)
def test_the_epilogue_costs_less_than_the_product(shape: tiles.Shape) -> None:
    """The model's own consistency, and what the choice of design rests on; no measurement."""
    encode, product = cost.encode(shape, TILE, cost.H100), cost.gemm(shape)
    assert product.flops == encode.flops
    assert encode.bytes < product.bytes
    assert 0 < encode.extra_ms < product.ms(cost.H100)
    step = cost.step(shape, TILE, cost.H100)
    parts = [encode, cost.decode(shape), cost.backward(shape), cost.update(shape)]
    assert step.ms(cost.H100) == pytest.approx(sum(part.ms(cost.H100) for part in parts))


def test_steering_is_bound_by_reading_the_encoder() -> None:
    few = cost.encode((1, 65536, 2304, 64), TILE, cost.H100)
    read = 2 * 65536 * 2304 / (cost.H100.bandwidth * 1e9)
    assert read < few.ms(cost.H100) < read / 0.7


@pytest.mark.parametrize("K", [8, 64, 512])
def test_passes_are_those_of_candidates_in_random_places(K: int) -> None:
    """A tile takes as many passes as the fullest quarter of its rows has candidates: counted here, tile by tile."""
    L, growth, n_tiles = 65536, 4, 200
    g = torch.Generator().manual_seed(0)
    most = []
    for _ in range(n_tiles):
        candidate = torch.rand(TILE.BM, TILE.BN, generator=g) < growth * K / L
        quarters = candidate.view(TILE.BM, TILE.BN // 8, 4, 2).sum(dim=(1, 3))
        most.append(float(quarters.max()))
    assert cost.passes((1, L, 1, K), TILE, growth) == pytest.approx(sum(most) / n_tiles, rel=0.05)


class TestTable:
    def entry(self, shape: tiles.Shape, BM: int) -> dict[str, object]:
        return tiles.entry(shape, 90, torch.bfloat16, tiles.Tile(BM=BM, BN=64, BK=64, warps=4, stages=3), 1.0, "test")

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
