"""What the tests of SAE files share: writing files by the ends of their names, and comparing what an SAE computes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from steersman.sae import SAE


def write_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write name -> content into `folder`: JSON, safetensors, .npz and .pt, by the end of the name."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(content))
        elif path.suffix == ".safetensors":
            save_file({key: value.detach().contiguous() for key, value in content.items()}, path)
        elif path.suffix == ".npz":
            np.savez(path, **{key: np.asarray(value) for key, value in content.items()})  # pyright: ignore[reportArgumentType]
        else:
            torch.save(dict(content), path)
    return folder


def assert_computes(sae: SAE, x: Tensor, f: Tensor, x_hat: Tensor, atol: float = 1e-5) -> None:
    """The SAE's code and reconstruction of x are f, which is not all zeros, and x_hat."""
    assert bool((f > 0).any())
    torch.testing.assert_close(sae.encode(x), f.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), x_hat.float(), rtol=1e-5, atol=atol)
