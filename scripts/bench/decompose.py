"""Matching pursuit of many vectors: its time, and whether it equals a plain float64 implementation.

The vectors are sums of some decoder rows with noise, so that both what is found early and what is found late matter.

    python scripts/bench/decompose.py --vectors 100 --features 32 --d-in 2304 --d-sae 16384
    python scripts/bench/decompose.py --d-sae 131072 --check 4
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

from steersman import SAE, SAEConfig, decompose


@dataclass(frozen=True, kw_only=True)
class Config:
    vectors: int = 100
    """Vectors to decompose."""
    features: int = 32
    """Features of each."""
    d_in: int = 2304
    """Width of the SAE."""
    d_sae: int = 16_384
    """Its features."""
    planted: int = 16
    """Decoder rows in each vector."""
    noise: float = 1.0
    """Norm of the noise, as a fraction of the vector's."""
    check: int = 8
    """Vectors compared with the plain implementation."""
    pursuit: Literal["exact", "gradient"] = "exact"
    """Kind of the matching pursuit."""
    device: str = "cpu"
    """Where to run."""
    threads: int | None = None
    """CPU threads; torch's own number if not given."""


def plain_pursuit(v: Tensor, rows: Tensor, k: int) -> tuple[list[int], Tensor]:
    """Orthogonal matching pursuit in its plainest form: v [D], unit rows [L, D], both float64."""
    chosen: list[int] = []
    left, c = v, v[:0]
    for _ in range(k):
        score = (rows @ left).abs()
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        c = torch.linalg.lstsq(rows[chosen].T, v[:, None]).solution[:, 0]
        left = v - c @ rows[chosen]
    return chosen, c


def main(args: Config) -> None:
    """Measure and print."""
    if args.threads:
        torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=args.d_in, d_sae=args.d_sae, k=32), g)
    code = torch.zeros(args.vectors, args.d_sae)
    for row in code:
        chosen = torch.randint(0, args.d_sae, (args.planted,), generator=g)
        row[chosen] = torch.randn(args.planted, generator=g)
    V = code @ sae.W_dec.detach()
    noise = torch.randn(V.shape, generator=g)
    V = V + args.noise * noise * V.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    sae, V = sae.to(args.device), V.to(args.device)

    seconds, found = [], []
    for _ in range(3):
        start = time.perf_counter()
        found = decompose(list(V), sae, method="omp", k=args.features, pursuit=args.pursuit)
        seconds.append(time.perf_counter() - start)
    print(
        f"{args.vectors} vectors, {args.features} features, d_in {args.d_in}, d_sae {args.d_sae}, {args.pursuit}, "
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"decompose, with null, curves and warnings: {min(seconds):.2f} s (3 runs: {[round(s, 2) for s in seconds]})")
    if args.pursuit != "exact" or not args.check:
        return
    rows = sae.W_dec.detach().double()
    rows /= rows.norm(dim=1, keepdim=True)
    same, worst = 0, 0.0
    start = time.perf_counter()
    for v, one in list(zip(V.double(), found))[: args.check]:
        features, c = plain_pursuit(v, rows, args.features)
        same += features == one.features.tolist()
        if features == one.features.tolist():
            worst = max(worst, float((c.cpu() - one.coefficients).abs().max() / c.abs().max()))
    each = (time.perf_counter() - start) / args.check
    print(
        f"plain float64: {each:.2f} s a vector; {same} of {args.check} with the same features in the same order; "
        f"coefficients differ by at most {worst:.1e} of the largest"
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
