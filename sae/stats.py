"""What is known of each feature's activations over a set of tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """Statistics of every feature over `n_tokens` tokens, with the final weights. L latents."""

    max_act: Tensor
    """[L] fp32: the largest activation; 0 for a feature that never fired (a dead one)."""
    density: Tensor
    """[L] fp32: the share of tokens on which the feature is active."""
    mean_act: Tensor
    """[L] fp32: the mean activation over the tokens on which the feature is active; 0 for a dead one."""
    n_tokens: int
    """How many tokens these statistics are over."""
    median_norm: float
    """Median |x| of the activations the SAE was trained on: the unit of `norm_frac` strengths."""
