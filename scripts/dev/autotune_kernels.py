"""Measure the encoder's tiles on this GPU and put the fastest of each shape into a table.

    python scripts/dev/autotune_kernels.py --shapes 8192,131072,1024,32 4096,65536,2304,64

Needs an NVIDIA GPU. Without --out the package's own table is extended, which later runs on such a GPU read.
"""

import argparse  # not tyro: runs on a bare GPU image
from pathlib import Path
from typing import Any

import torch

from steersman.errors import SteersmanError
from steersman.kernels import operands, tiles, triton_encode
from steersman.kernels.tiles import Tile
from steersman.kernels.tools import cost

SHAPES = ("8192,131072,1024,32", "4096,65536,2304,64", "8192,131072,4096,64")


def candidates(capability: int) -> list[Tile]:
    """Tiles worth a measurement: those that fit the multiprocessor, around the shipped ones."""
    tma = capability >= 90
    persistent = [
        Tile(BM=128, BN=BN, BK=64, warps=8, stages=stages, group=group, persistent=True)
        for BN, stages in ((256, 3), (256, 4), (128, 4), (128, 6))
        for group in (8, 16)
        if capability == 90
    ]
    return persistent + [
        Tile(BM=BM, BN=BN, BK=BK, warps=warps, stages=stages, group=group, tma=tma)
        for BM, BN, warps in ((128, 256, 8), (128, 128, 4), (128, 128, 8), (64, 256, 4), (256, 128, 8))
        for BK in ((32, 64) if capability < 90 else (64, 128))
        for stages in (3, 4)
        for group in (8, 16)
        if stages * 2 * BK * (BM + BN) <= (160 << 10 if capability < 90 else 200 << 10)
    ]


def measure(shape: tiles.Shape, tile: Tile, ms: int) -> float:
    """Median milliseconds of all waves of an encode with this tile; infinity where it cannot run."""
    from triton.testing import do_bench

    N, L, D, K = shape
    x, W = torch.randn(N, D, device="cuda"), torch.randn(L, D, device="cuda", dtype=torch.bfloat16)
    ops = operands.prepare(x, W, torch.zeros(L, device="cuda"), None)
    n_failed = torch.zeros(1, dtype=torch.int32, device="cuda")
    try:
        median: Any = do_bench(lambda: triton_encode.collect(ops, K, n_failed, tile), rep=ms, return_mode="median")
        return float(median)
    except Exception as error:
        print(f"  {tile}: {str(error).splitlines()[0][:100]}")
        return float("inf")


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SteersmanError("tuning needs an NVIDIA GPU, and PyTorch sees none")
    device = torch.device("cuda")
    capability = tiles.capability(device)
    rows = []
    for text in args.shapes:
        N, L, D, K = (int(number) for number in text.split(","))
        shape = (N, L, D, K)
        timed = sorted(((measure(shape, tile, args.ms), i, tile) for i, tile in enumerate(candidates(capability))))
        for ms, _, tile in timed[:5]:
            expected = cost.encode(shape, tile, cost.H100).ms(cost.H100)
            print(f"N={N} L={L} D={D} K={K}  {ms:8.3f} ms  (model, H100: {expected:.3f})  {tile}")
        best = timed[0]
        rows.append(tiles.entry(shape, capability, torch.bfloat16, best[2], best[0], torch.cuda.get_device_name()))
    tiles.extend(rows, args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="N,L,D,K: tokens, features, width, active features")
    parser.add_argument("--out", type=Path, default=tiles.TABLE, help="the table to extend")
    parser.add_argument("--ms", type=int, default=300, help="milliseconds of measurement for each tile")
    try:
        main(parser.parse_args())
    except SteersmanError as error:
        raise SystemExit(f"autotune_kernels: {error}") from error
