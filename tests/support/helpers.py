"""What several test modules need."""

from typing import Any

import torch

from steersman.sae import SAE, GatedSAE, SAEConfig

_USES_K = ("topk", "batch_topk", "matryoshka", "groupmax")


def make_sae(activation: str = "topk", d_in: int = 8, d_sae: int = 64, k: int = 5, **options: Any) -> SAE:
    """A small SAE of any architecture with biases that are not zero, and a threshold where it has one."""
    g = torch.Generator().manual_seed(0)
    k = 4 if activation == "groupmax" and d_sae % k else k
    options |= {"architecture": activation, "k": k if activation in _USES_K else 0}
    if activation == "matryoshka":
        options.setdefault("group_sizes", (d_sae // 4, d_sae - d_sae // 4))
    if options.get("transcoder"):
        options.setdefault("apply_b_dec_to_input", False)
    sae = SAE(SAEConfig(d_in=d_in, d_sae=d_sae, **options), g)
    with torch.no_grad():
        if isinstance(sae, GatedSAE):
            for bias in (sae.b_gate, sae.b_mag, sae.r_mag):
                bias.normal_(0, 0.3, generator=g)
        else:
            sae.b_enc.normal_(0, 0.3, generator=g)
        sae.b_dec.normal_(0, 0.5, generator=g)
        if sae.cfg.skip_connection:
            sae.W_skip.normal_(0, 0.3, generator=g)
        if activation in ("batch_topk", "matryoshka"):
            sae.threshold = torch.tensor(0.4)
        elif activation == "jumprelu":
            sae.threshold = torch.rand(d_sae, generator=g)
    return sae


def triton_before(major: int, minor: int) -> bool:
    """Whether the Triton installed is older than this release."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) < (major, minor)
