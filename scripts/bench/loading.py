"""Memory and time of loading a large SAE: how much more than the SAE itself is held.

    python scripts/bench/loading.py [--features 262144] [--width 1024]

Writes an SAE in three layouts to a temporary folder, loads each in a process of its own, and prints the size of the SAE
and the largest resident size of the process, less what it had before loading. Linux only.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

PROGRAM = """
import json, re, sys, time
from steersman.sae import SAE
def high_water():  # of this process image: getrusage would still count what the parent held
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, start = high_water(), time.perf_counter()
sae = SAE.load(sys.argv[1])
seconds = time.perf_counter() - start
size = sum(p.numel() * p.element_size() for p in sae.parameters())
print(json.dumps({"size": size, "grown": high_water() - before, "seconds": seconds}))
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    features: int = 262_144
    """Features of the SAE."""
    width: int = 1024
    """Its width."""


def write(folder: Path, layout: str, features: int, width: int) -> Path:
    """An SAE of random weights in the layout of SAELens, Gemma Scope 1 or dictionary_learning."""
    folder.mkdir()
    rows = torch.randn(features, width)
    vectors = {"b_enc": torch.zeros(features), "b_dec": torch.zeros(width), "threshold": torch.rand(features)}
    if layout == "gemma_scope":
        content = {"W_enc": rows.T.contiguous(), "W_dec": rows} | vectors
        np.savez(folder / "params.npz", **{name: t.numpy() for name, t in content.items()})  # pyright: ignore[reportArgumentType]
    elif layout == "saelens":
        save_file({"W_enc": rows.T.contiguous(), "W_dec": rows} | vectors, folder / "sae_weights.safetensors")
        cfg = {"architecture": "jumprelu", "d_in": width, "d_sae": features, "metadata": {}}
        (folder / "cfg.json").write_text(json.dumps(cfg))
    else:
        content = {"W_enc": rows.T.contiguous(), "W_dec": rows} | vectors
        torch.save(content, folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "JumpReluAutoEncoder"}}))
    return folder


def main(args: Config) -> None:
    print(f"{'layout':<20} {'SAE':>9} {'grown by':>9} {'ratio':>6} {'seconds':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("saelens", "gemma_scope", "dictionary_learning"):
            path = write(Path(folder) / layout, layout, args.features, args.width)
            run = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
            found = json.loads(run.stdout)
            size, grown = found["size"] / 1e9, found["grown"] / 1e9
            print(f"{layout:<20} {size:>6.2f} GB {grown:>6.2f} GB {grown / size:>6.2f} {found['seconds']:>8.2f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
