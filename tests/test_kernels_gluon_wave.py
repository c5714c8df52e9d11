"""The source of Hopper's encoder kernel, run by an emulator of what it is written in, against the kernel that is its
definition, run by Triton's interpreter. Its machine code is looked at in test_kernels_compiled.py."""

import importlib.util
import inspect
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support import gluon_emulator
from support.gluon_emulator import Deadlock, emulate
from support.helpers import integers
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from steersman.kernels import gluon_wave, operands, tiles, triton_wave

CPU = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not CPU, reason="the kernel itself is compared on a GPU: scripts/dev/check_gpu.py")


class Problem:
    """Activations, weights and thresholds whose products are whole numbers."""

    def __init__(self, N: int, L: int, D: int, C: int, seed: int = 0) -> None:
        self.x, self.W, self.bias = integers(N, D, seed=seed), integers(L, D, seed=seed + 1), integers(L, seed=seed + 2)
        self.C = C
        self.tau = (self.x @ self.W.T).kthvalue(max(1, L - C // 4), dim=1).values

    def emulated(
        self, wave: tuple[int, int], tile: tiles.Tile, n_programs: int, module: types.ModuleType = gluon_wave
    ) -> tuple[Tensor, Tensor]:
        """Buffer and count of the emulated kernel."""
        buffer, count = self.empty()
        constants = {"C": self.C, "BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "GROUP": tile.group, "S": tile.stages,
                     "WARPS": tile.warps}  # fmt: skip
        emulate(module, n_programs, constants, self.x, self.W, self.bias, self.tau, buffer, count, wave)
        return buffer, count

    def defined(self, wave: tuple[int, int], tile: tiles.Tile) -> tuple[Tensor, Tensor]:
        """Buffer and count of `wave_kernel`."""
        buffer, count = self.empty()
        ops = operands.Operands(self.x, self.W, self.bias, "ieee")
        triton_wave.launch_wave(ops, tile, triton_wave.FILTER, wave, self.tau, buffer, count, self.C)
        return buffer, count

    def empty(self) -> tuple[Tensor, Tensor]:
        N = len(self.x)
        return torch.full((N, self.C), -1, dtype=torch.int64), torch.full((N,), 3, dtype=torch.int32)


def tile_of(BM: int = 16, BN: int = 64, BK: int = 16, stages: int = 4, group: int = 2) -> tiles.Tile:
    return tiles.Tile(BM=BM, BN=BN, BK=BK, warps=1, stages=stages, group=group, persistent=True)


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """The same counts, and the same keys in each row in any order."""
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0].sort(dim=1).values, want[0].sort(dim=1).values)


@pytest.mark.parametrize(("D", "BN", "stages"), [(8, 64, 4), (40, 64, 4), (64, 64, 4), (72, 64, 3), (144, 256, 4)])
def test_widths_around_the_number_of_stages(D: int, BN: int, stages: int) -> None:
    """1, 3, 4, 5 and 9 steps a tile, several tiles a program, rows, columns and widths that end within a tile."""
    problem = Problem(20, 400, D, 256)
    tile = tile_of(BN=BN, stages=stages)
    same(problem.emulated((128, 390), tile, 3), problem.defined((128, 390), tile))


@pytest.mark.parametrize("n_programs", [1, 2, 50])
def test_any_number_of_programs(n_programs: int) -> None:
    problem = Problem(20, 400, 24, 64)
    same(problem.emulated((64, 400), tile_of(), n_programs), problem.defined((64, 400), tile_of()))


def test_few_stages() -> None:
    problem = Problem(20, 300, 56, 64)
    same(problem.emulated((64, 300), tile_of(stages=2), 2), problem.defined((64, 300), tile_of()))
    with pytest.raises(AssertionError):
        problem.emulated((64, 300), tile_of(stages=1), 1)


def test_values_at_the_threshold_and_zeros() -> None:
    problem = Problem(16, 300, 16, 512)
    problem.W[100:220] = problem.W[100]
    problem.bias[100:220] = 0.0
    problem.x[3] = 0.0
    problem.bias[250:260] = -0.0
    problem.tau = (problem.x @ problem.W[100] - 1.0) * (torch.arange(16) % 2)
    problem.tau[3] = -1.0
    same(problem.emulated((64, 300), tile_of(), 2), problem.defined((64, 300), tile_of()))


def test_infinities() -> None:
    problem = Problem(16, 300, 16, 64)
    problem.bias[[70, 120, 299]] = torch.inf
    problem.bias[200:290] = -torch.inf
    problem.tau[2], problem.tau[3] = torch.inf, -torch.inf
    got, want = problem.emulated((64, 300), tile_of(), 2), problem.defined((64, 300), tile_of())
    assert torch.equal(got[1], want[1])
    whole = got[1] <= problem.C
    assert 0 < whole.sum() < 16  # everything is above minus infinity
    same((got[0][whole], got[1][whole]), (want[0][whole], want[1][whole]))


def test_rows_with_more_candidates_than_slots_are_marked() -> None:
    problem = Problem(16, 500, 16, 64)
    problem.tau[[4, 9]] = -1000.0
    got, want = problem.emulated((64, 500), tile_of(), 2), problem.defined((64, 500), tile_of())
    assert torch.equal(got[1], want[1])
    assert (got[1] > problem.C).nonzero().flatten().tolist() == [4, 9]
    whole = got[1] <= problem.C
    same((got[0][whole], got[1][whole]), (want[0][whole], want[1][whole]))


def test_nan_is_a_candidate_above_all() -> None:
    problem = Problem(16, 300, 16, 64)
    problem.bias[[70, 200]] = torch.nan
    problem.tau[5] = torch.inf
    got = problem.emulated((64, 300), tile_of(), 2)
    same(got, problem.defined((64, 300), tile_of()))
    for keys in got[0].sort(dim=1, descending=True).values:
        assert (0x7FFFFFFF - (keys[:2] & 0x7FFFFFFF)).tolist() == [70, 200]
        assert (keys[:2] >> 32).tolist() == [0x7FC00000] * 2


def mutant(old: str, new: str, tmp_path: Path) -> types.ModuleType:
    """The module with a change to its source."""
    source = inspect.getsource(gluon_wave)
    assert old in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    parity = 1\n", "    parity = 0\n"),
        ("empty.index(before), count=1, pred=k > 0", "empty.index(before), count=1, pred=k > 16"),
        ("mbarrier.wait(full.index(stage), parity)", "mbarrier.wait(full.index(stage), 1)"),
        ("empty.index(before), count=1, pred=k > 0", "empty.index(stage), count=1"),
        ("mbarrier.wait(empty.index(stage), parity)", "pass"),
        ("2 * BK * (BM + BN)", "2 * BK * BN"),
    ],
)
def test_the_emulator_sees_mistakes(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.3)
    problem = Problem(20, 300, 104, 64)
    want = problem.defined((64, 300), tile_of())
    with pytest.raises((AssertionError, Deadlock)):
        same(problem.emulated((64, 300), tile_of(), 1, mutant(old, new, tmp_path)), want)


class TestChoice:
    @pytest.fixture(autouse=True)
    def _record(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.launched: list[str] = []
        launches = defaultdict(lambda: lambda **arguments: self.launched.append("wave"))
        monkeypatch.setattr(triton_wave, "wave_kernel", launches)
        monkeypatch.setattr(gluon_wave, "launch_filter", lambda *arguments: self.launched.append("persistent"))
        triton_wave.persistent_waves.cache_clear()
        yield
        triton_wave.persistent_waves.cache_clear()

    def launch(self, dtype: torch.dtype, mode: Any, *, signed: bool = False) -> str:
        """Which kernel runs a persistent tile."""
        x, W, empty = torch.zeros(4, 8, dtype=dtype), torch.zeros(64, 8, dtype=dtype), torch.zeros(0)
        ops = operands.Operands(x, W, torch.zeros(64), "ieee")
        triton_wave.launch_wave(ops, tile_of(), mode, (0, 64), empty, empty, empty, 64, signed=signed)
        return self.launched.pop()

    def test_by_mode_and_dtype(self) -> None:
        assert self.launch(torch.bfloat16, triton_wave.FILTER) == "persistent"
        assert self.launch(torch.float16, triton_wave.FILTER) == "persistent"
        assert self.launch(torch.float32, triton_wave.FILTER) == "wave"
        assert self.launch(torch.bfloat16, triton_wave.FILTER, signed=True) == "wave"
        for mode in (triton_wave.FIRST, triton_wave.THRESHOLD, triton_wave.DENSE):
            assert self.launch(torch.bfloat16, mode) == "wave"

    def test_the_environment_can_say_no(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STEERSMAN_PERSISTENT", "0")
        assert self.launch(torch.bfloat16, triton_wave.FILTER) == "wave"

    def test_tables_that_do_not_know_of_it(self) -> None:
        earlier = {name: value for name, value in asdict(tile_of()).items() if name != "persistent"}
        assert not tiles.Tile(**earlier).persistent
        assert tiles.WAVE[90, torch.bfloat16][0].persistent
        shipped = [(key, tile) for key, some in tiles.WAVE.items() for tile in some if tile.persistent]
        assert all(capability == 90 and dtype.itemsize == 2 for (capability, dtype), _ in shipped)
