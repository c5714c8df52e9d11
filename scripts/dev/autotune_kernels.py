"""Measure the encoder's tiles on this GPU and put the fastest of each shape into a table.

    python scripts/dev/autotune_kernels.py --out tiles.json --minutes 9

Needs an NVIDIA GPU. What is timed is `triton_encode.collect` as it ships: all waves with their selections, the tile
that is tried in those of the mode FILTER. Shapes go from small to large, and the table is written after each. Without
--out the package's own table is extended, which later runs on such a GPU read. A tile that does not compile or run is
a printed line. `--list` prints the tiles and what the cost model says of them, and needs no GPU.
"""

import argparse  # not tyro: runs on a bare GPU image
import time
from pathlib import Path
from typing import Any

import torch

from steersman.errors import SteersmanError
from steersman.kernels import operands, tiles, triton_encode
from steersman.kernels.tiles import Tile
from steersman.kernels.tools import cost
from steersman.kernels.tools.timing import unit_rows

SHAPES = ("8192,131072,1024,32", "4096,65536,2304,64", "8192,131072,4096,64")


def candidates(capability: int) -> list[Tile]:
    """Tiles worth a measurement: those that fit the multiprocessor, around the shipped ones; on Hopper also as the
    persistent kernel takes them. The shipped ones come first."""
    tma, room = capability >= 90, (160 << 10) if capability < 90 else (200 << 10)
    found = list(tiles.WAVE[capability, torch.bfloat16])
    found += [
        Tile(BM=128, BN=BN, BK=64, warps=8, stages=stages, group=group, persistent=True)
        for BN, stages in ((256, 3), (256, 4), (128, 4), (128, 6))
        for group in (8, 16)
        if capability == 90
    ]
    found += [
        Tile(BM=BM, BN=BN, BK=BK, warps=warps, stages=stages, group=group, tma=tma)
        for BM, BN, warps in ((128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 256, 4), (256, 128, 8))
        for BK in ((32, 64) if capability < 90 else (64, 128))
        for stages in (3, 4)
        for group in (8, 16)
        if stages * 2 * BK * (BM + BN) <= room
    ]
    return list(dict.fromkeys(found))


def measure(shape: tiles.Shape, some: list[Tile], ms: int, stop: float) -> list[tuple[float, Tile]]:
    """Median milliseconds of all waves of an encode with each tile that runs, fastest first."""
    from triton.testing import do_bench

    N, L, D, K = shape
    device = torch.device("cuda")
    x, W = torch.randn(N, D, device=device), unit_rows(L, D, device, torch.bfloat16)
    ops = operands.prepare(x, W, torch.zeros(L, device=device), None)
    n_failed = torch.zeros(1, dtype=torch.int32, device=device)
    found: list[tuple[float, Tile]] = []
    for tile in some:
        if time.monotonic() > stop:
            print("  out of time: the other tiles were not tried")
            break
        try:
            median: Any = do_bench(
                lambda tile=tile: triton_encode.collect(ops, K, n_failed, tile), rep=ms, return_mode="median"
            )
            torch.cuda.synchronize(device)
            found.append((float(median), tile))
        except Exception as error:
            words = (str(error).strip() or type(error).__name__).splitlines()
            print(f"  {tile}: {words[0][:100]}")
    return sorted(found, key=lambda each: each[0])


def shape_of(text: str) -> tiles.Shape:
    """N,L,D,K."""
    try:
        N, L, D, K = (int(number) for number in text.split(","))
    except ValueError as error:
        raise SteersmanError(f"a shape is four numbers N,L,D,K, and {text!r} is not") from error
    return N, L, D, K


def described(shape: tiles.Shape, tile: Tile, ms: float | None) -> str:
    expected = cost.collect(shape, tile, cost.H100).ms(cost.H100)
    measured = "" if ms is None else f"{ms:8.3f} ms  "
    return f"{','.join(map(str, shape)):<22} {measured}(model, H100: {expected:.3f} ms)  {tile}"


def main(args: argparse.Namespace) -> None:
    shapes = sorted((shape_of(text) for text in args.shapes), key=lambda s: s[0] * s[1] * s[2])
    if args.list:
        for shape in shapes:
            for tile in candidates(args.capability):
                print(described(shape, tile, None))
        return
    if not torch.cuda.is_available():
        raise SteersmanError("tuning needs an NVIDIA GPU, and PyTorch sees none; --list needs none")
    device, stop = torch.device("cuda"), time.monotonic() + 60 * args.minutes
    capability = tiles.capability(device)
    for shape in shapes:
        timed = measure(shape, candidates(capability), args.ms, stop)
        for ms, tile in timed:
            print(described(shape, tile, ms), flush=True)
        if timed:
            ms, best = timed[0]
            row = tiles.entry(shape, capability, torch.bfloat16, best, ms, torch.cuda.get_device_name())
            tiles.extend([row], args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="N,L,D,K: tokens, features, width, active features")
    parser.add_argument("--out", type=Path, default=tiles.TABLE, help="the table to extend or begin")
    parser.add_argument("--ms", type=int, default=200, help="milliseconds of measurement for each tile")
    parser.add_argument("--minutes", type=float, default=30.0, help="time after which no further tile is tried")
    parser.add_argument(
        "--list", action="store_true", help="print the tiles with the model's times and measure nothing"
    )
    parser.add_argument("--capability", type=int, choices=(80, 90, 100), default=90, help="the GPU of --list")
    try:
        main(parser.parse_args())
    except SteersmanError as error:
        raise SystemExit(f"autotune_kernels: {error}") from error
