# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
"""The mode FILTER of `triton_wave.wave_kernel` for Hopper (sm_90), in Gluon: loads, products and epilogue overlap.

One program stays on each multiprocessor and takes tiles in turn. Its ninth warp does nothing but start copies to shared
memory, S stages ahead, so the next tile arrives while the other eight warps, which multiply, are in an epilogue. These
leave out what most tiles do not need: the scan of a tile's BM x BN values is one comparison for each of them and one
branch for eight, and only eight values of which one exceeds tau cost more.

The products are those of `wave_kernel`: `wgmma` over the same stretches of D in the same order, from zero, the bias
added last in fp32. Both kernels give a latent the same bits, so which one ran does not show in the result, and equal
rows of W tie. What is written is the same too, in another order: keys of `make_key`, NaN first of all, and a count
that exceeds the buffer where candidates were lost. `wave_kernel` is the definition, and what runs everywhere else.

Copies and products of a stage take turns by two barriers in shared memory, `full` and `empty`. A barrier counts phases;
a wait for the parity p returns when the phase of that parity is over. Both sides go through the same tiles and through
the same ceil(D / BK) steps of each, and count steps over all tiles: step t uses stage t % S for the (t // S)-th time,
so both know its parity, and no tile or width begins at a stage of its own. The producer waits for parity 1 at first,
which a new barrier meets. Nobody can wait for ever: a `full` phase ends when its two copies have come, which were
started by a producer that needs nothing but `empty` of S steps before; that phase ends when the product S steps before
has been read, which happens one step later, or at the end of the tile, and a consumer needs for it no more than the
`full` phases up to there. So the earliest step that is not finished can always go on. Programs without a tile skip
both loops.

Reads past the ends of x and W bring zeros. Rows past N have a tau of infinity and no room; columns past the wave have
a bias of minus infinity.

Shape letters: N tokens, L latents, D width, C slots of a row's buffer, S stages.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from steersman.kernels import tiles
from steersman.kernels.operands import Operands
from steersman.kernels.triton_select import key_ptx

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # of Triton before 3.9

GROUP_SIZE = gl.constexpr(8)
"""Values of a thread that share a branch."""


def _operands(first: int) -> list[str]:
    """The names of one operand of an inline assembly that sees a group."""
    return [f"${first + i}" for i in range(GROUP_SIZE.value)]


def _zeros(registers: list[str]) -> str:
    return "\n".join(f"mov.b32 {register}, 0;" for register in registers)


def _hits(values: list[str], tau: str) -> str:
    """PTX: the predicates p0, p1, ... are whether a value is above tau, or NaN."""
    return "\n".join(f"setp.gtu.f32 p{i}, {value}, {tau};" for i, value in enumerate(values))


def _count_code() -> str:
    """PTX of `count_hits`: the largest of a group is compared first, a NaN where one is NaN. Warps branch as one."""
    out, v, taus = (_operands(8 * i) for i in range(3))
    counts = "\n".join(f"@p{i} add.s32 {out[0]}, {out[0]}, 1;" for i in range(8))
    return f"""{{
.reg .pred some, p<8>;
.reg .f32 a, b, c, d;
{_zeros(out)}
max.NaN.f32 a, {v[0]}, {v[1]};
max.NaN.f32 b, {v[2]}, {v[3]};
max.NaN.f32 c, {v[4]}, {v[5]};
max.NaN.f32 d, {v[6]}, {v[7]};
max.NaN.f32 a, a, b;
max.NaN.f32 c, c, d;
max.NaN.f32 a, a, c;
setp.gtu.f32 some, a, {taus[0]};
vote.sync.any.pred some, some, 0xffffffff;
@!some bra.uni NONE;
{_hits(v, taus[0])}
{counts}
NONE:
}}"""


def _append_code() -> str:
    """PTX of `append_hits`, with the keys of `make_key`. Warps branch as one."""
    out, v, taus, counts, before, start, shift, low, base, slots = (_operands(8 * i) for i in range(10))
    ballots = "\n".join(f"vote.sync.ballot.b32 hit{i}, p{i}, 0xffffffff;" for i in range(8))
    writes = "\n".join(
        f"""setp.eq.s32 some, hit{i}, 0;
@some bra.uni NEXT{i};
sub.s32 latent, {low[0]}, {i // 2 * 8 + i % 2};
{key_ptx(v[i], signed=False)}
setp.lt.and.s32 room, slot, {slots[0]}, p{i};
@room st.global.v2.b32 [at], {{latent, bits}};
@p{i} add.s32 slot, slot, 1;
@p{i} add.s64 at, at, 8;
NEXT{i}:"""
        for i in range(8)
    )
    return f"""{{
.reg .pred some, isnan, room, p<8>;
.reg .b32 slot, bits, sign, latent, hit<8>;
.reg .b64 at;
.reg .f32 value;
{_zeros(out)}
setp.ne.s32 some, {counts[0]}, 0;
vote.sync.any.pred some, some, 0xffffffff;
@!some bra.uni NONE;
{_hits(v, taus[0])}
{ballots}
shr.u32 slot, {before[0]}, {shift[0]};
and.b32 slot, slot, 255;
add.s32 slot, slot, {start[0]};
mul.wide.s32 at, slot, 8;
add.s64 at, at, {base[0]};
{writes}
NONE:
}}"""


def _constraints(kinds: str) -> str:
    """The registers of a group's result and operands, one letter an operand."""
    return ",".join(["=&r"] * GROUP_SIZE.value + [kind for kind in kinds for _ in range(GROUP_SIZE.value)])


COUNT_CODE = gl.constexpr(_count_code())
COUNT_REGISTERS = gl.constexpr(_constraints("ff"))
APPEND_CODE = gl.constexpr(_append_code())
APPEND_REGISTERS = gl.constexpr(_constraints("ffrrrrrlr"))


@gluon.jit
def count_hits(values, tau):
    """How many of each GROUP_SIZE consecutive values of a row [.., .., M] are above tau, or NaN: the number at the
    first of them, 0 at the others."""
    return gl.inline_asm_elementwise(
        COUNT_CODE, COUNT_REGISTERS, [values, tau], dtype=gl.int32, is_pure=False, pack=GROUP_SIZE
    )


@gluon.jit
def append_hits(values, tau, counts, before, start, shift, low, base, slots):
    """Write the keys of the values that `count_hits` counts. Of each group the first elements say: how many there are,
    in a byte of `before` (at the bit `shift`) how many come before it from the slot `start` on, the lower half of its
    first key, where the row's slots begin, how many there are. What finds no slot is not written."""
    gl.inline_asm_elementwise(
        APPEND_CODE, APPEND_REGISTERS, [values, tau, counts, before, start, shift, low, base, slots],
        dtype=gl.int32, is_pure=False, pack=GROUP_SIZE,
    )  # fmt: skip


@gluon.constexpr_function
def quarters_layout(BM, BN, warps):
    """The layout of a tile seen as [BM, 4, BN / 4], a thread's values of a row one after the other: the registers of
    the accumulators in another order."""
    positions = [[0, 0, 1 << i] for i in range((BN // 4).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    of_warps = [[16 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([*positions, [8, 0, 0]], lanes, of_warps, [], [BM, 4, BN // 4])


@gluon.jit
def tile_corner(program, N, first, last, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """The first row and column of a tile; GROUP blocks of rows share the tiles of W in the cache."""
    n_row_blocks = (N + BM - 1) // BM
    n_tiles = (last - first + BN - 1) // BN
    group = program // (GROUP * n_tiles)
    in_group = gl.minimum(n_row_blocks - group * GROUP, GROUP)
    within = program % (GROUP * n_tiles)
    return (group * GROUP + within % in_group) * BM, first + within // in_group * BN


@gluon.jit
def produce(
    x, w, x_stages, w_stages, full, empty, N, D, first, last,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Copy the operands of this program's tiles, stretch by stretch of D, into the stages in turn."""
    n = ((N + BM - 1) // BM) * ((last - first + BN - 1) // BN)
    stage = 0
    parity = 1
    for program in range(gl.program_id(0), n, gl.num_programs(0)):
        row0, column0 = tile_corner(program, N, first, last, BM, BN, GROUP)
        for k in range(0, D, BK):
            mbarrier.wait(empty.index(stage), parity)
            mbarrier.expect(full.index(stage), 2 * BK * (BM + BN))
            load_box(x, [row0, k], full.index(stage), x_stages.index(stage))
            load_box(w, [column0, k], full.index(stage), w_stages.index(stage))
            stage += 1
            if stage == S:
                stage = 0
                parity = parity ^ 1


@gluon.jit
def consume(
    x_stages, w_stages, full, empty, bias_ptr, tau_ptr, buffer_ptr, count_ptr, N, D, first, last,
    C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, S: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Multiply the stages into this program's tiles and append what is above tau."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, quarters_layout(BM, BN, WARPS)))
    gl.assume(D > 0)  # see `triton_wave.product_tile`
    n = ((N + BM - 1) // BM) * ((last - first + BN - 1) // BN)
    stage = 0
    parity = 0
    for program in range(gl.program_id(0), n, gl.num_programs(0)):
        row0, column0 = tile_corner(program, N, first, last, BM, BN, GROUP)
        rows = row0 + gl.arange(0, BM, of_rows)
        tau = gl.load(tau_ptr + rows, mask=rows < N, other=float("inf"))
        # One value a thread, which come together in shared memory later: 64 of them would not fit the registers.
        columns = column0 + gl.arange(0, BN, gl.BlockedLayout([1], [32], [WARPS], [0]))
        bias = gl.load(bias_ptr + columns, mask=columns < last, other=float("-inf"))
        acc = gl.zeros((BM, BN), gl.float32, layout)
        for k in range(0, D, BK):
            mbarrier.wait(full.index(stage), parity)
            product = hopper.warpgroup_mma(
                x_stages.index(stage), w_stages.index(stage).permute((1, 0)), acc, is_async=True
            )
            acc = hopper.warpgroup_mma_wait(1, deps=(product,))
            # The product before this one has read its stage.
            mbarrier.arrive(empty.index((stage + S - 1) % S), count=1, pred=k > 0)
            stage += 1
            if stage == S:
                stage = 0
                parity = parity ^ 1
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((stage + S - 1) % S), count=1)
        acc += gl.convert_layout(bias, gl.SliceLayout(0, layout))[None, :]
        append(acc, tau, row0, column0, N, buffer_ptr, count_ptr, C, BM, BN, WARPS)


@gluon.jit
def append(
    acc, tau, row0, column0, N, buffer_ptr, count_ptr,
    C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """What `triton_wave.append` does, by groups: each quarter of a row counts its candidates group by group, an atomic
    addition for the quarter reserves their slots, and the groups that have some write them.

    The numbers of a quarter's groups are the bytes of two words; a product with 0x01010101 makes them sums up to each
    group."""
    layout: gl.constexpr = quarters_layout(BM, BN, WARPS)
    row_quarters: gl.constexpr = gl.SliceLayout(2, layout)
    quarters = gl.permute(gl.reshape(acc, (BM, BN // 8, 4, 2)), (0, 2, 1, 3))
    values = gl.convert_layout(gl.reshape(quarters, (BM, 4, BN // 4)), layout)
    rows = (row0 + gl.arange(0, BM, gl.SliceLayout(1, row_quarters)))[:, None]
    quarter = gl.arange(0, 4, gl.SliceLayout(0, row_quarters))[None, :]
    position = gl.arange(0, BN // 4, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    every = gl.full((BM, 4, BN // 4), 0, gl.int32, layout)  # spreads what follows over all values
    inside = rows < N
    tau = tau[:, None, None] + every.to(gl.float32)
    counts = count_hits(values, tau)

    shift = position % 32 // 8 * 8
    low_half = position < 32
    sums = gl.sum(gl.where(low_half, counts << shift, 0), axis=2) * 0x01010101
    high_sums = gl.sum(gl.where(low_half, 0, counts << shift), axis=2) * 0x01010101
    n_low = sums >> 24
    wanted = n_low + (high_sums >> 24)
    start = gl.atomic_add(count_ptr + rows + quarter * 0, wanted, mask=inside & (wanted > 0), sem="relaxed")
    start = gl.where(inside, start, C)
    base = (buffer_ptr + (rows.to(gl.int64) * C + quarter * 0)).to(gl.int64)
    low = (0x7FFFFFFF - column0) - quarter[:, :, None] * 2 - position // 2 * 8
    append_hits(
        values, tau, counts,
        gl.where(low_half, (sums << 8)[:, :, None], (high_sums << 8)[:, :, None]),
        gl.where(low_half, start[:, :, None], (start + n_low)[:, :, None]),
        shift + every, low + every, base[:, :, None] + every, every + C,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["N", "D", "first", "last"])
def filter_kernel(
    x, w, bias_ptr, tau_ptr, buffer_ptr, count_ptr, N, D, first, last,
    C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, S: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Append what of the latents first <= l < last is above tau [N] to buffer [N, C] int64 and count [N] int32, as
    `triton_wave.wave_kernel` does; x [N, D] and w [L, D] are tensor descriptors."""
    gl.static_assert(S > 1)  # a stage is given back when the next product has begun
    gl.static_assert(BM == 16 * WARPS)
    x_stages = gl.allocate_shared_memory(x.dtype, [S, BM, BK], x.layout)
    w_stages = gl.allocate_shared_memory(w.dtype, [S, BN, BK], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (x_stages, w_stages, full, empty, bias_ptr, tau_ptr, buffer_ptr, count_ptr, N, D, first, last,
                       C, BM, BN, BK, GROUP, S, WARPS)),
            (produce, (x, w, x_stages, w_stages, full, empty, N, D, first, last, BM, BN, BK, GROUP, S)),
        ],
        [1],
        [24],
    )  # fmt: skip


def stage_layout(BK: int) -> gl.NVMMASharedLayout:
    """How a box of 16-bit operands, BK wide, lies in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * BK), element_bitwidth=16, rank=2)


def launch_filter(
    ops: Operands, tile: tiles.Tile, wave: tuple[int, int], tau: Tensor, buffer: Tensor, count: Tensor, C: int
) -> None:
    """Launch `filter_kernel` over the latents wave[0] <= l < wave[1]: a program a multiprocessor, at most."""
    N, D = ops.x.shape
    first, last = wave
    x = TensorDescriptor.from_tensor(ops.x, [tile.BM, tile.BK], stage_layout(tile.BK))
    w = TensorDescriptor.from_tensor(ops.W, [tile.BN, tile.BK], stage_layout(tile.BK))
    n_tiles = triton.cdiv(N, tile.BM) * triton.cdiv(last - first, tile.BN)
    filter_kernel[(min(n_tiles, tiles.processors(ops.x.device)),)](
        x=x, w=w, bias_ptr=ops.bias, tau_ptr=tau, buffer_ptr=buffer, count_ptr=count, N=N, D=D, first=first, last=last,
        C=C, BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=tile.group, S=tile.stages, WARPS=tile.warps,
        num_warps=tile.warps,
    )  # fmt: skip
