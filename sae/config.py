"""What an SAE is: its widths, its architecture, and where its inputs come from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from steersman.config import check_types
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.registry import Registry

InputNorm = Literal["none", "layer_norm", "constant_norm"]

ARCHITECTURES: Registry[Any] = Registry("architecture")
"""The classes by name, seen as `SAE.architectures`; here, because each checks the configurations that name it."""


@renamed_fields(activation="architecture")
@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The shape and meaning of a sparse autoencoder or transcoder; saved with its weights.

    >>> SAEConfig(d_in=64, d_sae=512, k=8, hook_name="blocks.2.hook_resid_post").architecture
    'topk'
    """

    d_in: int
    """Width of the activations it reads (and, but for a transcoder, writes)."""
    d_sae: int
    """Number of features (latents)."""
    k: int = 0
    """Active features a token: exactly (topk, abs_topk), one of each of k groups (groupmax), on average while training
    (batch_topk, matryoshka), not used (the others)."""
    architecture: str = "topk"
    """How pre-activations become a sparse code: the name of one of `SAE.architectures`."""
    hook_name: str = ""
    """Hook point of the model whose activations it reads, by its TransformerLens name."""
    model_name: str = ""
    """The model those activations come from: a hub id or a path."""
    apply_b_dec_to_input: bool = True
    """Whether the decoder bias is subtracted from the input before encoding."""
    input_norm: InputNorm = "none"
    """What is done to each token before encoding and undone after decoding: nothing; its mean and unbiased standard
    deviation taken out (layer_norm); its length set to the square root of d_in (constant_norm)."""
    reshape_heads: bool = False
    """Whether inputs may come per attention head, [..., n_heads, d_head], as at `attn.hook_z`."""
    transcoder: bool = False
    """Whether it writes the activations of another hook point than it reads."""
    d_out: int | None = None
    """Width of what a transcoder writes; None where it is d_in."""
    hook_name_out: str = ""
    """Hook point whose activations a transcoder writes."""
    skip_connection: bool = False
    """Whether the output also has a linear part, `x W_skip^T` of the input as it came."""
    group_sizes: tuple[int, ...] = ()
    """Matryoshka only: how many features each group adds; the first groups alone are an SAE too."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings that the architecture has of its own, by name; those left out are at its defaults."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Provenance: anything worth keeping that does not change what the SAE computes."""

    def __post_init__(self) -> None:
        check_types(self, "of an SAE")
        if self.d_in < 1 or self.d_sae < 1 or self.out_width < 1:
            widths = f"{self.d_in} and {self.d_sae}" + ("" if self.d_out is None else f" (d_out {self.d_out})")
            raise SteersmanError(f"an SAE needs d_in and d_sae of at least 1, not {widths}")
        if self.out_width != self.d_in and not self.transcoder:
            raise SteersmanError(f"d_out = {self.d_out} differs from d_in = {self.d_in}: set transcoder=True")
        if self.transcoder and self.apply_b_dec_to_input:
            raise SteersmanError("a transcoder's b_dec belongs to its output: set apply_b_dec_to_input=False")
        if self.group_sizes and (min(self.group_sizes) < 1 or sum(self.group_sizes) != self.d_sae):
            raise SteersmanError(f"group_sizes {list(self.group_sizes)} must add up to d_sae = {self.d_sae}")
        ARCHITECTURES[self.architecture].check(self)

    @property
    def out_width(self) -> int:
        """Width of what it writes."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def hook_layer(self) -> int | None:
        """The block its hook point lies in, as SAEBench asks for it; None where the name holds no number."""
        match = re.search(r"\.(\d+)(?:\.|$)", self.hook_name)
        return None if match is None else int(match[1])

    def record(self) -> dict[str, Any]:
        """The configuration as files hold it, without its metadata: under the names that it always had."""
        fields = {_ON_DISK.get(name, name): value for name, value in asdict(self).items() if name != "metadata"}
        if not self.options:
            del fields["options"]
        return fields

    @classmethod
    def from_record(cls, fields: Mapping[str, Any], **others: Any) -> SAEConfig:
        """The configuration of what `record` gave. Raises TypeError or ValueError for anything else."""
        ours = {name: ours for ours, name in _ON_DISK.items()}
        named = {ours.get(name, name): value for name, value in fields.items()}
        sizes = named.get("group_sizes")
        named["group_sizes"] = tuple(sizes) if isinstance(sizes, list) else sizes or ()
        return cls(**named, **others)


_ON_DISK = {"architecture": "activation"}
"""Fields that files know by another name."""
