"""Compare the memory that `steersman plan` announces with the peak of a process that trains.

Each case runs in processes of its own (`torchrun`), on random activations. Printed for each rank: the peak of resident
memory over what the process held before, the plan's figure, and their ratio. glibc keeps freed
blocks of less than 32 MiB and cannot always use them again, which adds up to a quarter where the matrices are that
small; the plan counts what is asked for, so blocks are given back here (--as-is leaves glibc as it is).

    python scripts/dev/check_plan.py --d-in 512 --d-sae 32768
    python scripts/dev/check_plan.py --architectures topk matryoshka jumprelu --whiten
"""

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import tyro

CASES = [(1, 1), (2, 2), (2, 1)]


@dataclass(frozen=True, kw_only=True)
class Config:
    d_in: int = 512
    """Width."""
    d_sae: int = 32768
    """Features."""
    k: int = 32
    """Active features a token."""
    batch: int = 1024
    """Tokens a step."""
    architectures: tuple[str, ...] = ("topk",)
    """Architectures, one after another."""
    whiten: bool = False
    """Whiten the rows."""
    as_is: bool = False
    """Leave glibc's keeping of freed blocks as it is."""
    latent: int = 0
    """Used by the processes that this one starts."""


def rank_main(args: Config) -> None:
    import torch

    from steersman.parallel import Mesh, Ranks, rank_and_world_size
    from steersman.sae import SAE, SAEConfig
    from steersman.train import PlanConfig, TrainConfig, Trainer, plan_run, resolve
    from steersman.train.run.inputs import make_inputs
    from steersman.train.store.statistics import StatsSums, row_norms

    rank, n = rank_and_world_size()
    d_in, d_sae, k, batch, latent = args.d_in, args.d_sae, args.k, args.batch, args.latent
    name = args.architectures[0]
    by_target = SAE.architectures[name].target_l0 == "required"
    settings: dict[str, Any] = {"target_l0": float(k)} if by_target else {"k": k}
    settings |= {"architecture": name, "whiten": "zca" if args.whiten else None}
    config = TrainConfig(
        d_sae=d_sae, batch_size=batch, tokens=batch * 100, device="cpu", aux_coefficient=0.0, **settings
    )
    mesh = Mesh.over(n, rank=rank, d_sae=d_sae, batch_size=batch, latent=latent)
    with Ranks(mesh, 300) as ranks:
        rows = torch.randn(batch // mesh.data, d_in)
        sums = StatsSums(d_in)
        sums.add(rows, row_norms(rows))
        recipe = resolve(config, d_in, None)
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            k=config.k,
            architecture=name,
            group_sizes=config.group_sizes,
            options=config.options,
        )
        inputs = make_inputs(cfg, config, [sums.stats()], torch.eye(d_in) if args.whiten else None)
        # The threads and libraries that the first step of any size brings in are not the run's.
        warm = SAEConfig(d_in=64, d_sae=64 * n, k=4)
        warm_config = TrainConfig(d_sae=64 * n, k=4, batch_size=batch, tokens=batch * 100, device="cpu")
        warm_rows = torch.randn(64, 64)
        warm_sums = StatsSums(64)
        warm_sums.add(warm_rows, row_norms(warm_rows))
        Trainer(warm_config, resolve(warm_config, 64, None), warm_sums.stats(), warm, ranks).step(warm_rows)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        trainer = Trainer(config, recipe, sums.stats(), cfg, ranks, inputs)
        trainer.fit_encoder_scale(rows)
        for _ in range(3):
            trainer.step(rows.bfloat16())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        shape: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "k": k, "architecture": name, "whiten": args.whiten}
        plan = plan_run(PlanConfig(batch_size=batch, ranks=n, latent_shards=latent, **shape))
        line = {"architecture": name, "ranks": n, "latent": latent, "rank": rank, "peak_mb": round(peak / 1e6)}
        line |= {"plan_mb": round(plan.memory_bytes / 1e6), "ratio": round(plan.memory_bytes / peak, 3)}
        print(json.dumps(line), flush=True)


def main(args: Config) -> None:
    if args.latent:
        rank_main(args)
        return
    sizes = [f"--d-in={args.d_in}", f"--d-sae={args.d_sae}", f"--k={args.k}", f"--batch={args.batch}"]
    environment = os.environ if args.as_is else os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    sizes += ["--whiten"] if args.whiten else []
    for (n, latent), name in product(CASES, args.architectures):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", __file__]
        more = [f"--latent={latent}", "--architectures", name]
        subprocess.run([*command, *sizes, *more], check=True, env=environment)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
