"""What several test modules need."""

from typing import Any

import torch
from torch import Tensor

from steersman.sae import SAE, GatedSAE, SAEConfig


def make_sae(architecture: str = "topk", d_in: int = 8, d_sae: int = 64, k: int = 5, **options: Any) -> SAE:
    """A small SAE of any architecture with biases that are not zero, and a threshold where it has one."""
    g = torch.Generator().manual_seed(0)
    k = 4 if architecture == "groupmax" and d_sae % k else k
    options |= {"architecture": architecture, "k": k if SAE.architectures[architecture].uses_k else 0}
    if SAE.architectures[architecture].uses_groups:
        options.setdefault("group_sizes", (d_sae // 4, d_sae - d_sae // 4))
    if options.get("transcoder"):
        options.setdefault("apply_b_dec_to_input", False)
    sae = SAE(SAEConfig(d_in=d_in, d_sae=d_sae, **options), g)
    with torch.no_grad():
        if isinstance(sae, GatedSAE):
            for bias in (sae.b_gate, sae.b_mag, sae.r_mag):
                bias.normal_(0, 0.3, generator=g)
        elif sae.b_enc is not None:
            sae.b_enc.normal_(0, 0.3, generator=g)
        sae.b_dec.normal_(0, 0.5, generator=g)
        if sae.cfg.skip_connection:
            sae.W_skip.normal_(0, 0.3, generator=g)
        if architecture in ("batch_topk", "matryoshka"):
            sae.threshold = torch.tensor(0.4)
        elif architecture == "jumprelu":
            sae.threshold = torch.rand(d_sae, generator=g)
    return sae


def integers(*shape: int, seed: int, high: int = 3) -> Tensor:
    """Small whole numbers: sums of their products are exact in every dtype and order, and full of ties."""
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


PRECISIONS = ("bf16", "tf32", "fp32") if torch.cuda.is_available() else ("fp32",)
"""How the tests of encoders multiply whole numbers, exactly in each: by every unit of a GPU, or by the interpreter."""


def triton_before(major: int, minor: int) -> bool:
    """Whether the Triton installed is older than this release."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) < (major, minor)
