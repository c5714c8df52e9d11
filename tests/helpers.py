"""What several test modules need."""

import torch

from steersman.sae import SAE, SAEConfig


def make_sae(activation: str = "topk", d_in: int = 8, d_sae: int = 64, k: int = 5) -> SAE:
    """A small SAE with biases that are not zero, and a threshold where the architecture has one."""
    g = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=d_in, d_sae=d_sae, k=k, activation=activation), g)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.3, generator=g)
        sae.b_dec.normal_(0, 0.5, generator=g)
        if activation == "batch_topk":
            sae.threshold = torch.tensor(0.4)
        elif activation == "jumprelu":
            sae.threshold = torch.rand(d_sae, generator=g)
    return sae
