"""Train a skip transcoder on a store of two hook points and, on the same rows, eai-sparsify's, at several learning
rates each.

    steersman cache --model stories260k --text stories.jsonl --out acts --tokens 200000 \\
        --hook blocks.2.hook_mlp_in --hook blocks.2.hook_mlp_out
    python scripts/bench/transcoders.py --store acts --d-sae 1024 --k 16 --tokens 400000

Run it in an environment with the `peers` extra: `pip install steersman[peers]`. sparsify's side is what its trainer
does with rows that are in memory: biases from the first batch, Adam with linear warm-up and decay, a decoder that
starts from zero and is not normalised, AuxK, the same batches in the same order. Both are measured on the rows held
out: FVU of the prediction, and the share of features that fire on none of the training rows.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import torch
import tyro

from steersman.train import ActivationStore, TrainConfig, train_sae


@dataclass(frozen=True, kw_only=True)
class Config:
    store: str
    """Folder of a store of two hook points: what is read, then what is predicted."""
    d_sae: int = 1024
    """Number of features."""
    k: int = 16
    """Active features."""
    tokens: int = 400_000
    """Rows to train on, in as many passes as that takes."""
    lrs: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Learning rates of each side, in units of its own default."""
    batch_size: int = 512
    """Rows a step, of both."""
    auxk: float = 1 / 32
    """sparsify's weight of AuxK; its trainer leaves it at 0 unless asked."""
    skip: bool = True
    """Whether both have a skip connection."""
    threads: int = 1
    """Threads of PyTorch."""
    out: Path | None = None
    """Also write the figures to this JSON file."""


def rows_of(store: ActivationStore, split: Any, batch_size: int, epoch: int = 0) -> Any:
    """Batches of what is read and what is predicted, fp32."""
    widths = [store.width(hook) for hook in store.hook_names]
    shuffle = split == "train"
    for batch in store.batches(
        batch_size, hook=store.hook_names, split=split, epoch=epoch, shuffle=shuffle, drop_last=shuffle
    ):
        yield batch.x.float().split(widths, dim=1)


def fvu_and_dead(store: ActivationStore, predict: Any, fires: Any, d_sae: int) -> tuple[float, float]:
    """FVU on the rows held out, and the share of features that fire on none of the training rows."""
    pairs = list(rows_of(store, "heldout", 4096))
    y = torch.cat([target for _, target in pairs])
    error = sum(float((target - predict(x)).square().sum()) for x, target in pairs)
    fired = torch.zeros(d_sae, dtype=torch.bool)
    for x, _ in rows_of(store, "train", 4096):
        fired[fires(x)] = True
    return error / float((y - y.mean(0)).square().sum()), float((~fired).float().mean())


def ours(args: Config, store: ActivationStore, factor: float) -> dict[str, Any]:
    started = time.process_time()
    settings = TrainConfig(
        d_sae=args.d_sae, k=args.k, hook_out=store.hook_names[1], skip_connection=args.skip, tokens=args.tokens,
        batch_size=args.batch_size, device="cpu", max_norm_ratio=None, statistics_tokens=args.batch_size,
    )  # fmt: skip
    lr = None
    if factor != 1:
        n_steps = args.tokens // args.batch_size
        lr = factor * 0.05 / store.width(store.hook_names[0]) ** 0.5 * min(2.0, (1000 / n_steps) ** (1 / 3))
    with TemporaryDirectory() as folder:
        sae = train_sae(store, settings, Path(folder) / "run", lr=lr)
    seconds = time.process_time() - started

    def fires(x: torch.Tensor) -> torch.Tensor:
        code = sae.encode_sparse(x)
        return code.indices[code.active]

    fvu, dead = fvu_and_dead(store, sae, fires, args.d_sae)
    return {"library": "steersman", "lr": factor, "fvu": fvu, "dead": dead, "cpu seconds": seconds}


def sparsify(args: Config, store: ActivationStore, factor: float) -> dict[str, Any]:
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    started = time.process_time()
    d_in, n_steps = store.width(store.hook_names[0]), args.tokens // args.batch_size
    settings = SparseCoderConfig(num_latents=args.d_sae, k=args.k, transcode=True, skip_connection=args.skip)
    torch.manual_seed(0)
    sae = SparseCoder(d_in, settings)
    # Its Adam's own rate, 2e-4 at 2^14 latents, is for millions of steps: runs of this length need more.
    lr = factor * 8e-3 / (args.d_sae / 1024) ** 0.5
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    warm = max(1, n_steps // 20)
    silent = torch.zeros(args.d_sae, dtype=torch.long)
    step, epoch = 0, 0
    while step < n_steps:
        for x, y in rows_of(store, "train", args.batch_size, epoch):
            if step == n_steps:
                break
            if step == 0:
                sae.encoder.bias.data = -x.mean(0) @ sae.encoder.weight.data.T
                sae.b_dec.data = y.mean(0)
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warm, (n_steps - step) / (n_steps - warm))
            dead = silent > 10 * args.batch_size if args.auxk else None
            out = sae(x, y, dead_mask=dead)
            (out.fvu + args.auxk * out.auxk_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            silent += len(x)
            silent[out.latent_indices[out.latent_acts > 0]] = 0
            step += 1
        epoch += 1
    seconds = time.process_time() - started

    @torch.no_grad()
    def fires(x: torch.Tensor) -> torch.Tensor:
        out = sae.encode(x)
        return out.top_indices[out.top_acts > 0]

    @torch.no_grad()
    def predict(x: torch.Tensor) -> torch.Tensor:
        return sae(x).sae_out

    fvu, dead_share = fvu_and_dead(store, predict, fires, args.d_sae)
    return {"library": "eai-sparsify", "lr": factor, "fvu": fvu, "dead": dead_share, "cpu seconds": seconds}


def main(args: Config) -> None:
    torch.set_num_threads(args.threads)
    store, found = ActivationStore.open(args.store), []
    sides = [ours, sparsify] if find_spec("sparsify") else [ours]
    for factor in args.lrs:
        for train in sides:
            found.append(train(args, store, factor))
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found[-1].items()))
    for train in sides:
        name = {ours: "steersman", sparsify: "eai-sparsify"}[train]
        best = min((one for one in found if one["library"] == name), key=lambda one: one["fvu"])
        print(f"best of {name}: FVU {best['fvu']:.4f}, dead {100 * best['dead']:.2f} %, {best['cpu seconds']:.0f} s")
    if args.out is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
        args.out.write_text(json.dumps({"args": settings, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
