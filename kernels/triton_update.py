"""The fused backward pass and update in Triton: what `update.backward_update` computes, without a dense gradient.

One program owns one latent: it sums the latent's rows of the gradients, takes the part along the decoder's row away,
moves both rows and their moments, and makes the decoder's row a unit vector. Traffic is that of the weights and their
moments, read and written once; the gathered operands are [N, D] and mostly come from cache.

The sums behind the projection need no pass of their own: `<dW_dec[l], W_dec[l]> = sum_n z_n <g_n, W_dec[l]>`, and the
dot products are those of dz.

Shape letters: N tokens, L latents, D width, K active latents a token, P pairs, A latents of the AuxK loss.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false
# Triton's decorator does not show what types a kernel takes.

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels import reference, rounding
from steersman.kernels.triton_backward import LatentOrder, sum_chunks, sum_rows, vector_matrix, width_block
from steersman.kernels.update import AuxRows, Moments, StepSizes, UpdateRule, UpdateState, update_vector

BLOCK: tl.constexpr = tl.constexpr(rounding.BLOCK)


@triton.jit
def mix(x):
    """See `rounding.mix`; x is uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def to_blocks(x, random, SPAN: tl.constexpr, LARGEST: tl.constexpr, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    """See `rounding.to_blocks`: codes [SIZE] int32 and exponents [SIZE / 128] int32."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    short = (bits + ((random & 0xFFFF) << 4).to(tl.int32)) >> 20
    exponents = tl.max(tl.reshape(short, [SIZE // BLOCK, BLOCK]), axis=1) >> 3
    spread = tl.reshape(tl.broadcast_to(exponents[:, None], [SIZE // BLOCK, BLOCK]), [SIZE])
    codes = short - ((spread - SPAN) << 3)
    if SIGNED:
        codes = tl.where(short > 0, tl.minimum(tl.maximum(codes, 0), LARGEST), 0)
        codes = tl.where(x < 0, -codes, codes)
    else:
        codes = tl.where(short > 0, tl.minimum(tl.maximum(codes, 1), LARGEST), 0)
    return codes, exponents


@triton.jit
def from_blocks(codes, exponents, SPAN: tl.constexpr):
    """See `rounding.from_blocks`: codes and each code's exponent, both int32 -> fp32."""
    size = tl.abs(codes)
    short = tl.where(size > 0, size + ((exponents - SPAN) << 3), 0)
    x = (tl.maximum(short, 0) << 20).to(tl.float32, bitcast=True)
    return tl.where(codes < 0, -x, x)


@triton.jit
def copied(w, ROWS):
    """w in the dtype of ROWS, to nearest, ties to even. Written out for bf16, as Triton's interpreter truncates."""
    if ROWS.dtype.element_ty == tl.bfloat16:
        bits = w.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where((bits & 0x7F800000) != 0x7F800000, nearest, bits)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return w.to(ROWS.dtype.element_ty)


@triton.jit
def load_moment(M, EXPONENTS, places, blocks, mask, STATE: tl.constexpr, SPAN: tl.constexpr):
    if STATE == "int8":
        codes = tl.load(M + places, mask=mask, other=0).to(tl.int32)
        return from_blocks(codes, tl.load(EXPONENTS + blocks, mask=mask, other=0).to(tl.int32), SPAN)
    else:
        return tl.load(M + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_moment(
    M, EXPONENTS, x, places, mask, first_block, n_blocks, random,
    STATE: tl.constexpr, SPAN: tl.constexpr, LARGEST: tl.constexpr, SIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write x [SIZE], 0 outside the mask; `first_block` is the tile's first place in the row of `n_blocks` left."""
    if STATE == "int8":
        codes, exponents = to_blocks(x, random, SPAN, LARGEST, SIZE, SIGNED)
        tl.store(M + places, codes.to(M.dtype.element_ty), mask=mask)
        block = tl.arange(0, SIZE // BLOCK)
        tl.store(EXPONENTS + first_block + block, exponents.to(tl.uint8), mask=block < n_blocks)
    elif STATE == "bfloat16":
        bits = x.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, bits + (random & 0xFFFF), bits) & 0xFFFF0000
        tl.store(M + places, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=mask)  # exact: the rest is zero
    else:
        tl.store(M + places, x, mask=mask)


@triton.jit
def apply_rule(
    w, grad, M, V, M_EXP, V_EXP, latent, d, cols, mask, row_random, D, size, inverse_root, beta1, beta2, eps,
    ADAM: tl.constexpr, STATE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """See `update.apply_rule`, for one tile of one row: the weights after it; the moments are written."""
    places = latent * D + cols
    row_blocks = tl.cdiv(D, BLOCK)
    blocks = latent * row_blocks + cols // BLOCK
    first_block, n_blocks = latent * row_blocks + d // BLOCK, row_blocks - d // BLOCK
    random = cols.to(tl.uint32)
    if STATE != "float32":
        random = mix(row_random + random)
    m = load_moment(M, M_EXP, places, blocks, mask, STATE, 15)
    m = beta1 * m + (1 - beta1) * grad
    store_moment(M, M_EXP, m, places, mask, first_block, n_blocks, random, STATE, 15, 127, True, SIZE)
    if ADAM:
        v = load_moment(V, V_EXP, places, blocks, mask, STATE, 31)
        v = beta2 * v + (1 - beta2) * (grad * grad)
        store_moment(V, V_EXP, v, places, mask, first_block, n_blocks, random >> 16, STATE, 31, 255, False, SIZE)
        return w - size * (m / (tl.sqrt_rn(v) * inverse_root + eps))
    else:
        return w - size * tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0))


@triton.jit
def update_rows(
    G, X, tokens, z, dz, starts, hot_starts, g_chunks, x_chunks, along, slots, aux_enc, aux_dec,
    W_ENC, W_DEC, ENC_ROWS, DEC_ROWS, M_ENC, V_ENC, M_ENC_EXP, V_ENC_EXP, M_DEC, V_DEC, M_DEC_EXP, V_DEC_EXP,
    n_steps, sizes, inverse_roots, scale, beta1, beta2, eps, D,
    HOT: tl.constexpr, AUX: tl.constexpr, ADAM: tl.constexpr, TOUCHED_ONLY: tl.constexpr, STATE: tl.constexpr,
    COPY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One latent's rows of both matrices: gradient, projection, step, unit length, and their copies for products."""
    program = tl.program_id(0)
    latent = program.to(tl.int64)
    start, stop = tl.load(starts + latent), tl.load(starts + latent + 1)
    touched = stop > start
    slot = tl.full([], -1, tl.int32)
    if AUX:
        slot = tl.load(slots + latent)
        touched = touched | (slot >= 0)
    if touched or (not TOUCHED_ONLY):
        first, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        if HOT:
            first, last = tl.load(hot_starts + latent), tl.load(hot_starts + latent + 1)
            stop = tl.where(last > first, start, stop)
        projection = tl.load(along + latent)
        size, inverse_root = tl.load(sizes), tl.load(inverse_roots)
        step = tl.load(n_steps).to(tl.uint32)
        enc_random = mix(program.to(tl.uint32) + mix(2 * step))
        dec_random = mix(program.to(tl.uint32) + mix(2 * step + 1))
        squares = tl.zeros([BLOCK_D], tl.float32)
        for d in range(0, D, BLOCK_D):
            cols = d + tl.arange(0, BLOCK_D)
            mask = cols < D
            places = latent * D + cols
            extra = cols < tl.where(slot >= 0, D, 0)
            aux_places = tl.maximum(slot, 0).to(tl.int64) * D + cols

            grad = sum_rows(G, tokens, z, start, stop, cols, mask, D, BLOCK_P, BLOCK_D)
            if HOT:
                grad += sum_chunks(g_chunks, first, last, cols, mask, D, BLOCK_D)
            grad *= scale
            if AUX:
                grad += tl.load(aux_dec + aux_places, mask=extra, other=0.0)
            w = tl.load(W_DEC + places, mask=mask, other=0.0)
            if COPY:
                grad -= projection * tl.load(DEC_ROWS + places, mask=mask, other=0.0).to(tl.float32)
            else:
                grad -= projection * w
            w = apply_rule(
                w, grad, M_DEC, V_DEC, M_DEC_EXP, V_DEC_EXP, latent, d, cols, mask, dec_random, D, size, inverse_root,
                beta1, beta2, eps, ADAM, STATE, BLOCK_D,
            )  # fmt: skip
            squares += tl.where(mask, w * w, 0.0)
            tl.store(W_DEC + places, w, mask=mask)

            grad = sum_rows(X, tokens, dz, start, stop, cols, mask, D, BLOCK_P, BLOCK_D)
            if HOT:
                grad += sum_chunks(x_chunks, first, last, cols, mask, D, BLOCK_D)
            if AUX:
                grad += tl.load(aux_enc + aux_places, mask=extra, other=0.0)
            w = tl.load(W_ENC + places, mask=mask, other=0.0)
            w = apply_rule(
                w, grad, M_ENC, V_ENC, M_ENC_EXP, V_ENC_EXP, latent, d, cols, mask, enc_random, D, size, inverse_root,
                beta1, beta2, eps, ADAM, STATE, BLOCK_D,
            )  # fmt: skip
            tl.store(W_ENC + places, w, mask=mask)
            if COPY:
                tl.store(ENC_ROWS + places, copied(w, ENC_ROWS), mask=mask)

        tl.debug_barrier()  # the row is read again, by other threads than wrote it
        norm = tl.maximum(tl.sqrt_rn(tl.sum(squares)), 1.1754943508222875e-38)
        for d in range(0, D, BLOCK_D):
            cols = d + tl.arange(0, BLOCK_D)
            places = latent * D + cols
            w = tl.load(W_DEC + places, mask=cols < D, other=0.0) / norm
            tl.store(W_DEC + places, w, mask=cols < D)
            if COPY:
                tl.store(DEC_ROWS + places, copied(w, DEC_ROWS), mask=cols < D)


def _slots(aux: AuxRows, n_latents: int) -> Tensor:
    """Which row of `aux` a latent has, -1 for none -> [L + 1] int32 (the last place takes those that count not)."""
    slots = torch.full((n_latents + 1,), -1, dtype=torch.int32, device=aux.latents.device)
    rows = torch.arange(len(aux.latents), dtype=torch.int32, device=slots.device)
    return slots.scatter_(0, aux.latents, rows)


def _pointers(moments: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four tensors of the moments; m stands in for those that the rule does not have and never reads."""
    m, *others = moments
    return m, *(m if t is None else t for t in others)  # pyright: ignore[reportReturnType]


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
    aux: AuxRows | None,
    *,
    centred_by_b_dec: bool,
    signed: bool = False,
) -> None:
    """See `update.backward_update`."""
    L, D = state.W_enc.shape
    residual, centred = residual.contiguous(), centred.contiguous()
    order = LatentOrder(indices, L, reference.active(values, signed))
    z, dz = order.sorted(values), order.dots(residual, state.dec_rows, scale)
    db_enc, along = order.scatter_sorted(dz, z)
    db_dec = residual.sum(dim=0, dtype=torch.float32) * scale
    if centred_by_b_dec:
        db_dec = db_dec - vector_matrix(db_enc, state.enc_rows)
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
        residual, centred, order.tokens, z, dz, order.starts, order.hot_starts, g_chunks, x_chunks, along,
        slots, aux_enc, aux_dec, state.W_enc, state.W_dec, state.enc_rows, state.dec_rows,
        *_pointers(state.moments["W_enc"]), *_pointers(state.moments["W_dec"]),
        state.n_steps, sizes.weights, sizes.inverse_root, scale, rule.beta1, rule.beta2, rule.eps, D,
        HOT=len(g_chunks) > 0, AUX=aux is not None, ADAM=rule.adam, TOUCHED_ONLY=rule.touched_only,
        STATE=rule.state_dtype, COPY=state.enc_rows is not state.W_enc, **tile(D),
    )  # fmt: skip
    moving = touched if rule.touched_only else None
    update_vector(state.b_enc, db_enc, state.moments["b_enc"], moving, rule, sizes.biases, sizes.inverse_root)
    update_vector(state.b_dec, db_dec, state.moments["b_dec"], None, rule, sizes.biases, sizes.inverse_root)


def tile(D: int) -> dict[str, int]:
    """The tile of `update_rows` for rows of width D.

    >>> tile(2304)
    {'BLOCK_P': 8, 'BLOCK_D': 256, 'num_warps': 2}
    """
    block = width_block(D)
    return {"BLOCK_P": 8, "BLOCK_D": block, "num_warps": block // 128}  # a thread has four columns: 16 bytes of fp32
