"""The kernels of a device against exact references on the same device.

Inputs are whole numbers, small enough that bf16 holds them and every sum of their products is exact in fp32 in any
order: what a kernel returns must then be right to the last bit, ties and all. References multiply in fp64, in blocks
of rows. Only the fused update, which divides and takes roots, is held to a tolerance.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steersman.kernels import reference, tiles, update
from steersman.kernels.dispatch import choose
from steersman.kernels.operands import Precision, precision, prepare
from steersman.kernels.update import AuxRows, UpdateRule, UpdateState

Shape = tuple[int, int, int, int]
"""N, L, D, K."""


class NotRunError(Exception):
    """A check that cannot be done here, and why."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that must hold on a device."""

    part: str
    """The group it belongs to."""
    name: str
    run: Callable[[], str]
    """Does it and returns a remark, often empty; raises where it does not hold."""
    seconds: int = 180
    """After how many it is given up."""


def integers(*shape: int, device: torch.device, seed: int, high: int = 3) -> Tensor:
    """Whole numbers from -high to high, fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=generator, device=device).float()


def require(holds: bool | Tensor, what: str) -> None:
    """Raise an AssertionError that says what does not hold."""
    if not bool(holds):
        raise AssertionError(what)


def require_same(got: Tensor, want: Tensor, what: str) -> None:
    """Raise where two tensors differ in any bit that counts: NaN equals NaN, and 0 equals -0."""
    require(got.shape == want.shape, f"{what}: the shape is {tuple(got.shape)}, not {tuple(want.shape)}")
    want = want.to(got.dtype)
    wrong = ~((got == want) | ((got != got) & (want != want)))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} are wrong, first at {at}: {got[at].item()} for "
            f"{want[at].item()}"
        )


# --- encode ---


@dataclass(frozen=True)
class Encoder:
    """Operands of an encoder whose pre-activations are whole numbers."""

    x: Tensor
    W: Tensor
    b: Tensor
    b_dec: Tensor | None
    k: int

    @staticmethod
    def of(shape: Shape, device: torch.device, case: str = "", dtype: torch.dtype = torch.float32) -> "Encoder":
        """Random ones, with what `case` names planted in them."""
        N, L, D, k = shape
        x, W, b, b_dec = (
            integers(*size, device=device, seed=seed) for seed, size in enumerate(((N, D), (L, D), (L,), (D,)))
        )
        some = [0, N // 2, N - 1]
        if case == "rows that overflow":  # pre-activations that rise with the latent: every one is a candidate
            W[:, 0] = (torch.arange(L, device=device) * 256 // L).float()
            x[:, 0], b_dec[0] = 0.0, 0.0
            x[some, 0] = 200.0
        elif case == "rows of NaN":
            x[some, D // 2] = torch.nan
        elif case == "latents of NaN":
            W[L // 3] = torch.nan
        elif case == "hot latents":
            b[:: max(1, L // 5)] = 30_000.0
        elif case == "hot tile":
            b[L // 2 : L // 2 + 200] += 20_000.0
        elif case == "ties":
            W.zero_()
            b[:] = (torch.arange(L, device=device) // 97 % 3).float()
        elif case == "all negative":
            b -= 60_000.0
        return Encoder(x, W.to(dtype), b, b_dec, min(k, L))

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.W, self.b, self.k, self.b_dec

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The pre-activations in fp64, some rows at a time."""
        W, b = self.W.double().T, self.b.double()
        size = max(1, (1 << 26) // len(self.W))
        for first in range(0, len(self.x), size):
            rows = slice(first, min(first + size, len(self.x)))
            x = self.x[rows].double()
            yield rows, (x if self.b_dec is None else x - self.b_dec.double()) @ W + b


def check_topk(shape: Shape, device: torch.device, case: str, signed: bool, how: Precision, dtype: torch.dtype) -> str:
    """Indices and values of `topk_encode` against a stable sort of the fp64 product, every row."""
    problem = Encoder.of(shape, device, case, dtype)
    ours = choose(device, "triton")
    with precision(how):
        values, indices, n_slow = ours.triton_encode.topk_encode_counted(*problem.arguments, signed=signed)
    for rows, Z in problem.blocks():
        size = (Z.abs() if signed else Z).nan_to_num(nan=torch.inf)  # a NaN is above all, and no bit of it counts
        order = torch.sort(size, dim=1, descending=True, stable=True).indices[:, : problem.k]
        want = Z.gather(1, order)
        require_same(indices[rows], order, f"indices from row {rows.start}")
        require_same(values[rows], want if signed else want.relu(), f"values from row {rows.start}")
    return f"{int(n_slow)} of {len(values)} rows took the slow path"


def check_batch_topk(shape: Shape, device: torch.device, case: str) -> str:
    problem = Encoder.of(shape, device, case)
    values, indices, smallest = choose(device, "triton").batch_topk_encode(*problem.arguments)
    want_values, want_indices, want_smallest = reference.batch_topk_encode(*problem.arguments)
    require_same(dense(values, indices, shape[1]), dense(want_values, want_indices, shape[1]), "code")
    require_same(smallest, want_smallest, "smallest value that is selected")
    return f"up to {values.shape[1]} latents a token"


def check_threshold(shape: Shape, device: torch.device, threshold: float, case: str) -> str:
    problem = Encoder.of(shape, device, case)
    ours = choose(device, "triton")
    thresholds = threshold + integers(shape[1], device=device, seed=9)
    operands = (problem.x, problem.W, problem.b, thresholds, problem.b_dec)
    require_same(ours.threshold_encode(*operands), reference.threshold_encode(*operands), "dense code")
    values, indices = ours.threshold_select(*operands)
    want, want_indices = reference.threshold_select(*operands)
    require_same(values, want, "values")
    require_same(dense(values, indices, shape[1]), dense(want, want_indices, shape[1]), "code")
    return f"up to {values.shape[1]} latents a token"


def dense(values: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    """A code [N, K] as a matrix [N, L]."""
    return torch.zeros(len(values), n_latents, device=values.device).scatter_add_(1, indices.long(), values)


def check_persistent(shape: Shape, device: torch.device) -> str:
    """Hopper's kernel of the mode FILTER against the one that defines it, on random numbers: the same keys in each row,
    in whatever order, and the same rows that lose some."""
    from steersman.kernels import triton_wave

    N, L, D, k = shape
    generator = torch.Generator(device).manual_seed(0)
    x, W = (torch.randn(n, D, generator=generator, device=device) for n in (N, L))
    x[N // 2, D // 2] = torch.nan
    ops = prepare(x, W / D**0.5, integers(L, device=device, seed=1, high=1) / 8, None)
    tile = next(tile for tile in tiles.WAVE[tiles.capability(device), torch.bfloat16] if tile.persistent)
    C, first = 1024, L // 5
    tau = torch.full((N,), float(torch.special.ndtri(torch.tensor(1 - 4 * k / L))), device=device)
    tau[0] = -torch.inf
    found = []
    for each in (tile, replace(tile, persistent=False)):
        buffer = torch.zeros(N, C, dtype=torch.int64, device=device)
        count = torch.full((N,), 3, dtype=torch.int32, device=device)
        triton_wave.launch_wave(ops, each, triton_wave.FILTER, (first, L), tau, buffer, count, C)
        found.append((buffer, count))
    (buffer, count), (want, want_count) = found
    require_same(count > C, want_count > C, "rows that lost candidates")
    kept = want_count <= C
    require_same(count[kept], want_count[kept], "numbers of candidates")
    require_same(buffer[kept].sort(dim=1).values, want[kept].sort(dim=1).values, "candidates")
    return f"{float(want_count[kept].float().mean()) - 3:.0f} candidates a row, {int((~kept).sum())} rows lost some"


# --- decode and backward ---


@dataclass(frozen=True)
class Code:
    """A code of whole numbers, decoder rows and a gradient [N, D] likewise; latent 1 is active in every row if hot."""

    values: Tensor
    indices: Tensor
    W: Tensor
    bias: Tensor
    x: Tensor

    @staticmethod
    def of(shape: Shape, device: torch.device, *, hot: bool = False, low: torch.dtype = torch.bfloat16) -> "Code":
        N, L, D, k = shape
        generator = torch.Generator(device).manual_seed(5)
        indices = torch.rand(N, L, generator=generator, device=device).topk(k, dim=1).indices
        if hot:
            indices[:, 0] = torch.where((indices[:, 1:] == 1).any(dim=1), indices[:, 0], 1)
        values = integers(N, k, device=device, seed=6).clamp_min(0)
        W, bias, x = (integers(*s, device=device, seed=7 + i) for i, s in enumerate(((L, D), (D,), (N, D))))
        return Code(values, indices.int(), W.to(low), bias, x.to(low))


def check_decode(shape: Shape, device: torch.device) -> str:
    """All forms of decoding, exactly."""
    code, ours = Code.of(shape, device), choose(device, "triton")
    full = dense(code.values, code.indices, shape[1]).double()
    decoded = full @ code.W.double()
    given = (code.values, code.indices, code.W)
    require_same(ours.sparse_decode(*given), decoded, "without a bias")
    decoded = decoded + code.bias.double()
    require_same(ours.sparse_decode(*given, code.bias), decoded, "with a bias")
    want = code.x.double() * 2 - decoded
    for dtype in (torch.float32, torch.bfloat16):
        residual, squares, dots = ours.decode_and_dots(*given, code.bias, code.x, 2.0, dtype)
        require_same(residual, want.to(dtype), f"residual in {dtype}")
        exact = want.square().sum(dim=1)  # above what fp32 counts exactly
        require(((squares - exact).abs() <= 1e-5 * exact).all(), "squared errors are off by more than rounding")
        expected = (want @ code.W.double().T).gather(1, code.indices.long()) * (code.values != 0)
        require_same(dots, expected, "dot products")
    return ""


def check_backward(shape: Shape, device: torch.device, hot: bool) -> str:
    """The sums over the pairs of each latent, exactly."""
    code, ours = Code.of(shape, device, hot=hot), choose(device, "triton")
    g = code.x
    order = ours.LatentOrder(code.indices, shape[1])
    full = dense(code.values, code.indices, shape[1]).double()
    require_same(order.scatter_rows(code.values, g), full.T @ g.double(), "rows")
    require_same(order.scatter(code.values), full.sum(dim=0), "sums")
    want = (g.double() @ code.W.double().T).gather(1, code.indices.long())
    require_same(order.value_gradient(g, code.W), want, "gradient of the values")
    return f"up to {int((full > 0).sum(dim=0).max())} tokens a latent"


# --- the fused update ---


def steps(implementation: Any, shape: Shape, device: torch.device, rule: UpdateRule, *, aux: bool, hot: bool,
          n: int = 3) -> UpdateState:  # fmt: skip
    """The state after n steps on random batches, by one implementation of the fused update."""
    N, L, D, k = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=generator, device=device)

    unit = torch.nn.functional.normalize(normal(L, D), dim=1)
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    b_enc = normal(L, scale=0.1)
    if hot:
        b_enc[1] = 10.0
    state = UpdateState.of(unit.clone(), unit, b_enc, normal(D, scale=0.1), rule, low)
    rate = torch.full((1,), 3e-3, device=device)
    for step in range(n):
        x = normal(N, D)
        # One code for both implementations: their weights differ in last bits, which may swap two latents.
        values, indices = reference.topk_encode(x, unit, b_enc if step == 0 else normal(L, scale=0.1), k)
        if hot:
            indices[:, 0] = torch.where((indices[:, 1:] == 1).any(dim=1), indices[:, 0], 1)
        residual, _, dots = reference.decode_and_dots(values, indices, state.dec_rows, state.b_dec, x, 1.0, low)
        rows = None
        if aux:
            latents = torch.randperm(L, generator=generator, device=device)[:3]
            latents[2] = L
            rows = AuxRows(latents, normal(3, D, scale=0.01), normal(3, scale=0.01), normal(3, D, scale=0.01))
        implementation.backward_update(
            state, rule, rate, rate * 2, residual, -2 / x.numel(), (x - state.b_dec).to(low), values, indices, dots,
            rows, centred_by_b_dec=True,
        )  # fmt: skip
    return state


def tensors_of(state: UpdateState) -> dict[str, Tensor]:
    """All tensors of a state by name."""
    weights, rows, _ = state.flatten()
    return dict(zip(("W_enc", "W_dec", "b_enc", "b_dec", "enc_rows", "dec_rows"), weights + rows)) | state.state()


def check_update(shape: Shape, device: torch.device, rule: UpdateRule, aux: bool, hot: bool) -> str:
    """Every tensor of the state against the definition in PyTorch, and the same bits from a second run."""
    ours = choose(device, "triton")
    got, again = (tensors_of(steps(ours, shape, device, rule, aux=aux, hot=hot)) for _ in range(2))
    want = tensors_of(steps(update, shape, device, rule, aux=aux, hot=hot))
    worst = 0.0
    for name, value in want.items():
        require(torch.equal(got[name], again[name]), f"two runs give different bits in {name}")
        require(got[name].float().isfinite().all(), f"{name} is not finite")
        off = (got[name].float() - value.float()).abs() > 2e-5 * (1 + value.float().abs())
        share = float(off.float().mean())
        worst = max(worst, share)
        # Sums differ in their last bits, and what is rounded at random, or a sign, may then fall on the other side.
        require(share < 0.03, f"{share:.1%} of {name} are off")
    return f"at most {worst:.2%} of a tensor off by more than rounding"


# --- which checks there are ---

SHAPES: tuple[Shape, ...] = (
    (300, 5000, 72, 7), (300, 5001, 72, 7), (1, 5000, 72, 7), (16, 5000, 72, 7), (17, 5000, 72, 7), (64, 5001, 72, 7),
    (65, 5000, 72, 7), (300, 5000, 8, 7), (300, 5001, 40, 64), (300, 9000, 2304, 64), (1, 65536, 2304, 64),
    (8192, 131072, 1024, 32), (8191, 131073, 1024, 32), (2048, 131072, 4096, 64), (300, 5000, 72, 512),
)  # fmt: skip
SMALL_SHAPES: tuple[Shape, ...] = ((70, 700, 24, 5), (3, 300, 8, 5), (65, 521, 40, 3))
CASES = ("rows that overflow", "rows of NaN", "latents of NaN", "hot latents", "hot tile", "ties", "all negative")


def named(shape: Shape, *more: str) -> str:
    return " ".join([",".join(str(n) for n in shape), *filter(None, more)])


def encode_checks(device: torch.device, short: bool) -> Iterator[Check]:
    """`topk_encode`, plain and signed, over shapes, hard rows, precisions and dtypes of the weights."""
    small = SMALL_SHAPES[0] if short else SHAPES[0]
    wanted: list[tuple[Shape, str, bool, Any, torch.dtype]] = [
        (shape, "", False, "bf16", torch.float32) for shape in (SMALL_SHAPES if short else SHAPES)
    ]
    wanted += [(small, case, False, "bf16", torch.float32) for case in CASES]
    wanted += [(small, case, True, "bf16", torch.float32) for case in CASES[: 1 if short else None]]
    wanted += [(small, "", True, "bf16", torch.float32), (small, "", False, "bf16", torch.bfloat16)]
    if not short:
        wanted += [(small, "rows that overflow", False, how, torch.float32) for how in ("tf32", "fp32")]
        wanted += [((16, *small[1:]), case, False, "bf16", torch.float32) for case in CASES[1:4]]
        wanted += [(SHAPES[11], "", True, "bf16", torch.bfloat16)]
        wanted += [(SHAPES[11], case, False, "bf16", torch.bfloat16) for case in CASES[:2]]
    for shape, case, signed, how, dtype in wanted:
        name = named(shape, case, "signed" * signed, how, "bf16 weights" * (dtype == torch.bfloat16))
        yield Check(part="encode", name=name, run=_bound(check_topk, shape, device, case, signed, how, dtype))
    if device.type == "cuda" and any(t.persistent for t in tiles.WAVE[tiles.capability(device), torch.bfloat16]):
        shapes = ((130, 1300, 72, 5),) if short else ((300, 5000, 72, 7), (1, 70_000, 40, 32), (8192, 131072, 1024, 32))
        for shape in shapes:
            yield Check(
                part="encode", name=named(shape, "persistent kernel"), run=_bound(check_persistent, shape, device)
            )


def threshold_checks(device: torch.device, short: bool) -> Iterator[Check]:
    """BatchTopK and JumpReLU."""
    shapes = SMALL_SHAPES[1:2] if short else (SHAPES[0], SHAPES[3], SHAPES[6], (2048, 16384, 256, 16))
    for shape in shapes:
        for case in ("", "rows that overflow", "ties"):
            yield Check(part="threshold", name=named(shape, "batch_topk", case),
                        run=_bound(check_batch_topk, shape, device, case))  # fmt: skip
        for level in (0.0, 40.0):
            for case in ("", "rows of NaN") if level else ("",):
                yield Check(part="threshold", name=named(shape, f"threshold {level:g}", case),
                            run=_bound(check_threshold, shape, device, level, case))  # fmt: skip


def decode_checks(device: torch.device, short: bool) -> Iterator[Check]:
    """Decode in all forms, and the sums of the backward pass."""
    shapes = (SMALL_SHAPES[1:2] if short else (
        (300, 500, 72, 7), (1, 500, 8, 1), (17, 500, 40, 64), (300, 5000, 2304, 64), (64, 5000, 768, 130),
        (1000, 16384, 4096, 64), (300, 1000, 1024, 32),
    ))  # fmt: skip
    for shape in shapes:
        yield Check(part="decode", name=named(shape, "decode"), run=_bound(check_decode, shape, device))
        for hot in (False, True):
            yield Check(part="decode", name=named(shape, "backward", "hot" * hot),
                        run=_bound(check_backward, shape, device, hot))  # fmt: skip


def update_checks(device: torch.device, short: bool) -> Iterator[Check]:
    """The fused update for all rules and dtypes of the state, with and without AuxK and a latent of every row."""
    shapes: tuple[Shape, ...] = ((20, 12, 6, 3),) if short else ((600, 700, 72, 7), (1024, 900, 2304, 32))
    for shape in shapes:
        for dtype in ("float32", "bfloat16", "int8"):
            for name in ("adam",) if short else ("adam", "adam_touched", "signum", "signum_touched"):
                for aux, hot in ((False, False), (True, True))[short:] if name == "adam" else ((True, False),):
                    rule = UpdateRule(name=name, state_dtype=dtype)
                    yield Check(part="update", name=named(shape, name, dtype, "aux" * aux, "hot" * hot),
                                run=_bound(check_update, shape, device, rule, aux, hot))  # fmt: skip


def _bound(function: Callable[..., str], *args: Any) -> Callable[[], str]:
    return lambda: function(*args)
