"""The fused backward pass and update in Triton: what `update.backward_update` computes, without a dense gradient.

One program owns one latent: it sums the latent's rows of the gradients, takes the part along the decoder's row away,
moves both rows and their moments, and makes the decoder's row a unit vector. Traffic is that of the weights and their
moments, read and written once; the gathered operands are [N, D] and mostly come from cache.

The sums behind the projection need no pass of their own: `<dW_dec[l], W_dec[l]> = sum_n z_n <g_n, W_dec[l]>`, and the
dot products are those of dz.

Shape letters: N tokens, L latents, D width, K active latents a token, P pairs, A latents of the AuxK loss.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's decorator does not show what types a kernel takes.

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels import reference
from steersman.kernels.triton_backward import LatentOrder, bias_parts, sum_chunks, sum_rows, width_block
from steersman.kernels.triton_rounding import BLOCK, from_blocks, mix, nearest, to_blocks
from steersman.kernels.update import AuxRows, Moments, StepSizes, UpdateRule, UpdateState, move_b_dec, update_vector


@triton.jit
def load_moment(m_ptr, exponents_ptr, places, blocks, mask, STATE: tl.constexpr, SPAN: tl.constexpr):
    if STATE == "int8":
        codes = tl.load(m_ptr + places, mask=mask, other=0).to(tl.int32)
        return from_blocks(codes, tl.load(exponents_ptr + blocks, mask=mask, other=0).to(tl.int32), SPAN)
    else:
        return tl.load(m_ptr + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_moment(
    m_ptr, exponents_ptr, x, places, mask, first_block, n_blocks, random,
    STATE: tl.constexpr, SPAN: tl.constexpr, LARGEST: tl.constexpr, SIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write x [SIZE], 0 outside the mask; `first_block` is the tile's first place in the row of `n_blocks` left."""
    if STATE == "int8":
        codes, exponents = to_blocks(x, random, SPAN, LARGEST, SIZE, SIGNED)
        tl.store(m_ptr + places, codes.to(m_ptr.dtype.element_ty), mask=mask)
        block = tl.arange(0, SIZE // BLOCK)
        tl.store(exponents_ptr + first_block + block, exponents.to(tl.uint8), mask=block < n_blocks)
    elif STATE == "bfloat16":
        bits = x.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, bits + (random & 0xFFFF), bits) & 0xFFFF0000
        tl.store(
            m_ptr + places, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=mask
        )  # exact: the rest is zero
    else:
        tl.store(m_ptr + places, x, mask=mask)


@triton.jit
def apply_rule(
    w, grad, m_ptr, v_ptr, m_exp_ptr, v_exp_ptr, latent, d, cols, mask, row_random, D, size, inverse_root,
    beta1, beta2, eps, ADAM: tl.constexpr, STATE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """See `update.apply_rule`, for one tile of one row: the weights after it; the moments are written."""
    places = latent * D + cols
    row_blocks = tl.cdiv(D, BLOCK)
    blocks = latent * row_blocks + cols // BLOCK
    first_block, n_blocks = latent * row_blocks + d // BLOCK, row_blocks - d // BLOCK
    random = cols.to(tl.uint32)
    if STATE != "float32":
        random = mix(row_random + random)
    m = load_moment(m_ptr, m_exp_ptr, places, blocks, mask, STATE, 15)
    m = beta1 * m + (1 - beta1) * grad
    store_moment(m_ptr, m_exp_ptr, m, places, mask, first_block, n_blocks, random, STATE, 15, 127, True, SIZE)
    if ADAM:
        v = load_moment(v_ptr, v_exp_ptr, places, blocks, mask, STATE, 31)
        v = beta2 * v + (1 - beta2) * (grad * grad)
        random = random >> 16
        store_moment(v_ptr, v_exp_ptr, v, places, mask, first_block, n_blocks, random, STATE, 31, 255, False, SIZE)
        return w - size * (m / (tl.sqrt_rn(v) * inverse_root + eps))
    else:
        return w - size * tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0))


@triton.jit(do_not_specialize=["first_latent"])
def update_rows(
    g_ptr, x_ptr, tokens_ptr, z_ptr, dz_ptr, starts_ptr, hot_starts_ptr, g_chunks_ptr, x_chunks_ptr, along_ptr,
    slots_ptr, aux_enc_ptr, aux_dec_ptr, w_enc_ptr, w_dec_ptr, enc_rows_ptr, dec_rows_ptr,
    m_enc_ptr, v_enc_ptr, m_enc_exp_ptr, v_enc_exp_ptr, m_dec_ptr, v_dec_ptr, m_dec_exp_ptr, v_dec_exp_ptr,
    n_steps_ptr, sizes_ptr, inverse_roots_ptr, scale, beta1, beta2, eps, first_latent, D,
    HOT: tl.constexpr, AUX: tl.constexpr, ADAM: tl.constexpr, TOUCHED_ONLY: tl.constexpr, STATE: tl.constexpr,
    COPY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One latent's rows of both matrices: gradient, projection, step, unit length, and their copies for products."""
    program = tl.program_id(0)
    latent = program.to(tl.int64)
    start, stop = tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1)
    touched = stop > start
    slot = tl.full([], -1, tl.int32)
    if AUX:
        slot = tl.load(slots_ptr + latent)
        touched = touched | (slot >= 0)
    if touched or (not TOUCHED_ONLY):
        first, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        if HOT:
            first, last = tl.load(hot_starts_ptr + latent), tl.load(hot_starts_ptr + latent + 1)
            stop = tl.where(last > first, start, stop)
        projection = tl.load(along_ptr + latent)
        size, inverse_root = tl.load(sizes_ptr), tl.load(inverse_roots_ptr)
        step = tl.load(n_steps_ptr).to(tl.uint32)
        number = (program + first_latent).to(tl.uint32)
        enc_random = mix(number + mix(2 * step))
        dec_random = mix(number + mix(2 * step + 1))
        squares = tl.zeros([BLOCK_D], tl.float32)
        for d in range(0, D, BLOCK_D):
            cols = d + tl.arange(0, BLOCK_D)
            mask = cols < D
            places = latent * D + cols
            extra = cols < tl.where(slot >= 0, D, 0)
            aux_places = tl.maximum(slot, 0).to(tl.int64) * D + cols

            grad = sum_rows(g_ptr, tokens_ptr, z_ptr, start, stop, cols, mask, D, BLOCK_P, BLOCK_D)
            if HOT:
                grad += sum_chunks(g_chunks_ptr, first, last, cols, mask, D, BLOCK_D)
            grad *= scale
            if AUX:
                grad += tl.load(aux_dec_ptr + aux_places, mask=extra, other=0.0)
            w = tl.load(w_dec_ptr + places, mask=mask, other=0.0)
            if COPY:
                grad -= projection * tl.load(dec_rows_ptr + places, mask=mask, other=0.0).to(tl.float32)
            else:
                grad -= projection * w
            w = apply_rule(
                w, grad, m_dec_ptr, v_dec_ptr, m_dec_exp_ptr, v_dec_exp_ptr, latent, d, cols, mask, dec_random, D,
                size, inverse_root, beta1, beta2, eps, ADAM, STATE, BLOCK_D,
            )  # fmt: skip
            squares += tl.where(mask, w * w, 0.0)
            tl.store(w_dec_ptr + places, w, mask=mask)

            grad = sum_rows(x_ptr, tokens_ptr, dz_ptr, start, stop, cols, mask, D, BLOCK_P, BLOCK_D)
            if HOT:
                grad += sum_chunks(x_chunks_ptr, first, last, cols, mask, D, BLOCK_D)
            if AUX:
                grad += tl.load(aux_enc_ptr + aux_places, mask=extra, other=0.0)
            w = tl.load(w_enc_ptr + places, mask=mask, other=0.0)
            w = apply_rule(
                w, grad, m_enc_ptr, v_enc_ptr, m_enc_exp_ptr, v_enc_exp_ptr, latent, d, cols, mask, enc_random, D,
                size, inverse_root, beta1, beta2, eps, ADAM, STATE, BLOCK_D,
            )  # fmt: skip
            tl.store(w_enc_ptr + places, w, mask=mask)
            if COPY:
                tl.store(enc_rows_ptr + places, nearest(w, enc_rows_ptr.dtype.element_ty), mask=mask)

        tl.debug_barrier()  # the row is read again, by other threads than wrote it
        norm = tl.maximum(tl.sqrt_rn(tl.sum(squares)), 1.1754943508222875e-38)
        for d in range(0, D, BLOCK_D):
            cols = d + tl.arange(0, BLOCK_D)
            places = latent * D + cols
            w = tl.load(w_dec_ptr + places, mask=cols < D, other=0.0) / norm
            tl.store(w_dec_ptr + places, w, mask=cols < D)
            if COPY:
                tl.store(dec_rows_ptr + places, nearest(w, dec_rows_ptr.dtype.element_ty), mask=cols < D)


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
) -> None:
    """See `update.backward_update`."""
    L, D = state.W_enc.shape
    residual, centred = residual.contiguous(), centred.contiguous()
    order = LatentOrder(indices, L, reference.active(values, signed))
    z, dz = order.sorted(values), order.sorted(dots) * scale
    db_enc, along = order.scatter_sorted(dz, z)
    own_parts = bias_parts(db_enc, state.enc_rows, out=parts) if centred_by_b_dec else None
    slots, aux_enc, aux_dec = order.starts, centred, centred  # never read without AuxK
    touched = order.starts.diff() > 0
    if aux is not None:
        slots, aux_enc, aux_dec = _slots(aux, L), aux.dW_enc.contiguous(), aux.dW_dec.contiguous()
        has, row = slots[:L] >= 0, slots[:L].clamp_min(0)
        own = (aux_dec * state.dec_rows[aux.latents.clamp_max(L - 1)].float()).sum(dim=1)
        along = along + torch.where(has, own[row], torch.zeros_like(along))
        db_enc = db_enc + torch.where(has, aux.db_enc[row], torch.zeros_like(db_enc))
        touched = touched | has

    state.n_steps.add_(1)
    sizes = StepSizes.of(rule, state.n_steps, lr, bias_lr)
    g_chunks, x_chunks = order.chunk_table(z, residual), order.chunk_table(dz, centred)
    update_rows[(L,)](
        g_ptr=residual, x_ptr=centred, tokens_ptr=order.tokens, z_ptr=z, dz_ptr=dz, starts_ptr=order.starts,
        hot_starts_ptr=order.hot_starts, g_chunks_ptr=g_chunks, x_chunks_ptr=x_chunks, along_ptr=along,
        slots_ptr=slots, aux_enc_ptr=aux_enc, aux_dec_ptr=aux_dec,
        w_enc_ptr=state.W_enc, w_dec_ptr=state.W_dec, enc_rows_ptr=state.enc_rows, dec_rows_ptr=state.dec_rows,
        **_pointers("enc", state.moments["W_enc"]), **_pointers("dec", state.moments["W_dec"]),
        n_steps_ptr=state.n_steps, sizes_ptr=sizes.weights, inverse_roots_ptr=sizes.inverse_root,
        scale=scale, beta1=rule.beta1, beta2=rule.beta2, eps=rule.eps,
        first_latent=state.first_latent, D=D,
        HOT=len(g_chunks) > 0, AUX=aux is not None, ADAM=rule.adam, TOUCHED_ONLY=rule.touched_only,
        STATE=rule.state_dtype, COPY=state.enc_rows is not state.W_enc, **tile(D),
    )  # fmt: skip
    moving = touched if rule.touched_only else None
    update_vector(state.b_enc, db_enc, state.moments["b_enc"], moving, rule, sizes.biases, sizes.inverse_root)
    if parts is None:
        move_b_dec(state, rule, sizes, residual, scale, own_parts)


def tile(D: int) -> dict[str, int]:
    """The tile of `update_rows` for rows of width D.

    >>> tile(2304)
    {'BLOCK_P': 8, 'BLOCK_D': 256, 'num_warps': 2}
    """
    block = width_block(D)
    return {"BLOCK_P": 8, "BLOCK_D": block, "num_warps": block // 128}  # a thread has four columns: 16 bytes of fp32
