"""Editing single attention heads: their outputs at `hook_z`, before the output projection mixes them.

Head n of H holds the entries n d .. (n + 1) d of the state there, where d is the width over the number of QUERY heads,
also where several of them share their keys and values.

Shape letters: B rows of the batch, S tokens, H query heads, d width of a head; R rows of parameters.
"""

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.edits.base import Edit, Map, PerRow, Saved, blend, common_rows, per_row


def head_shape(lm: LanguageModel, hook: HookName) -> tuple[int, int]:
    """(H, d) at a hook_z: query heads, and the width of each.

    Raises SteersmanError for another hook point, and for a model whose configuration does not say how many heads.
    """
    point = lm.hook_point(hook)
    if point.kind != "hook_z":
        raise SteersmanError(f"heads are apart at a hook_z alone (blocks.0.hook_z, ...), not at {point.name}")
    n = getattr(lm.config, "num_attention_heads", None)
    if not isinstance(n, int) or n < 1 or point.width % n:
        raise SteersmanError(f"{point.name} of {lm.name} has width {point.width}, which {n} heads do not share evenly")
    return n, point.width // n


def z_hook(layer: int) -> str:
    """The hook point of a layer's head outputs."""
    return f"blocks.{layer}.attn.hook_z"


class HeadEdit(Edit):
    """z_n + strength ((keep_n - 1) z_n + v_n) for each head n: a vector of its own, and a factor on what it says.

    A vector alone (keep 1) is what inference-time intervention and function vectors add; keep 0 with a vector puts a
    given output in the place of the head's; keep 0 alone takes the head away.

    Args:
        vectors: v [H, d], or [R, H, d] for one per row; heads that are left alone have zeros.
        keep: [H]; None for 1.
        strength: a number or one per row.

    See `of` for chosen heads of a model.
    """

    name = "heads"

    def __init__(self, vectors: Tensor, keep: Tensor | None = None, strength: PerRow = 1.0) -> None:
        if vectors.ndim not in (2, 3) or vectors.numel() == 0:
            raise SteersmanError(f"vectors of heads must be [H, d] or [R, H, d], got {list(vectors.shape)}")
        vectors = vectors[None] if vectors.ndim == 2 else vectors
        keep = torch.ones(vectors.shape[1], device=vectors.device) if keep is None else keep
        if keep.shape != vectors.shape[1:2]:
            raise SteersmanError(f"keep must be [{vectors.shape[1]}], a factor per head, got {list(keep.shape)}")
        if not (bool(vectors.isfinite().all()) and bool(keep.isfinite().all())):
            raise SteersmanError("the vectors of heads hold NaN or infinite values")
        self.vectors, self.keep = vectors, keep
        self.strength = per_row(strength, "strength", vectors.device)
        self.rows = common_rows(vectors=len(vectors), strength=len(self.strength))
        self.active = (self.strength != 0).expand(self.rows)

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        hook: HookName,
        heads: Mapping[int, Tensor] | Iterable[int],
        *,
        keep: float = 1.0,
        strength: PerRow = 1.0,
    ) -> "HeadEdit":
        """The edit of chosen heads at a hook_z: {head: vector [d]}, or heads alone for their factor `keep`.

        HeadEdit.of(lm, "blocks.3.hook_z", [0, 5], keep=0.0)  # two heads are silent
        """
        H, d = head_shape(lm, hook)
        given = dict(heads) if isinstance(heads, Mapping) else dict.fromkeys(heads, torch.zeros(d))
        for head, v in given.items():
            if not 0 <= head < H:
                raise SteersmanError(f"there is no head {head} at {hook}: {lm.name} has {H} (0 to {H - 1})")
            if v.shape != (d,):
                raise SteersmanError(f"the vector of head {head} must be [{d}], got {list(v.shape)}")
        vectors, kept = torch.zeros(H, d, device=lm.device), torch.ones(H, device=lm.device)
        for head, v in given.items():
            vectors[head], kept[head] = v.to(vectors), keep
        return cls(vectors, kept, strength)

    def change(self, z: Tensor, fwd: ForwardPass | None = None) -> Tensor:
        """z' - z at full strength, for states z [B, S, H, d] or [..., H, d] of one row of vectors."""
        vectors = self.vectors[0] if fwd is None else self.expand(self.vectors, fwd)[:, None]
        return (self.keep.to(z) - 1)[:, None] * z + vectors.to(z)

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        strength = self.expand(self.strength.to(x), fwd)[:, None, None]
        change = self.change(x.unflatten(-1, self.vectors.shape[1:]), fwd).flatten(-2)
        return blend(h, (x + strength * change).to(h.dtype), where)

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        H, d = head_shape(lm, point.name)
        if self.vectors.shape[1:] != (H, d):
            got = " x ".join(map(str, self.vectors.shape[1:]))
            raise SteersmanError(f"this edit is of heads {got}, {point.name} of {lm.name} has {H} x {d}")

    def saved(self) -> Saved:
        return Saved({}, {"vectors": self.vectors.detach(), "keep": self.keep.detach(), "strength": self.strength})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls(**saved.tensors)

    def as_map(self, width: int) -> Map | None:
        if self.rows > 1:
            return None
        keep = self.keep.detach().cpu().double().repeat_interleave(self.vectors.shape[2])
        matrix = None if bool((keep == 1).all()) else torch.diag(keep)
        return Map(matrix, self.vectors[0].detach().cpu().double().flatten()).scaled(float(self.strength))

    def scaled(self, factor: PerRow) -> "HeadEdit":
        return HeadEdit(self.vectors, self.keep, self.strength * per_row(factor, "factor", self.strength.device))
