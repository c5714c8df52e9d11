"""Whether a crosscoder tells what two models share from what only one has, on planted dictionaries.

    python scripts/bench/crosscoder.py
    python scripts/bench/crosscoder.py --selections joint sum --k 6

Two "models" each have `features` random unit vectors, half of which belong to both: such a feature is active in both at
once, with one strength and a direction of its own in each. The others belong to one. Frequencies fall as a power of
their rank; B's activations are larger by `scale`. A crosscoder is trained on both, as on stores of two models. Printed
for each seed: FVU of each model; dead features; AUROC of the relative decoder norm (the shorter of the two as a share
of the longer) for shared against exclusive, over all live latents, each of which counts as what its nearest planted
feature is, and over the planted features, each by its nearest latent; how many latents are of the kind that their
planted feature is; and the cosine of planted features to their nearest latent.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("STEERSMAN_PROGRESS", "0")

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from steersman.sae import CrosscoderSAE
from steersman.train import ActivationStore, SideBySide, TrainConfig, crosscoder_report, train_sae


@dataclass(frozen=True, kw_only=True)
class Config:
    rows: int = 400_000
    """Rows of each model."""
    d_in: int = 64
    """Width of each model."""
    features: int = 256
    """Features of each model, half of them shared."""
    active: float = 12.0
    """Mean number of active features a row, of both models together."""
    k: int = 12
    """Active features a row that the crosscoder may use."""
    scale: float = 10.0
    """How much larger B's activations are."""
    noise: float = 0.02
    """Standard deviation of the noise on every number."""
    selections: tuple[str, ...] = ("joint",)
    """Values of the option `selection`."""
    seeds: int = 3
    """Runs of each."""
    out: Path | None = None
    """Also write the lines to this JSON file."""


def planted(args: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of both models side by side [N, 2 D], and the dictionary [1.5 features, 2 D]: shared, A's, B's."""
    g, half = torch.Generator().manual_seed(seed), args.features // 2
    a, b = (F.normalize(torch.randn(3 * half, args.d_in, generator=g), dim=1) for _ in range(2))
    a[2 * half :], b[half : 2 * half] = 0, 0
    frequency = torch.arange(1, half + 1).float().repeat(3) ** -0.7
    frequency = (frequency * args.active / frequency.sum()).clamp(max=0.5)
    dictionary = torch.cat([a, b], dim=1)
    parts = []
    for low in range(0, args.rows, 20_000):
        shape = (min(20_000, args.rows - low), 3 * half)
        code = (torch.rand(shape, generator=g) < frequency) * (0.5 + torch.rand(shape, generator=g))
        x = code @ dictionary
        parts.append(x + args.noise * torch.randn(x.shape, generator=g))
    return torch.cat(parts), dictionary


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive one scores above another."""
    ranks = scores.double().argsort().argsort().double() + 1
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def measured(args: Config, seed: int, selection: str, folder: Path) -> dict[str, object]:
    x, dictionary = planted(args, seed)
    stores = []
    for name, part in zip("ab", (x[:, : args.d_in], args.scale * x[:, args.d_in :])):
        path = folder / f"{name}{seed}"
        if not path.exists():
            known = {"doc_ids": torch.arange(len(x)).numpy() // 100}
            ActivationStore.from_tensors([{"x": part, **known}], path, "planted", model_name=name, dtype="float32")
        stores.append(path)
    source, begun = SideBySide(stores), time.process_time()
    config = TrainConfig(
        d_sae=len(dictionary), k=args.k, architecture="crosscoder", options={"selection": selection}, seed=seed
    )
    sae = train_sae(source, config, folder / f"{selection}{seed}")
    seconds = time.process_time() - begun
    assert isinstance(sae, CrosscoderSAE)
    report = crosscoder_report(sae, source)
    rows = torch.cat(
        [part * scale for part, scale in zip(sae.split(sae.W_dec.detach().cpu()), sae.side_scale.tolist())], 1
    )
    live = torch.tensor([kind != "dead" for kind in report.kinds])
    cosines = F.normalize(rows[live], dim=1) @ F.normalize(dictionary, dim=1).T
    smaller, half = report.relative_norms.amin(dim=1)[live], args.features // 2
    true, found = cosines.max(dim=1), cosines.max(dim=0)
    kinds = [kind for kind, one in zip(report.kinds, live.tolist()) if one]
    right = ["shared" if i < half else "A" if i < 2 * half else "B" for i in true.indices.tolist()]
    return {
        "selection": selection,
        "seed": seed,
        "fvu": [round(one, 4) for one in report.fvu],
        "dead": round(1 - float(live.float().mean()), 4),
        "auroc_latents": round(auroc(smaller, true.indices < half), 4),
        "auroc_features": round(auroc(smaller[found.indices], torch.arange(3 * half) < half), 4),
        "kind_right": round(sum(map(str.__eq__, kinds, right)) / len(kinds), 4),
        "cosine_shared": round(float(found.values[:half].mean()), 4),
        "cosine_exclusive": round(float(found.values[half:].mean()), 4),
        "cpu_seconds": round(seconds, 1),
    }


def main(args: Config) -> None:
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for selection in args.selections:
                lines.append(measured(args, seed, selection, Path(folder)))
                print(json.dumps(lines[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
