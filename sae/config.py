"""What an SAE is: its widths, its activation, and where its inputs come from."""

from dataclasses import dataclass, field
from typing import Any, Literal

from steersman.errors import SteersmanError

Activation = Literal["topk", "batch_topk", "jumprelu"]


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The shape and meaning of a sparse autoencoder; saved with its weights.

    >>> SAEConfig(d_in=64, d_sae=512, k=8, hook_name="blocks.2.hook_resid_post").activation
    'topk'
    """

    d_in: int
    """Width of the activations it reads and writes."""
    d_sae: int
    """Number of features (latents)."""
    k: int = 0
    """Active features a token: exactly (topk), on average (batch_topk), not used (jumprelu)."""
    activation: Activation = "topk"
    """How pre-activations become a sparse code."""
    hook_name: str = ""
    """Hook point of the model whose activations it reads, by its TransformerLens name."""
    model_name: str = ""
    """The model those activations come from: a hub id or a path."""
    apply_b_dec_to_input: bool = True
    """Whether the decoder bias is subtracted from the input before encoding."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Provenance: anything worth keeping that does not change what the SAE computes."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise SteersmanError(f"an SAE needs d_in and d_sae of at least 1, not {self.d_in} and {self.d_sae}")
        if self.activation not in ("topk", "batch_topk", "jumprelu"):
            raise SteersmanError(f"unknown activation {self.activation!r}; use topk, batch_topk or jumprelu")
        if self.activation != "jumprelu" and not 1 <= self.k <= self.d_sae:
            raise SteersmanError(f"k = {self.k} must lie between 1 and d_sae = {self.d_sae}")
