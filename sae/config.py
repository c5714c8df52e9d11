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


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the hook points that a crosscoder reads side by side."""

    hook_name: str
    """Hook point of the model whose activations these are, by its TransformerLens name."""
    width: int
    """Width of the activations."""
    model_name: str = ""
    """The model: a hub id or a path."""

    def __post_init__(self) -> None:
        check_types(self, "of a side")
        if self.width < 1:
            raise SteersmanError(f"a hook point has a width of at least 1, not {self.width}")

    def __str__(self) -> str:
        return f"{self.hook_name or 'a hook point not recorded'} of {self.model_name or 'an unknown model'}"


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
    sides: tuple[Side, ...] = ()
    """Crosscoders only: the hook points that it reads side by side, in the order of their columns."""
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

    def check_one_hook(self, purpose: str) -> None:
        """Raise a SteersmanError unless it is of one hook point. `purpose` names what needs that, such as
        "steering"."""
        if self.sides:
            have = "; ".join(f"{side_letter(number)}: {one}" for number, one in enumerate(self.sides))
            raise SteersmanError(
                f"{purpose} needs an SAE of one hook point; this is a crosscoder ({have}): crosscoder.at('A') is its "
                "decoder at one of them"
            )

    def side_number(self, side: int | str) -> int:
        """Which of `sides` is meant by a letter, a number from 0, or the hook point or model that one of them has.

        >>> sides = (Side(hook_name="blocks.0.hook_mlp_out", width=4), Side(hook_name="blocks.1.hook_mlp_out", width=4))
        >>> cfg = SAEConfig(d_in=8, d_sae=16, k=2, architecture="crosscoder", sides=sides)
        >>> cfg.side_number("B"), cfg.side_number("blocks.1.hook_mlp_out"), cfg.side_number(0)
        (1, 1, 0)
        """
        named = [(number, side_letter(number), one.hook_name, one.model_name) for number, one in enumerate(self.sides)]
        found = [names[0] for names in named if side in names]
        if len(found) != 1:
            have = "; ".join(f"{side_letter(number)}: {one}" for number, one in enumerate(self.sides))
            raise SteersmanError(f"{side!r} names {'several' if found else 'none'} of this crosscoder's sides ({have})")
        return found[0]

    def record(self) -> dict[str, Any]:
        """The configuration as files hold it, without its metadata: under the names that it always had."""
        fields = {_ON_DISK.get(name, name): value for name, value in asdict(self).items() if name != "metadata"}
        for name in _RECORDED_IF_SET:
            if not fields[name]:
                del fields[name]
        return fields

    @classmethod
    def from_record(cls, fields: Mapping[str, Any], **others: Any) -> SAEConfig:
        """The configuration of what `record` gave. Raises TypeError or ValueError for anything else."""
        ours = {name: ours for ours, name in _ON_DISK.items()}
        named = {ours.get(name, name): value for name, value in fields.items()}
        sizes = named.get("group_sizes")
        named["group_sizes"] = tuple(sizes) if isinstance(sizes, list) else sizes or ()
        if "sides" in named:
            named["sides"] = tuple(Side(**side) for side in named["sides"])
        return cls(**named, **others)


_ON_DISK = {"architecture": "activation"}
"""Fields that files know by another name."""
_RECORDED_IF_SET = ("options", "sides")


def side_letter(number: int) -> str:
    """What reports call a side by its number from 0: A to Z, then A2 and so on."""
    return chr(ord("A") + number % 26) + (str(number // 26 + 1) if number >= 26 else "")
