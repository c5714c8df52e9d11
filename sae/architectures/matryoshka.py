"""Matryoshka SAEs (arXiv 2503.17547) over BatchTopK or TopK: groups of features whose first ones are SAEs of their own.

One code is decoded by every prefix of the features, and the loss is the sum of the squared errors (sec. 3; SAELens sums
too, dictionary_learning's trainer takes a mean, which Adam does not tell apart):

    sum over m in M of |x - (f(x)_{0:m} W_dec_{0:m} + b_dec)|^2 + AuxK

`squared_error` is that of all features, so that it means what it means elsewhere, and `nested` the sum of the others.
The selection is over all features, once: a prefix has as many active features as fall into it.

The dead features of a group learn what that group's SAE leaves over (SAELens' `use_matryoshka_aux_loss`): `aux` is the
sum over the groups of `|r_g - rebuilt by the group's dead features|^2`, the k_aux largest dead pre-activations of a
token over all groups.

With the option `drawn`, that many prefixes are drawn for each step, the whole SAE always among them: the others with a
chance that falls with the root of their width, P(m) ~ sqrt(m) - sqrt(m - 1) (the authors' second variant, the Pareto
distribution of Nabeshima 2024). `group_sizes` then only say what `nested` gives.

Shape letters: N tokens, L latents, D width, K active latents a token, G groups, A candidates of AuxK.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.kernels import AuxRows, gather_rows, ops
from steersman.kernels.nested import pair_rows, prefix_errors, prefix_residuals, suffix_sums_
from steersman.kernels.torch_ops import scaled
from steersman.sae.architectures.auxk import AuxKSAE, auxk_code
from steersman.sae.architectures.batch_topk import BatchTopKSAE
from steersman.sae.architectures.topk import TopKSAE
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig
from steersman.sae.fused import FusedBatch, Gradients, product
from steersman.sae.training import AuxTerm, Step, TrainingState


class NestedSAE(AuxKSAE):
    """What Matryoshka SAEs share: their losses, and the SAEs within them. `cfg.group_sizes` says where those end."""

    uses_groups = True
    rate = 0.5
    plain: ClassVar[str] = ""
    """The architecture of one prefix."""
    defaults: ClassVar[Mapping[str, Any]] = {"drawn": 0}
    """`drawn` is how many prefixes are drawn for a step; 0: those of `group_sizes`, in every step."""

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        super().check(cfg)
        drawn = cfg.options.get("drawn", 0)
        if not isinstance(drawn, int) or isinstance(drawn, bool) or not 0 <= drawn <= cfg.d_sae:
            raise SteersmanError(
                f"option drawn must be a number of prefixes from 0 to d_sae = {cfg.d_sae}, got {drawn!r}"
            )

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, generator)
        if self.options["drawn"]:  # they come from the host, anew for each step
            self.host_free = False  # pyright: ignore[reportAttributeAccessIssue]

    def prefixes(self, state: TrainingState) -> tuple[int, ...]:
        """The widths of the SAEs whose errors a step minimises; the last is the whole."""
        whole, drawn = self.whole_cfg, self.options["drawn"]
        if not drawn:
            return tuple(accumulate(whole.group_sizes))
        generator = torch.Generator().manual_seed(getattr(state.config, "seed", 0) * 0x9E3779B1 + state.step)
        found = {whole.d_sae}
        while len(found) < drawn:
            u = torch.rand((), generator=generator, dtype=torch.float64)
            found.add(int(whole.d_sae * u.square()) + 1)
        return tuple(sorted(found))

    def _ends(self, state: TrainingState) -> Tensor:
        """Where the groups end among the latents here, [G] int64. Made once for the same prefixes, so that a CUDA graph
        finds it on the device."""
        widths = self.prefixes(state)
        known = self.__dict__.get("_known_ends")
        if known is None or known[0] != widths or known[1].device != self.device:
            here = [min(max(width - self.latents.first, 0), self.cfg.d_sae) for width in widths]
            known = widths, torch.tensor(here, device=self.device)
            self.__dict__["_known_ends"] = known
        return known[1]

    def _total(self) -> Any:
        """What adds up the ranks' parts of the reconstructions; None where this process has all latents."""
        return None if self.latents.whole is None else self.latents.sum

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        code, ends = self.encode_training(x), self._ends(state)
        residuals, errors = prefix_errors(code.values, code.order, self.W_dec, self.b_dec, target, ends, self._total())
        losses, logged = _named(errors), {}
        if (aux := state.aux) is not None:
            loss = aux.weight * self._auxk_loss(x, residuals, aux, ends)
            losses["aux"], logged["aux"] = aux.coefficient * loss, loss.detach()
        return Step(code, losses, logged)

    def _auxk_loss(self, x: Tensor, residuals: Tensor, aux: AuxTerm, ends: Tensor) -> Tensor:
        code = auxk_code(self, x, aux.candidates, aux.alive, aux.k, aux.width)
        groups, rows = Groups(aux.candidates, ends), gather_rows(self.W_dec, aux.candidates)
        rebuilt = self.latents.sum(groups.products(code, rows))
        return (rebuilt - residuals).square().sum()

    @torch.no_grad()
    def fused_gradients(self, batch: FusedBatch) -> tuple[Step, Gradients]:
        weights, aux, ends = batch.weights, batch.state.aux, self._ends(batch.state)
        code = self.encode_training(batch.x, weights.enc_rows)
        values, indices, W_dec = code.values, code.order.indices, weights.dec_rows
        target = scaled(batch.target, batch.scale)
        residuals, errors = prefix_residuals(values, indices, W_dec, weights.b_dec, target, ends, self._total())
        losses, logged, aux_rows = _named(errors), {}, None
        if aux is not None:
            weight = aux.weight * (aux.coefficient / batch.n_values)
            loss, aux_rows = self._auxk_gradients(batch, residuals, aux, weight, ends)
            logged["aux"] = aux.weight * loss
            losses["aux"] = aux.coefficient * logged["aux"]
        table = suffix_sums_(residuals).flatten(0, 1).to(batch.x.dtype)
        rows = pair_rows(indices, ends)
        dots = ops.value_gradient(table, W_dec, indices, rows)
        return Step(code, losses, logged), Gradients(table, -2 / batch.n_values, dots, aux_rows, rows=rows)

    def _auxk_gradients(
        self, batch: FusedBatch, residuals: Tensor, aux: AuxTerm, scale: Tensor, ends: Tensor
    ) -> tuple[Tensor, AuxRows]:
        """As `auxk.auxk_gradients`, for the loss of `_auxk_loss`."""
        candidates, dtype, groups = aux.candidates, batch.x.dtype, Groups(aux.candidates, ends)
        enc, dec = batch.weights.enc_rows[candidates], batch.weights.dec_rows[candidates]
        code = auxk_code(self, batch.x, candidates, aux.alive, aux.k, aux.width, enc)
        small = code.to(dtype)
        error = self.latents.sum(groups.products(small, dec)) - residuals
        g = (error * (2 * scale)).to(dtype)
        d_code = groups.to_code(g, dec).masked_fill(code == 0 if self.signed else code <= 0, 0.0)
        latents = torch.where(aux.alive, self.cfg.d_sae, candidates)
        dW_enc = product(d_code.to(dtype).T, batch.x)
        return error.square().sum(), AuxRows(latents, dW_enc, d_code.sum(dim=0), groups.to_rows(small, g))

    def nested(self, n_groups: int) -> SAE:
        """The SAE of the first `n_groups` groups of features. It shares its weights with this one.

        >>> from steersman.sae import SAEConfig
        >>> sae = MatryoshkaSAE(SAEConfig(d_in=4, d_sae=12, k=2, architecture="matryoshka", group_sizes=(2, 4, 6)))
        >>> sae.nested(2).cfg.d_sae
        6
        """
        ends = list(accumulate(self.cfg.group_sizes))
        if not 1 <= n_groups <= len(ends):
            raise SteersmanError(f"there are {len(ends)} groups of features, not {n_groups}")
        width = ends[n_groups - 1]
        cfg = replace(
            self.cfg, d_sae=width, k=min(self.cfg.k, width), architecture=self.plain, group_sizes=(), options={}
        )
        sae = SAE(cfg)
        sae.W_enc, sae.W_dec = nn.Parameter(self.W_enc[:, :width]), nn.Parameter(self.W_dec[:width])
        sae.b_enc, sae.b_dec = nn.Parameter(self.b_enc[:width]), self.b_dec
        if self.cfg.skip_connection:
            sae.W_skip = self.W_skip
        for name, buffer in self.named_buffers():
            setattr(sae, name, buffer)
        return sae


class MatryoshkaSAE(NestedSAE, BatchTopKSAE):
    """Selects and encodes as BatchTopK does, by one threshold."""

    name, saelens_name, plain = "matryoshka", "jumprelu", "batch_topk"


class MatryoshkaTopKSAE(NestedSAE, TopKSAE):
    """Selects as TopK does: the K largest of all features. `nested` gives a TopK SAE, of the K largest of its own."""

    name, saelens_name, plain = "matryoshka_topk", "topk", "topk"


def _named(errors: Tensor) -> dict[str, Tensor]:
    return {"squared_error": errors[-1], "nested": errors[:-1].sum()}


class Groups:
    """The candidates of AuxK by their groups.

    On a CPU the products are those of each group's own candidates; elsewhere, where asking how many those are would
    make the host wait, they are of all with the others' places empty.
    """

    def __init__(self, candidates: Tensor, ends: Tensor) -> None:
        group = torch.bucketize(candidates, ends, right=True)
        self._order: Tensor | None = None
        if candidates.device.type == "cpu":
            self._order = torch.argsort(group, stable=True)
            counts = torch.bincount(group, minlength=len(ends)).tolist()
            self._slices = [slice(*pair) for pair in pairwise([0, *accumulate(counts)])]
        self._members = [group == g for g in range(len(ends))]

    def products(self, code: Tensor, rows: Tensor) -> Tensor:
        """What each group's candidates rebuild: code [N, A], rows [A, D] -> [G, N, D] fp32."""
        if self._order is None:
            zero = torch.zeros_like(code)
            return torch.stack([product(torch.where(of, code, zero), rows) for of in self._members])
        code, rows = code[:, self._order], rows[self._order]
        return torch.stack([product(code[:, part], rows[part]) for part in self._slices])

    def to_code(self, g: Tensor, rows: Tensor) -> Tensor:
        """The gradient of the code [N, A] from that of `products`, g [G, N, D]."""
        if self._order is None:
            found = g.new_zeros(g.shape[1], len(rows), dtype=torch.float32)
            for of, mine in zip(self._members, g):
                found = torch.where(of, product(mine, rows.T), found)
            return found
        rows = rows[self._order]
        parts = [product(mine, rows[part].T) for part, mine in zip(self._slices, g)]
        return torch.cat(parts, dim=1)[:, torch.argsort(self._order)]

    def to_rows(self, code: Tensor, g: Tensor) -> Tensor:
        """The gradient of the rows [A, D] from that of `products`, g [G, N, D]."""
        if self._order is None:
            zero = torch.zeros_like(code)
            return sum(product(torch.where(of, code, zero).T, mine) for of, mine in zip(self._members, g))  # pyright: ignore[reportReturnType]
        code = code[:, self._order]
        parts = [product(code[:, part].T, mine) for part, mine in zip(self._slices, g)]
        return torch.cat(parts)[torch.argsort(self._order)]
