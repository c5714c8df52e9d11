"""An affine map of the state: h' = h + U (V^T (h - mu)) + b, of full or of low rank.

Shape letters: B rows of the batch, S tokens, D width, r rank; R rows of strengths.
"""

from typing import Any, Self

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.lm.origin import check_fits
from steersman.steer.edits.base import Edit, Map, PerRow, Saved, blend, per_row


class AffineEdit(Edit):
    """h + strength (U (V^T (h - mu)) + b).

    The product is formed in fp32 (fp64 for states that are) and cast to h's dtype; gradients flow to the tensors that
    ask for them.

    Args:
        write: U [D, r], or [D, D] where `read` is left out; None for a map that only shifts.
        read: V [D, r]; None for the identity.
        mean: mu [D], what is taken off before it is read; None for zero.
        shift: b [D]; None for zero.
        strength: a number or one per row: 0 changes nothing, 1 is the map.

    Raises SteersmanError for shapes that do not belong together and numbers that are not finite.

    >>> flip = AffineEdit(write=torch.tensor([[-2.0], [0.0]]), read=torch.tensor([[1.0], [0.0]]))  # mirrors the first
    >>> flip.rank, flip.width
    (1, 2)
    """

    name = "affine"

    def __init__(
        self,
        *,
        write: Tensor | None = None,
        read: Tensor | None = None,
        mean: Tensor | None = None,
        shift: Tensor | None = None,
        strength: PerRow = 1.0,
    ) -> None:
        given = {"write": write, "read": read, "mean": mean, "shift": shift}
        for what, tensor in given.items():
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise SteersmanError(f"the {what} of an affine edit holds NaN or infinite values")
        if write is None and (shift is None or read is not None or mean is not None):
            raise SteersmanError("an affine edit needs a write matrix [D, r], or a shift [D] alone")
        main = shift if write is None else write
        assert main is not None
        self.width = len(main)
        shapes = {
            "write": None if write is None else (self.width, self.width if read is None else read.shape[-1]),
            "read": None if read is None or write is None else (self.width, write.shape[-1]),
            "mean": (self.width,),
            "shift": (self.width,),
        }
        for what, tensor in given.items():
            if tensor is not None and tuple(tensor.shape) != shapes[what]:
                raise SteersmanError(
                    f"the {what} of an affine edit of width {self.width} must be {list(shapes[what] or ())}, got "
                    f"{list(tensor.shape)}"
                )
        self.write, self.read, self.mean, self.shift = write, read, mean, shift
        self.strength = per_row(strength, "strength", main.device)
        self.rows = len(self.strength)
        self.active = self.strength != 0

    @classmethod
    def of_matrix(cls, matrix: Tensor, source: Tensor, target: Tensor) -> Self:
        """h' = target + A (h - source): `matrix` A [D, D], `source` and `target` [D] the states that it joins."""
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return cls(write=matrix - identity, mean=source, shift=target - source)

    @property
    def rank(self) -> int:
        """Columns that the state is read through: what a token costs is 2 D r products, D^2 at full rank."""
        return 0 if self.write is None else self.write.shape[1]

    def change(self, x: Tensor) -> Tensor:
        """h' - h at full strength, for states x [..., D] of at least fp32."""
        centred = x if self.mean is None else x - self.mean.to(x)
        if self.write is None:
            change = torch.zeros_like(x)
        else:
            read = centred if self.read is None else centred @ self.read.to(x)
            change = read @ self.write.to(x).T
        return change if self.shift is None else change + self.shift.to(x)

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        strength = self.expand(self.strength.to(x), fwd)[:, None, None]
        return blend(h, (x + strength * self.change(x)).to(h.dtype), where)

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        if not point.holds_states:
            raise SteersmanError(f"an affine edit maps hidden states: {point.name} holds none")
        what = f"an affine edit of width {self.width}"
        check_fits(lm, what=what, model_name="", hook_name=point.name, width=self.width)

    def scaled(self, factor: PerRow) -> "AffineEdit":
        return AffineEdit(
            write=self.write,
            read=self.read,
            mean=self.mean,
            shift=self.shift,
            strength=self.strength * per_row(factor, "factor", self.strength.device),
        )

    def saved(self) -> Saved:
        parts = {"write": self.write, "read": self.read, "mean": self.mean, "shift": self.shift}
        tensors = {name: part.detach() for name, part in parts.items() if part is not None}
        return Saved({}, {**tensors, "strength": self.strength})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls(**saved.tensors)

    def as_map(self, width: int) -> Map | None:
        if self.rows > 1:
            return None
        offset = self.change(torch.zeros(self.width, dtype=torch.float64)).detach()
        if self.write is None:
            return Map(None, offset).scaled(float(self.strength))
        write = self.write.detach().cpu().double()
        matrix = write if self.read is None else write @ self.read.detach().cpu().double().T
        return Map(torch.eye(self.width, dtype=torch.float64) + matrix, offset).scaled(float(self.strength))


class LoReFTEdit(Edit):
    """h + R^T (W h + b - R h), with R [r, D] of orthonormal rows, W [r, D] and b [r]: the state's part in an
    r-dimensional subspace is replaced by a linear function of the state. Source: arXiv 2404.03592 (ReFT), equation 2.

    It is an `AffineEdit` of rank r (see `affine`) whose parameters can be trained. Where `rotation` asks for gradients
    its rows are made orthonormal in every pass (by a QR decomposition whose signs leave rows that are so already where
    they are), so that an optimiser may move it freely. The paper edits the first and last few prompt tokens, and its
    released code adds dropout; here the scope says which tokens.
    """

    name = "loreft"

    def __init__(self, rotation: Tensor, weight: Tensor, bias: Tensor, strength: PerRow = 1.0) -> None:
        if rotation.ndim != 2 or weight.shape != rotation.shape or bias.shape != rotation.shape[:1]:
            raise SteersmanError(
                f"LoReFT needs R [r, D], W [r, D] and b [r], got {list(rotation.shape)}, {list(weight.shape)} and "
                f"{list(bias.shape)}"
            )
        if not 0 < len(rotation) <= rotation.shape[1]:
            raise SteersmanError(f"LoReFT of rank {len(rotation)} does not fit into width {rotation.shape[1]}")
        self.rotation, self.weight, self.bias = rotation, weight, bias
        self.strength = per_row(strength, "strength", rotation.device)
        self.rows = len(self.strength)
        self.active = self.strength != 0
        self._ready: tuple[Any, AffineEdit] | None = None

    @classmethod
    def start(cls, width: int, rank: int, seed: int = 0) -> "LoReFTEdit":
        """A map to train from: a random subspace, and W = R, b = 0, which changes nothing but by rounding."""
        generator = torch.Generator().manual_seed(seed)
        rotation = _orthonormal(torch.randn(rank, width, generator=generator))
        return cls(rotation, rotation.clone(), torch.zeros(rank))

    def parameters(self) -> dict[str, Tensor]:
        """The tensors to train, by name."""
        return {"rotation": self.rotation, "weight": self.weight, "bias": self.bias}

    def affine(self) -> AffineEdit:
        """The same map as U (V^T h) + c, with U = R^T, V = (W - R)^T and c = R^T b."""
        parts = self.parameters().values()
        trains = any(part.requires_grad for part in parts)
        version = [part._version for part in parts]
        if self._ready is not None and not trains and self._ready[0] == version:
            return self._ready[1]
        rotation = _orthonormal(self.rotation.float())
        weight, bias = self.weight.float(), self.bias.float()
        return AffineEdit(write=rotation.T, read=(weight - rotation).T, shift=rotation.T @ bias, strength=self.strength)

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        return self.affine().apply(h, fwd, where)

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        self.affine().check(lm, point)

    def saved(self) -> Saved:
        tensors = {name: part.detach() for name, part in self.parameters().items()}
        return Saved({}, {**tensors, "strength": self.strength})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls(**saved.tensors)

    def as_map(self, width: int) -> Map | None:
        return self.affine().as_map(width)

    def scaled(self, factor: PerRow) -> "LoReFTEdit":
        strength = self.strength * per_row(factor, "factor", self.strength.device)
        return LoReFTEdit(self.rotation, self.weight, self.bias, strength)


def _orthonormal(rows: Tensor) -> Tensor:
    """The rows [r, D] made orthonormal one after the other; rows that are so already stay, up to rounding."""
    q, upper = torch.linalg.qr(rows.T)
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(q)
    return (q * sign).T
