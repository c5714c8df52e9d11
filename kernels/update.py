"""The fused backward pass and update of a training step, in PyTorch: it defines what the Triton kernels compute.

One call takes the gradient of the reconstruction and moves every weight: the latents' gradients, the part of the
decoder's gradient along its rows removed, Adam or Signum, decoder rows made unit vectors, and the weights written a
second time in the dtype of the matrix products. In Triton no dense gradient is ever written; here there is one at a
time.

Update rules, for a gradient g, learning rate r and step t (from 1):

- adam (arXiv 1412.6980, alg. 1): `m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w -= r / (1-b1^t) m / (sqrt(v) /
  sqrt(1-b2^t) + eps)`. Every row moves every step, whether or not it has a gradient: equal to dense Adam.
- signum (arXiv 1802.04434, alg. 1): `m = b1 m + (1-b1) g; w -= r sign(m)`. Every row moves.
- adam_touched, signum_touched: the same for rows that the step gave a gradient (a feature that fired, or a dead one
  that AuxK may train); all others, with their moments, stay as they are. t still counts the steps of the run.

Shape letters: N tokens, L latents, D width, K active latents a token, A rows with a gradient of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steersman.kernels import reference, rounding, torch_ops

RuleName = Literal["adam", "adam_touched", "signum", "signum_touched"]
"""Names of the update rules of the fused update."""
StateDtype = Literal["float32", "bfloat16", "int8"]
"""What the moments of the weights are kept in."""

PART = 512
"""Latents whose share of the gradient of b_dec is summed first, so that the sum does not depend on who has them."""
ROWS_AT_ONCE = 1024
"""Rows that are updated together: their temporaries stay in cache."""


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How a gradient moves the weights."""

    name: RuleName = "adam"
    """The update rule; see the module's docstring."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment; Signum has none."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    state_dtype: StateDtype = "float32"
    """What the moments of W_enc and W_dec are kept in; those of the biases are always fp32."""

    @property
    def adam(self) -> bool:
        return self.name.startswith("adam")

    @property
    def touched_only(self) -> bool:
        return self.name.endswith("_touched")


class Moments(NamedTuple):
    """The moments of one matrix [L, D] (or vector); second moments and exponents where the rule and dtype have them."""

    m: Tensor
    v: Tensor | None
    m_exponents: Tensor | None
    v_exponents: Tensor | None


def new_moments(like: Tensor, rule: UpdateRule) -> Moments:
    """Moments of zero for a matrix or vector."""
    dtype = rule.state_dtype if like.dim() == 2 else "float32"
    kinds = {"float32": (torch.float32,) * 2, "bfloat16": (torch.bfloat16,) * 2, "int8": (torch.int8, torch.uint8)}
    m, v = (torch.zeros(like.shape, dtype=kind, device=like.device) for kind in kinds[dtype])
    if dtype != "int8":
        return Moments(m, v if rule.adam else None, None, None)
    blocks = (len(like), -(-like.shape[1] // rounding.BLOCK))
    m_exponents, v_exponents = (torch.zeros(blocks, dtype=torch.uint8, device=like.device) for _ in range(2))
    return Moments(m, v if rule.adam else None, m_exponents, v_exponents if rule.adam else None)


class AuxRows(NamedTuple):
    """Gradients that some latents have beside the code's: those of the AuxK loss. Rows of zero do no harm."""

    latents: Tensor
    """[A] int64, each at most once; L (one past the last latent) for a row that counts for nothing."""
    dW_enc: Tensor
    """[A, D] fp32."""
    db_enc: Tensor
    """[A] fp32."""
    dW_dec: Tensor
    """[A, D] fp32."""


@dataclass(frozen=True, kw_only=True)
class UpdateState:
    """What the fused update reads and writes: weights, the rows that products read, moments and the step counter."""

    W_enc: Tensor
    """[L, D] fp32, latent-major."""
    W_dec: Tensor
    """[L, D] fp32, unit rows."""
    b_enc: Tensor
    """[L] fp32."""
    b_dec: Tensor
    """[D] fp32."""
    enc_rows: Tensor
    """[L, D]: W_enc in the dtype of the products; W_enc itself where that is fp32."""
    dec_rows: Tensor
    """[L, D]: W_dec in the dtype of the products; W_dec itself where that is fp32."""
    moments: dict[str, Moments]
    """By parameter: W_enc, W_dec, b_enc, b_dec."""
    n_steps: Tensor
    """[1] int32: steps done."""
    first_latent: int = 0
    """The number of the first latent among all, where others have the rest: random bits go by it."""

    @staticmethod
    def of(
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        rule: UpdateRule,
        operands: torch.dtype,
        first_latent: int = 0,
    ) -> "UpdateState":
        """A state before the first step; it holds the given weights, not copies of them."""
        own = operands == torch.float32
        parameters = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
        return UpdateState(
            **parameters,
            enc_rows=W_enc if own else W_enc.to(operands),
            dec_rows=W_dec if own else W_dec.to(operands),
            moments={name: new_moments(value, rule) for name, value in parameters.items()},
            n_steps=torch.zeros(1, dtype=torch.int32, device=W_enc.device),
            first_latent=first_latent,
        )

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def flatten(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The tensors that a step changes, as plain lists, each once: weights, rows for products, moments."""
        rows = [] if self.enc_rows is self.W_enc else [self.enc_rows, self.dec_rows]
        moments = [t for each in self.moments.values() for t in each if t is not None]
        return [self.W_enc, self.W_dec, self.b_enc, self.b_dec], rows, moments

    @staticmethod
    def unflatten(
        rule: UpdateRule,
        weights: Sequence[Tensor],
        rows: Sequence[Tensor],
        moments: Sequence[Tensor],
        n_steps: Tensor,
        first_latent: int = 0,
    ) -> "UpdateState":
        """The object that `flatten` took apart."""
        left, named = iter(moments), {}
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            blocks = rule.state_dtype == "int8" and name.startswith("W")
            has = (True, rule.adam, blocks, blocks and rule.adam)
            named[name] = Moments(*(next(left) if there else None for there in has))  # pyright: ignore[reportArgumentType]
        W_enc, W_dec, b_enc, b_dec = weights
        enc_rows, dec_rows = rows or (W_enc, W_dec)
        return UpdateState(
            W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec, enc_rows=enc_rows, dec_rows=dec_rows, moments=named,
            n_steps=n_steps, first_latent=first_latent,
        )  # fmt: skip

    def refresh(self) -> None:
        """Make the rows that products read from the weights again, after something else changed those."""
        if self.enc_rows is not self.W_enc:
            self.enc_rows.copy_(self.W_enc)
            self.dec_rows.copy_(self.W_dec)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counter, by name; with the weights, all that is needed to go on."""
        tensors = {"n_steps": self.n_steps}
        for name, moments in self.moments.items():
            tensors |= {f"{name}.{field}": t for field, t in moments._asdict().items() if t is not None}
        return tensors


class StepSizes(NamedTuple):
    """The step's learning rates with Adam's corrections for zero initial moments, on the device: scalars [1]."""

    weights: Tensor
    biases: Tensor
    inverse_root: Tensor
    """`1 / sqrt(1 - b2^t)`."""

    @staticmethod
    def of(rule: UpdateRule, n_steps: Tensor, lr: Tensor, bias_lr: Tensor) -> "StepSizes":
        """n_steps [1] counts this step; lr and bias_lr are [1] on the device."""
        if not rule.adam:
            return StepSizes(lr, bias_lr, torch.ones_like(lr))
        t = n_steps.double()
        first = (1 / (1 - rule.beta1**t)).float()
        second = (1 - rule.beta2**t).rsqrt().float()
        return StepSizes(lr * first, bias_lr * first, second)


def apply_rule(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor | None, rule: UpdateRule, size: Tensor, inverse_root: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One step of the rule on fp32 tensors of one shape: the weights and moments after it."""
    m = rule.beta1 * m + (1 - rule.beta1) * grad
    if v is None:
        return w - size * m.sign(), m, None
    v = rule.beta2 * v + (1 - rule.beta2) * (grad * grad)
    return w - size * (m / (v.sqrt() * inverse_root + rule.eps)), m, v


def update_matrix(
    W: Tensor,
    rows: Tensor,
    grad: Tensor,
    moments: Moments,
    touched: Tensor,
    rule: UpdateRule,
    sizes: StepSizes,
    seed: Tensor,
    *,
    unit: bool,
    first: int = 0,
) -> None:
    """Move W [L, D] by grad [L, D], write `rows` (W in another dtype, or W itself) and the moments.

    touched [L] bool says which rows move under a touched-only rule; seed [1] int32 and `first`, the number of the first
    row, are the rounding's; `unit` makes every row that moved a unit vector.
    """
    for start in range(0, len(W), ROWS_AT_ONCE):
        part = slice(start, min(start + ROWS_AT_ONCE, len(W)))
        old, m, v = W[part], _read(moments.m, moments.m_exponents, part), None
        if moments.v is not None:
            v = _read(moments.v, moments.v_exponents, part)
        new, m, v = apply_rule(old, grad[part], m, v, rule, sizes.weights, sizes.inverse_root)
        if unit:
            new = new / new.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        keep = touched[part, None] if rule.touched_only else None
        random = None
        if rule.state_dtype != "float32":
            numbers = torch.arange(first + part.start, first + part.stop, dtype=torch.int32, device=W.device)
            random = rounding.random_bits(numbers, W.shape[1], seed)
        _write(moments.m, moments.m_exponents, m, random, part, keep, signed=True)
        if moments.v is not None and v is not None:
            shifted = None if random is None else random >> 16
            _write(moments.v, moments.v_exponents, v, shifted, part, keep, signed=False)
        W[part] = new if keep is None else torch.where(keep, new, old)
        if rows is not W:
            rows[part] = W[part].to(rows.dtype)


def _read(data: Tensor, exponents: Tensor | None, part: slice) -> Tensor:
    return data[part].float() if exponents is None else rounding.from_blocks(data[part], exponents[part])


def _write(
    data: Tensor,
    exponents: Tensor | None,
    x: Tensor,
    random: Tensor | None,
    part: slice,
    keep: Tensor | None,
    *,
    signed: bool,
) -> None:
    new = x
    if random is not None and exponents is not None:
        new, block = rounding.to_blocks(x, random, signed)
        exponents[part] = block if keep is None else torch.where(keep, block, exponents[part])
    elif random is not None:
        new = rounding.to_bfloat16(x, random)
    data[part] = new if keep is None else torch.where(keep, new, data[part])


def update_vector(
    b: Tensor,
    grad: Tensor,
    moments: Moments,
    touched: Tensor | None,
    rule: UpdateRule,
    size: Tensor,
    inverse_root: Tensor,
) -> None:
    """Move a bias; touched (of its shape) says which entries move, all where it is None."""
    new, m, v = apply_rule(b, grad, moments.m, moments.v, rule, size, inverse_root)
    for old, fresh in ((b, new), (moments.m, m), (moments.v, v)):
        if old is not None and fresh is not None:
            old.copy_(fresh if touched is None else torch.where(touched, fresh, old))


def bias_parts(db_enc: Tensor, W_enc: Tensor) -> Tensor:
    """What each PART latents give to `db_enc W_enc`, by which b_dec loses of its gradient where the encoder subtracts
    it: db_enc [L], W_enc [L, D] -> [ceil(L / PART), D], all fp32."""
    return torch.stack([v @ W for v, W in zip(db_enc.split(PART), W_enc.split(PART))])


def move_b_dec(
    state: UpdateState,
    rule: UpdateRule,
    lr: Tensor,
    bias_lr: Tensor,
    residual: Tensor,
    scale: float,
    parts: Tensor | None,
) -> None:
    """Move b_dec, after `backward_update`, by `scale` times the sum of the residual [N, D] less the sum of all
    `bias_parts`, if there are any."""
    sizes = StepSizes.of(rule, state.n_steps, lr, bias_lr)
    grad = residual.sum(dim=0, dtype=torch.float32) * scale
    if parts is not None:
        grad = grad - parts.sum(dim=0)
    update_vector(state.b_dec, grad, state.moments["b_dec"], None, rule, sizes.biases, sizes.inverse_root)


def backward_update(
    state: UpdateState,
    rule: UpdateRule,
    lr: Tensor,
    bias_lr: Tensor,
    residual: Tensor,
    scale: float,
    centred: Tensor,
    values: Tensor,
    indices: Tensor,
    dots: Tensor,
    aux: AuxRows | None,
    *,
    centred_by_b_dec: bool,
    signed: bool = False,
    parts: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Take the gradients of one step's loss and move all weights by them, in place.

    Args:
        state: weights, moments, step counter.
        rule: the update rule.
        lr, bias_lr: [1] fp32 on the device, the learning rates of the matrices and of the biases.
        residual: [N, D] fp32 or bf16; the gradient of the reconstruction is `scale * residual`.
        scale: a number.
        centred: [N, D] fp32 or bf16, what the encoder multiplied: x - b_dec, or x.
        values: [N, K] fp32. Pairs that are not active (see `reference.active`) have no gradient.
        indices: [N, K] integers, each below L.
        dots: [N, K] fp32, the residual's products with the decoder's rows, as `reference.decode_and_dots` gives them.
        aux: further gradients of some latents.
        centred_by_b_dec: whether b_dec was subtracted from x, so that it has a gradient through the encoder.
        signed: whether the code may be negative (AbsTopK).
        parts: [ceil(L / PART), D] fp32 that are to be filled with `bias_parts`. Where it is given, other latents have
            parts too, and b_dec stays as it is: see `move_b_dec`.
        rows: [N, K] integers: which row of `residual` the gradient of a pair comes from; None: its token's. The
            residual then is [M, D], M at least N, and b_dec has the gradient of its first N rows.
    """
    L = len(state.W_enc)
    active = reference.active(values, signed)
    zero = torch.zeros_like(values)
    values = torch.where(active, values, zero)
    dz = torch.where(active, dots, zero) * scale
    order = torch_ops.LatentOrder(indices, L)
    db_enc = order.scatter(dz)
    along = order.scatter(values * dz)  # <dW_dec[l], W_dec[l]>: no second pass over the rows
    touched = order.scatter(active.float()) > 0
    own_parts = bias_parts(db_enc, state.W_enc) if centred_by_b_dec else None

    state.n_steps.add_(1)
    sizes = StepSizes.of(rule, state.n_steps, lr, bias_lr)
    grad = (order if rows is None else order.reading(rows)).scatter_rows(values * scale, residual)
    if aux is not None:
        along = _with_rows(along, aux.latents, (aux.dW_dec * _rows_at(state.W_dec, aux.latents)).sum(dim=1))
        grad = _with_rows(grad, aux.latents, aux.dW_dec)
        db_enc = _with_rows(db_enc, aux.latents, aux.db_enc)
        touched = _with_rows(touched.float(), aux.latents, torch.ones_like(aux.db_enc)) > 0
    grad -= along[:, None] * state.W_dec
    decoder_seed = 2 * state.n_steps + 1
    # The encoder's gradient reads nothing that changes here, so that one dense gradient is held at a time.
    update_matrix(
        state.W_dec, state.dec_rows, grad, state.moments["W_dec"], touched, rule, sizes, decoder_seed, unit=True,
        first=state.first_latent,
    )  # fmt: skip
    grad = order.scatter_rows(dz, centred)
    if aux is not None:
        grad = _with_rows(grad, aux.latents, aux.dW_enc)
    encoder_seed = 2 * state.n_steps
    update_matrix(
        state.W_enc, state.enc_rows, grad, state.moments["W_enc"], touched, rule, sizes, encoder_seed, unit=False,
        first=state.first_latent,
    )  # fmt: skip
    moving = touched if rule.touched_only else None
    update_vector(state.b_enc, db_enc, state.moments["b_enc"], moving, rule, sizes.biases, sizes.inverse_root)
    if parts is None:
        move_b_dec(state, rule, lr, bias_lr, residual[: len(centred)], scale, own_parts)
    elif own_parts is not None:
        parts.copy_(own_parts)


def _rows_at(rows: Tensor, latents: Tensor) -> Tensor:
    return rows[latents.clamp_max(len(rows) - 1)]


def _with_rows(x: Tensor, latents: Tensor, extra: Tensor) -> Tensor:
    """x [L, ...] with extra [A, ...] added at its latents; latent L counts for nothing."""
    there = latents < len(x)
    extra = torch.where(there.view(-1, *[1] * (extra.dim() - 1)), extra, torch.zeros_like(extra))
    return x.index_add(0, latents.clamp_max(len(x) - 1), extra)
