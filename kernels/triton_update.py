"""The fused backward pass and update in Triton: what `update.backward_update` computes, without a dense gradient.

A program owns STRETCH latents. For each it sums the latent's rows of the gradients, takes the part along the decoder's
row away, moves both rows, the bias and their moments, and makes the decoder's row a unit vector, which stays in
registers until its norm is known. Traffic is that of the weights and their moments, read and written once: for a pair
of weights of W_enc and W_dec 52 bytes with fp32 moments and bf16 rows for products, 36 with bf16 moments, 28 with 8
bits. The gathered operands are [N, D] and mostly come from cache.

The sums behind the projection need no pass of their own: `<dW_dec[l], W_dec[l]> = sum_n z_n <g_n, W_dec[l]>`, and the
dot products are those of dz. Nor does the gradient of b_dec through the encoder, `sum_l db_enc[l] W_enc[l]`: each
program adds up its latents' part.

A program's threads lie along the columns, and each adds up its own columns over the pairs: they exchange nothing but
the squares behind the norm.

Shape letters: N tokens, L latents, D width, K active latents a token, P pairs, A latents of the AuxK loss, S programs.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's decorator does not show what types a kernel takes.

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels import reference, triton_backward
from steersman.kernels.triton_backward import LatentOrder, columns, run_products, sum_run
from steersman.kernels.triton_rounding import as_fp32, load_moment, mix, nearest, store_moment
from steersman.kernels.update import PART, AuxRows, Moments, UpdateRule, UpdateState

STRETCH = 32
"""Latents of a program; a divisor of PART."""
PAIRS = 4
"""Pairs whose rows are read together: few latents have many more."""
SMALLEST: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
"""What a norm is at least: the smallest normal number of fp32."""
WIDEST_HELD = 8192
"""Width up to which a row stays in registers; a wider one is written, and read again when its norm is known."""


@triton.jit
def step_sizes(n_steps_ptr, lr_ptr, bias_lr_ptr, log_beta1, log_beta2, ADAM: tl.constexpr):
    """See `update.StepSizes`: the rates of weights and biases, and `1 / sqrt(1 - b2^t)`."""
    size, bias_size = tl.load(lr_ptr), tl.load(bias_lr_ptr)
    inverse_root = size * 0.0 + 1.0
    if ADAM:
        t = tl.load(n_steps_ptr).to(tl.float64)  # near t = 1 the difference from 1 has few digits left in fp32
        first = (1.0 / (1.0 - tl.exp(t * log_beta1))).to(tl.float32)
        inverse_root = (1.0 / tl.sqrt(1.0 - tl.exp(t * log_beta2))).to(tl.float32)
        size *= first
        bias_size *= first
    return size, bias_size, inverse_root


@triton.jit
def moved(w, m, v, size, inverse_root, eps, ADAM: tl.constexpr):
    """The weights after a step by moments that have the gradient in them (see `update.apply_rule`)."""
    if ADAM:
        return w - size * (m / (tl.sqrt(v) * inverse_root + eps))
    else:
        return w - size * tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0))


@triton.jit
def step_piece(
    w, grad, m, v, moments, latent, d, mask, row_random, D, size, inverse_root, beta1, beta2, eps,
    ADAM: tl.constexpr, STATE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """See `update.apply_rule`, for one tile of one row: the weights after it. m and v are as `load_piece` gave them;
    what they become is written."""
    m_ptr, v_ptr, m_exp_ptr, v_exp_ptr = moments
    cols = columns(d, SIZE)
    places = latent * D + cols
    random = cols.to(tl.uint32)
    if STATE != "float32":
        random = mix(row_random + random)
    m = beta1 * as_fp32(m[0], m[1], STATE, 15, SIZE) + (1 - beta1) * grad
    store_moment(m_ptr, m_exp_ptr, m, places, mask, latent, d, D, random, STATE, 15, 127, True, SIZE)
    second = m
    if ADAM:
        second = beta2 * as_fp32(v[0], v[1], STATE, 31, SIZE) + (1 - beta2) * (grad * grad)
        random = random >> 16
        store_moment(v_ptr, v_exp_ptr, second, places, mask, latent, d, D, random, STATE, 31, 255, False, SIZE)
    return moved(w, m, second, size, inverse_root, eps, ADAM)


@triton.jit
def load_piece(w_ptr, moments, latent, d, D, ADAM: tl.constexpr, STATE: tl.constexpr, SIZE: tl.constexpr):
    """A tile of one row of a matrix and its moments: all loads in flight before the sums over pairs begin."""
    m_ptr, v_ptr, m_exp_ptr, v_exp_ptr = moments
    cols = columns(d, SIZE)
    places, mask = latent * D + cols, cols < D
    w = tl.load(w_ptr + places, mask=mask, other=0.0)
    m = load_moment(m_ptr, m_exp_ptr, places, mask, latent, d, D, STATE, SIZE)
    v = m
    if ADAM:
        v = load_moment(v_ptr, v_exp_ptr, places, mask, latent, d, D, STATE, SIZE)
    return w, m, v


@triton.jit
def decoder_piece(
    w_ptr, moments, pairs, aux_ptr, slot, latent, d, projection, scale, random, D, size, inverse_root,
    beta1, beta2, eps, HOT: tl.constexpr, AUX: tl.constexpr, ADAM: tl.constexpr, STATE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of a decoder's row after the step, 0 past its end; its length is to be made 1."""
    mask = columns(d, BLOCK_D) < D
    w, m, v = load_piece(w_ptr, moments, latent, d, D, ADAM, STATE, BLOCK_D)
    grad = scale * sum_run(pairs, d, D, HOT, CHUNK, BLOCK_P, BLOCK_D)
    if AUX:
        grad += load_aux(aux_ptr, slot, d, D, BLOCK_D)
    grad -= projection * w
    w = step_piece(
        w, grad, m, v, moments, latent, d, mask, random, D, size, inverse_root, beta1, beta2, eps, ADAM, STATE, BLOCK_D
    )
    return tl.where(mask, w, 0.0)


@triton.jit
def encoder_piece(
    w_ptr, rows_ptr, moments, pairs, aux_ptr, slot, latent, d, random, D, size, inverse_root, beta1, beta2, eps,
    HOT: tl.constexpr, AUX: tl.constexpr, ADAM: tl.constexpr, STATE: tl.constexpr, COPY: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Move a tile of an encoder's row; returns it as it was."""
    cols = columns(d, BLOCK_D)
    places, mask = latent * D + cols, cols < D
    old, m, v = load_piece(w_ptr, moments, latent, d, D, ADAM, STATE, BLOCK_D)
    grad = sum_run(pairs, d, D, HOT, CHUNK, BLOCK_P, BLOCK_D)
    if AUX:
        grad += load_aux(aux_ptr, slot, d, D, BLOCK_D)
    w = step_piece(
        old, grad, m, v, moments, latent, d, mask, random, D, size, inverse_root, beta1, beta2, eps,
        ADAM, STATE, BLOCK_D,
    )  # fmt: skip
    tl.store(w_ptr + places, w, mask=mask)
    if COPY:
        tl.store(rows_ptr + places, nearest(w, rows_ptr.dtype.element_ty), mask=mask)
    return old


@triton.jit
def load_aux(aux_ptr, slot, d, D, BLOCK_D: tl.constexpr):
    """A tile of row `slot` of aux [A, D], 0 where slot is -1."""
    cols = columns(d, BLOCK_D)
    mask = cols < tl.where(slot >= 0, D, 0)
    return tl.load(aux_ptr + tl.maximum(slot, 0).to(tl.int64) * D + cols, mask=mask, other=0.0)


@triton.jit
def store_unit(w_ptr, rows_ptr, w, inverse, latent, d, D, COPY: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a tile of a decoder's row, times the inverse of the row's norm."""
    cols = columns(d, BLOCK_D)
    w *= inverse
    tl.store(w_ptr + latent * D + cols, w, mask=cols < D)
    if COPY:
        tl.store(rows_ptr + latent * D + cols, nearest(w, rows_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def scalar_step(b_ptr, m_ptr, v_ptr, grad, at, mask, size, inverse_root, beta1, beta2, eps, ADAM: tl.constexpr):
    """Move those places of a bias, whose moments are fp32."""
    m = beta1 * tl.load(m_ptr + at, mask=mask, other=0.0) + (1 - beta1) * grad
    tl.store(m_ptr + at, m, mask=mask)
    v = m
    if ADAM:
        v = beta2 * tl.load(v_ptr + at, mask=mask, other=0.0) + (1 - beta2) * (grad * grad)
        tl.store(v_ptr + at, v, mask=mask)
    b = tl.load(b_ptr + at, mask=mask, other=0.0)
    tl.store(b_ptr + at, moved(b, m, v, size, inverse_root, eps, ADAM), mask=mask)


@triton.jit(do_not_specialize=["first_latent"])
def update_rows(
    g_ptr, x_ptr, g_rows_ptr, tokens_ptr, z_ptr, dz_ptr, starts_ptr, g_chunks_ptr, x_chunks_ptr,
    slots_ptr, aux_enc_ptr, aux_b_ptr, aux_dec_ptr, w_enc_ptr, w_dec_ptr, enc_rows_ptr, dec_rows_ptr,
    m_enc_ptr, v_enc_ptr, m_enc_exp_ptr, v_enc_exp_ptr, m_dec_ptr, v_dec_ptr, m_dec_exp_ptr, v_dec_exp_ptr,
    b_ptr, m_b_ptr, v_b_ptr, parts_ptr, n_steps_ptr, lr_ptr, bias_lr_ptr,
    scale, beta1, beta2, log_beta1, log_beta2, eps, first_latent, L, D,
    HOT: tl.constexpr, AUX: tl.constexpr, ADAM: tl.constexpr, TOUCHED_ONLY: tl.constexpr, STATE: tl.constexpr,
    COPY: tl.constexpr, HELD: tl.constexpr, CENTRED: tl.constexpr, STRETCH: tl.constexpr, CHUNK: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """STRETCH latents' rows of both matrices: gradient, projection, step, unit length, and their copies for products;
    and their biases. A pair reads row g_rows [P] of g, and its token's of x. With CENTRED, row s of parts [S, D] gets
    the latents' `sum_l db_enc[l] W_enc[l]`."""
    size, bias_size, inverse_root = step_sizes(n_steps_ptr, lr_ptr, bias_lr_ptr, log_beta1, log_beta2, ADAM)
    step = tl.load(n_steps_ptr).to(tl.uint32)
    enc_moments = (m_enc_ptr, v_enc_ptr, m_enc_exp_ptr, v_enc_exp_ptr)
    dec_moments = (m_dec_ptr, v_dec_ptr, m_dec_exp_ptr, v_dec_exp_ptr)
    part_ptr = parts_ptr + tl.program_id(0).to(tl.int64) * D
    if CENTRED:
        for d in range(0, D, BLOCK_D):
            cols = columns(d, BLOCK_D)
            tl.store(part_ptr + cols, tl.zeros([BLOCK_D], tl.float32), mask=cols < D)
    first = tl.program_id(0) * STRETCH
    for i in range(0, tl.minimum(L - first, STRETCH)):
        number = first + i
        latent = number.to(tl.int64)
        start, stop = tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1)
        touched = stop > start
        slot = tl.full([], -1, tl.int32)
        if AUX:
            slot = tl.load(slots_ptr + latent)
            touched = touched | (slot >= 0)
        if touched or (not TOUCHED_ONLY):
            db, projection = run_products(dz_ptr, z_ptr, start, stop)
            g_pairs = (g_ptr, g_rows_ptr, z_ptr, g_chunks_ptr, start, stop)
            x_pairs = (x_ptr, tokens_ptr, dz_ptr, x_chunks_ptr, start, stop)
            among_all = (number + first_latent).to(tl.uint32)
            enc_random, dec_random = mix(among_all + mix(2 * step)), mix(among_all + mix(2 * step + 1))
            extra = tl.full([], 0.0, tl.float32)
            if AUX:  # noqa: SIM102 - known when this is compiled; the next is not
                if slot >= 0:
                    extra = tl.load(aux_b_ptr + slot)
                    along = tl.zeros([BLOCK_D], tl.float32)
                    for d in range(0, D, BLOCK_D):
                        cols = columns(d, BLOCK_D)
                        w = tl.load(w_dec_ptr + latent * D + cols, mask=cols < D, other=0.0)
                        along += w * load_aux(aux_dec_ptr, slot, d, D, BLOCK_D)
                    projection += tl.sum(along)

            squares, row = tl.zeros([BLOCK_D], tl.float32), ()
            if HELD:
                for piece in tl.static_range(PIECES):
                    w = decoder_piece(
                        w_dec_ptr, dec_moments, g_pairs, aux_dec_ptr, slot, latent, piece * BLOCK_D, projection, scale,
                        dec_random, D, size, inverse_root, beta1, beta2, eps,
                        HOT, AUX, ADAM, STATE, CHUNK, BLOCK_P, BLOCK_D,
                    )  # fmt: skip
                    row = row + (w,)  # noqa: RUF005 - Triton knows no unpacking
                    squares += w * w
            else:
                for d in range(0, D, BLOCK_D):
                    w = decoder_piece(
                        w_dec_ptr, dec_moments, g_pairs, aux_dec_ptr, slot, latent, d, projection, scale,
                        dec_random, D, size, inverse_root, beta1, beta2, eps,
                        HOT, AUX, ADAM, STATE, CHUNK, BLOCK_P, BLOCK_D,
                    )  # fmt: skip
                    cols = columns(d, BLOCK_D)
                    tl.store(w_dec_ptr + latent * D + cols, w, mask=cols < D)
                    squares += w * w
                tl.debug_barrier()  # the row is read again, perhaps by other threads than wrote it
            inverse = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(squares)), SMALLEST)
            if HELD:
                for piece in tl.static_range(PIECES):
                    store_unit(w_dec_ptr, dec_rows_ptr, row[piece], inverse, latent, piece * BLOCK_D, D, COPY, BLOCK_D)
            else:
                for d in range(0, D, BLOCK_D):
                    cols = columns(d, BLOCK_D)
                    w = tl.load(w_dec_ptr + latent * D + cols, mask=cols < D, other=0.0)
                    store_unit(w_dec_ptr, dec_rows_ptr, w, inverse, latent, d, D, COPY, BLOCK_D)
            for d in range(0, D, BLOCK_D):
                w = encoder_piece(
                    w_enc_ptr, enc_rows_ptr, enc_moments, x_pairs, aux_enc_ptr, slot, latent, d,
                    enc_random, D, size, inverse_root, beta1, beta2, eps,
                    HOT, AUX, ADAM, STATE, COPY, CHUNK, BLOCK_P, BLOCK_D,
                )  # fmt: skip
                if CENTRED:
                    cols = columns(d, BLOCK_D)
                    w = db * w + tl.load(part_ptr + cols, mask=cols < D, other=0.0)
                    tl.store(part_ptr + cols, w, mask=cols < D)
            scalar_step(
                b_ptr, m_b_ptr, v_b_ptr, db + extra, latent, True, bias_size, inverse_root, beta1, beta2, eps, ADAM
            )


@triton.jit(do_not_specialize=["N", "S"])
def update_b_dec(
    residual_ptr, parts_ptr, b_ptr, m_ptr, v_ptr, n_steps_ptr, lr_ptr, bias_lr_ptr,
    N, S, scale, beta1, beta2, log_beta1, log_beta2, eps, D,
    ADAM: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Move b_dec by its gradient: scale times the sum of residual [N, D], with CENTRED less that of parts [S, D]."""
    _, size, inverse_root = step_sizes(n_steps_ptr, lr_ptr, bias_lr_ptr, log_beta1, log_beta2, ADAM)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad = scale * column_sums(residual_ptr, N, cols, D, ROWS, BLOCK_D)
    if CENTRED:
        grad -= column_sums(parts_ptr, S, cols, D, ROWS, BLOCK_D)
    scalar_step(b_ptr, m_ptr, v_ptr, grad, cols, cols < D, size, inverse_root, beta1, beta2, eps, ADAM)


@triton.jit
def column_sums(rows_ptr, N, cols, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of rows [N, D] at those columns -> [BLOCK_D] fp32, in a fixed order."""
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, N, ROWS):
        n = first + tl.arange(0, ROWS)
        at = rows_ptr + n.to(tl.int64)[:, None] * D + cols[None, :]
        total += tl.load(at, mask=(n < N)[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


def _slots(aux: AuxRows, n_latents: int) -> Tensor:
    """Which row of `aux` a latent has, -1 for none -> [L + 1] int32 (the last place takes ignored latents)."""
    slots = torch.full((n_latents + 1,), -1, dtype=torch.int32, device=aux.latents.device)
    rows = torch.arange(len(aux.latents), dtype=torch.int32, device=slots.device)
    return slots.scatter_(0, aux.latents, rows)


def _pointers(matrix: str, moments: Moments) -> dict[str, Tensor]:
    """The moments of "enc" or "dec" as `update_rows` names them; m stands in for those that the rule does not have and
    never reads."""
    names = (f"m_{matrix}_ptr", f"v_{matrix}_ptr", f"m_{matrix}_exp_ptr", f"v_{matrix}_exp_ptr")
    return {name: moments.m if t is None else t for name, t in zip(names, moments)}


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
    """See `update.backward_update`."""
    L, D = state.W_enc.shape
    residual, centred = residual.contiguous(), centred.contiguous()
    order = LatentOrder(indices, L, reference.active(values, signed))
    z, dz = order.sorted(values, dots, scale)
    g_rows = order.tokens if rows is None else order.reading(rows).tokens
    g_chunks, x_chunks = order.chunk_tables(z, residual, dz, centred, g_rows)
    slots, aux_enc, aux_b, aux_dec = order.starts, centred, z, centred  # never read without AuxK
    if aux is not None:
        slots, aux_b = _slots(aux, L), aux.db_enc.contiguous()
        aux_enc, aux_dec = aux.dW_enc.contiguous(), aux.dW_dec.contiguous()
    n_parts, b_enc = triton.cdiv(L, PART), state.moments["b_enc"]
    stretches = torch.empty(n_parts, PART // STRETCH, D, device=residual.device)

    state.n_steps.add_(1)
    update_rows[(n_parts * (PART // STRETCH),)](
        g_ptr=residual, x_ptr=centred, g_rows_ptr=g_rows, tokens_ptr=order.tokens, z_ptr=z, dz_ptr=dz,
        starts_ptr=order.starts,
        g_chunks_ptr=g_chunks, x_chunks_ptr=x_chunks, slots_ptr=slots, aux_enc_ptr=aux_enc, aux_b_ptr=aux_b,
        aux_dec_ptr=aux_dec, w_enc_ptr=state.W_enc, w_dec_ptr=state.W_dec, enc_rows_ptr=state.enc_rows,
        dec_rows_ptr=state.dec_rows, **_pointers("enc", state.moments["W_enc"]),
        **_pointers("dec", state.moments["W_dec"]), b_ptr=state.b_enc, m_b_ptr=b_enc.m,
        v_b_ptr=b_enc.m if b_enc.v is None else b_enc.v, parts_ptr=stretches, first_latent=state.first_latent, L=L,
        **_numbers(state, rule, lr, bias_lr, scale),
        HOT=len(g_chunks) > 0, AUX=aux is not None, ADAM=rule.adam, TOUCHED_ONLY=rule.touched_only,
        STATE=rule.state_dtype, COPY=state.enc_rows is not state.W_enc, CENTRED=centred_by_b_dec, STRETCH=STRETCH,
        CHUNK=triton_backward.CHUNK, **tile(D),
    )  # fmt: skip
    own_parts = torch.sum(stretches, dim=1, out=parts) if centred_by_b_dec else None
    if parts is None:
        move_b_dec(state, rule, lr, bias_lr, residual[: len(centred)], scale, own_parts)


def move_b_dec(
    state: UpdateState,
    rule: UpdateRule,
    lr: Tensor,
    bias_lr: Tensor,
    residual: Tensor,
    scale: float,
    parts: Tensor | None,
) -> None:
    """See `update.move_b_dec`."""
    b_dec, D = state.moments["b_dec"], len(state.b_dec)
    update_b_dec[(triton.cdiv(D, 32),)](
        residual_ptr=residual, parts_ptr=residual if parts is None else parts, b_ptr=state.b_dec, m_ptr=b_dec.m,
        v_ptr=b_dec.m if b_dec.v is None else b_dec.v, N=len(residual), S=0 if parts is None else len(parts),
        **_numbers(state, rule, lr, bias_lr, scale), ADAM=rule.adam, CENTRED=parts is not None, ROWS=256, BLOCK_D=32,
        num_warps=8,
    )  # fmt: skip


def _numbers(state: UpdateState, rule: UpdateRule, lr: Tensor, bias_lr: Tensor, scale: float) -> dict[str, Any]:
    """What both kernels are told of the step."""
    numbers = {"scale": scale, "beta1": rule.beta1, "beta2": rule.beta2, "eps": rule.eps, "D": len(state.b_dec)}
    numbers |= {"log_beta1": _log(rule.beta1), "log_beta2": _log(rule.beta2)}
    return numbers | {"n_steps_ptr": state.n_steps, "lr_ptr": lr, "bias_lr_ptr": bias_lr}


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def tile(D: int) -> dict[str, int]:
    """The tile of `update_rows` for rows of width D: a thread has four columns of a piece, and up to five pieces of a
    row. Of the sizes of a piece the one that leaves the fewest threads idle, the smallest of those: the kernel is bound
    by its instructions, which idle threads issue too. 128 registers leave room for 16 warps on a multiprocessor; unless
    told, the compiler aims at fewer and spills.

    >>> tile(2304)
    {'HELD': True, 'PIECES': 5, 'BLOCK_P': 4, 'BLOCK_D': 512, 'num_warps': 4, 'maxnreg': 128}
    """
    sizes = [size for size in (128, 256, 512, 1024) if 5 * size >= D] + [2048]
    block = min(sizes, key=lambda size: triton.cdiv(D, size) * size)
    held = D <= WIDEST_HELD
    pieces = triton.cdiv(D, block) if held else 0
    return {
        "HELD": held, "PIECES": pieces, "BLOCK_P": PAIRS, "BLOCK_D": block, "num_warps": block // 128, "maxnreg": 128,
    }  # fmt: skip
