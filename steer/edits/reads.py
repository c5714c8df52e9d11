"""What an edit or a gate reads of a state: M numbers per token, by vectors, logistic probes or features of an SAE.

A reading also says what to write by default: the least change of h that raises reading m by one unit and leaves the
others as they are (for one vector the unit vector, for a probe w / |w|^2, for several vectors the rows of their
pseudo-inverse); for a feature its decoder row.

Shape letters: n tokens, D width; R rows of parameters (1 for all, or one per prompt), M readings per token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm import HookPoint, LanguageModel
from steersman.lm.origin import Origin, check_fits
from steersman.registry import Registry
from steersman.sae import SAE, SAEConfig
from steersman.steer.edits.base import Part, Saved
from steersman.steer.vectors.vector import SteeringVector

READS: Registry[type["Read"]] = Registry("reading")
"""Every reading that files know, by name."""

ANYWHERE = Origin()

VectorsLike = Tensor | Sequence[float] | Sequence[Sequence[float]] | SteeringVector


class Read(Part):
    """A function of a state. `origin` is the model and hook point it was made for, as far as they are known."""

    what: ClassVar[str] = "the reading"
    """What messages call it."""
    size: int = 1
    """M, the numbers it gives for each token."""
    costly: bool = False
    """Whether it pays to read the tokens in scope only."""
    scales: bool = False
    """Whether a unit of the default direction has a length of its own at each token."""
    of_means: bool = False
    """Whether a reading of many tokens is that of their mean state, rather than a mean of readings."""
    origin = ANYWHERE

    def __init_subclass__(cls) -> None:
        READS.register(cls, cls)

    def values(self, x: Tensor, row: Tensor | None = None) -> Tensor:
        """x [n, D] fp32 -> [n, M] fp32; `row` [n] names the row of parameters of each token, None where R = 1."""
        raise NotImplementedError  # each reading defines it

    def directions(self) -> Tensor:
        """[1 or R, M, D]: what is written by default. Raises SteersmanError for a reading that has none."""
        raise SteersmanError(f"{self.what} has no direction of its own to write along: give write=")

    def scale(self, x: Tensor) -> Tensor | None:
        """[n, 1]: the length of one unit of the default direction at each token; None where it is one for all."""
        return None

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        """Raise SteersmanError for a reading of another model, hook point or width."""
        model, hook, width = self.origin
        check_fits(lm, what=self.what, model_name=model, hook_name=hook, width=width, hook=point.name)


class Linear(Read):
    """weight_m . h + bias_m, with `weight` [1 or R, M, D] and `bias` [1 or R, M] or None."""

    name = "linear"
    what = "a linear reading"

    def __init__(self, weight: Tensor, bias: Tensor | None = None, origin: Origin = ANYWHERE) -> None:
        if weight.ndim != 3 or weight.numel() == 0:
            raise SteersmanError(f"the weight of a reading must be [R, M, D], got {tuple(weight.shape)}")
        if not bool(torch.isfinite(weight).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
            raise SteersmanError(f"{self.what} holds NaN or infinite values")
        self.weight, self.bias = weight.float(), None if bias is None else bias.float()
        self.rows, self.size = weight.shape[0], weight.shape[1]
        self.origin = Origin(origin.model_name, origin.hook_name, weight.shape[2])

    def values(self, x: Tensor, row: Tensor | None = None) -> Tensor:
        weight = self.weight.to(x.device)
        if self.rows == 1 or row is None:
            found = x @ weight[0].T  # one product for all tokens
            return found if self.bias is None else found + self.bias[0].to(x.device)
        found = (x[:, None] * weight[row]).sum(-1)
        return found if self.bias is None else found + self.bias.to(x.device)[row]

    def directions(self) -> Tensor:
        return _duals(self.weight)

    def saved(self) -> Saved:
        origin = {"model_name": self.origin.model_name, "hook_name": self.origin.hook_name}
        bias = {} if self.bias is None else {"bias": self.bias.detach().contiguous()}
        return Saved(origin, {"weight": self.weight.detach().contiguous(), **bias})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        read = cls.__new__(cls)
        weight, bias = saved.tensors["weight"], saved.tensors.get("bias")
        Linear.__init__(read, weight, bias, _origin(saved.settings))
        return read


class Projection(Linear):
    """h . v / |v|: the length of h along one vector [D], one per row [R, D], or several at once, [R or 1, M, D].

    Several vectors of all rows are `Projection.span([v1, v2])`: with rule `project_out` their whole span goes.
    """

    name = "projection"
    what = "a vector"

    def __init__(self, vectors: VectorsLike, *, model_name: str = "", hook_name: str = "") -> None:
        if isinstance(vectors, SteeringVector):
            model_name, hook_name = vectors.model_name, vectors.hook_name
            vectors = vectors.vector
        v = torch.as_tensor(vectors)
        if v.ndim not in (1, 2, 3) or v.numel() == 0:
            raise SteersmanError(f"a vector to read along must be [D], [R, D] or [R, M, D], got {tuple(v.shape)}")
        v = v.float()
        v = v[None, None] if v.ndim == 1 else v[:, None] if v.ndim == 2 else v
        length = v.norm(dim=-1, keepdim=True)
        if not bool((length > 0).all()):
            raise SteersmanError("a vector to read along is zero or not finite: it has no direction")
        super().__init__(v / length, None, Origin(model_name, hook_name))

    @classmethod
    def span(cls, vectors: Sequence[Any] | Tensor, *, model_name: str = "", hook_name: str = "") -> "Projection":
        """Several vectors [M, D] at once, the same for all rows: a list of tensors or `SteeringVector`s."""
        recorded = [v for v in vectors if isinstance(v, SteeringVector)]
        if recorded:
            model_name, hook_name = recorded[0].model_name, recorded[0].hook_name
            for v in recorded[1:]:
                recorded[0].dot(v)  # refuses vectors of different models
        rows = [v.vector if isinstance(v, SteeringVector) else torch.as_tensor(v) for v in vectors]
        if not rows or len({row.shape for row in rows}) > 1 or rows[0].ndim != 1:
            raise SteersmanError("a span is of one or more vectors of one width")
        return cls(torch.stack(rows)[None], model_name=model_name, hook_name=hook_name)


class Probe(Linear):
    """w . h + b, a logistic probe's logit: above 0 where it says yes. `weight` [D] or [R, D], `bias` a number or [R].

    A probe fitted on standardised states (z = (h - mean) / std) is w / std and b - w . (mean / std) here.
    """

    name = "probe"
    what = "a probe"

    def __init__(self, weight: Any, bias: Any = 0.0, *, model_name: str = "", hook_name: str = "") -> None:
        if isinstance(weight, SteeringVector):
            model_name, hook_name = weight.model_name, weight.hook_name
            weight = weight.vector
        w = torch.as_tensor(weight)
        w = w[None] if w.ndim == 1 else w
        b = torch.as_tensor(bias, dtype=torch.float32, device=w.device).reshape(-1)
        if w.ndim != 2 or len(b) not in (1, len(w)):
            raise SteersmanError(
                f"a probe is a weight [D] and a bias, or [R, D] and [R]; got {tuple(w.shape)} and {tuple(b.shape)}"
            )
        if not bool((w != 0).any(1).all()):
            raise SteersmanError("the weight of a probe is zero: it reads nothing")
        super().__init__(w[:, None], b.expand(len(w))[:, None], Origin(model_name, hook_name))


class Feature(Read):
    """f_j(h), the activations of one feature of an SAE or of several. In a file it brings the whole SAE."""

    name = "feature"
    what = "this SAE"
    costly = True

    def __init__(self, sae: SAE, features: int | Sequence[int] | Tensor) -> None:
        given = torch.as_tensor(features).reshape(-1).tolist()
        ids = [whole_number(j, "a feature id") for j in given]
        if not ids or len(set(ids)) < len(ids):
            raise SteersmanError("name at least one feature to read, and none of them twice")
        for j in ids:
            sae.check_feature(j)
        self.sae = sae
        self.ids = torch.tensor(ids, device=sae.W_dec.device)
        self.size = len(ids)
        self.scales = sae.cfg.input_norm != "none" and not sae.cfg.transcoder
        self.origin = Origin.of_sae(sae)

    def values(self, x: Tensor, row: Tensor | None = None) -> Tensor:
        return self.sae.encode_features(x.to(self.ids.device), self.ids).to(x.device)

    def directions(self) -> Tensor:
        self.sae.check_residual("writing along its features")
        return self.sae.W_dec[self.ids].detach().float()[None]

    def scale(self, x: Tensor) -> Tensor | None:
        scale = self.sae.token_scale(x.to(self.ids.device)) if self.scales else None
        return None if scale is None else scale.to(x.device)

    def saved(self) -> Saved:
        weights = {f"sae.{name}": tensor.detach() for name, tensor in self.sae.weights().items()}
        return Saved({"sae": self.sae.cfg.record()}, {"ids": self.ids, **weights})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        sae = SAE(SAEConfig.from_record(saved.settings["sae"]))
        sae.load_state_dict({name[4:]: t for name, t in saved.tensors.items() if name.startswith("sae.")})
        return cls(sae, saved.tensors["ids"])


class TanhSimilarity(Read):
    """cos(h, tanh(P h)) with P = c c^T / (c . c), the condition of CAST (arXiv 2409.05907, section 3.2) as it is
    published, of the mean state where there are many.

    It is even in c: a state along -c scores as one along +c, so it can tell how much a text has to do with c, and not
    on which side it stands. `Projection(c)` and `Probe` can.
    """

    name = "tanh_similarity"
    what = "a condition vector"
    of_means = True

    def __init__(self, vector: Any, *, model_name: str = "", hook_name: str = "") -> None:
        self.projection = Projection(vector, model_name=model_name, hook_name=hook_name)
        if self.projection.size != 1:
            raise SteersmanError("a condition vector is one vector, or one per row")
        self.rows, self.origin = self.projection.rows, self.projection.origin

    def values(self, x: Tensor, row: Tensor | None = None) -> Tensor:
        c = self.projection.weight[:, 0].to(x.device)
        c = c if self.rows == 1 or row is None else c[row]
        part = torch.tanh(self.projection.values(x, row) * c)
        return torch.cosine_similarity(x, part, dim=-1)[:, None]

    def saved(self) -> Saved:
        return self.projection.saved()

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls(saved.tensors["weight"], **saved.settings)


ReadLike = Read | VectorsLike | tuple[Any, Any]
"""A reading, a vector ([D], one per row [R, D], or a `SteeringVector`), or (w, b) of a logistic probe."""


def as_read(given: Any) -> Read:
    """The reading that is meant: see `ReadLike`."""
    if isinstance(given, Read):
        return given
    if isinstance(given, tuple) and len(given) == 2 and not isinstance(given[0], int | float):
        return Probe(*given)
    if isinstance(given, Tensor | list | SteeringVector):
        return Projection(given)
    raise SteersmanError(
        f"read= takes a vector, a Projection, a Probe or (w, b), or Feature(sae, j); got {type(given).__name__}"
    )


def _origin(settings: Mapping[str, Any]) -> Origin:
    return Origin(str(settings["model_name"]), str(settings["hook_name"]))


def _duals(weight: Tensor) -> Tensor:
    """[R, M, D]: rows p_m with p_m . w_k = (m == k), of least norm."""
    if weight.shape[1] == 1:
        return weight / weight.square().sum(-1, keepdim=True)
    return torch.linalg.pinv(weight.double()).mT.to(weight.dtype)
