"""Time the kernels against the bare matrix product, and whole training steps against other libraries.

    python scripts/bench/kernels.py

For each shape and each of encode, decode, backward, update and the whole step: the median time, the time of the bare
matrix product of the encoder in the same run, their ratio, memory beyond the inputs, and the fraction of rows that took
the exact slow path. The same step by eai-sparsify, SAELens and plain PyTorch, where they are installed and fit in
memory. Every shape is checked against a product in fp64 before it is timed. Prints a table and writes it as JSON
under benchmarks/. On a CPU it runs small shapes with the PyTorch kernels.
"""

import argparse  # not tyro: a bare GPU image has to do, with torch, triton, numpy, safetensors, einops, transformers
import datetime
import gc
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

from steersman import TrainConfig
from steersman.kernels import StateDtype, UpdateRule, UpdateState, choose, precision, using
from steersman.sae import SAE, SAEConfig
from steersman.train import ActivationStats, Trainer, resolve

Shape = tuple[int, int, int, int]

GPU: tuple[Shape, ...] = (
    (1, 65536, 2304, 64),
    (64, 65536, 2304, 64),
    (4096, 65536, 2304, 64),
    (8192, 131072, 1024, 32),
    (8192, 131072, 4096, 64),
    (16384, 262144, 4096, 64),
    (8192, 1048576, 4096, 64),
)
CPU: tuple[Shape, ...] = ((1, 4096, 384, 32), (1024, 4096, 384, 32), (1024, 16384, 384, 32))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number with what it is compared with."""

    shape: Shape
    part: str
    """encode, decode, backward, update, step, or what another library calls its step."""
    by: str
    ms: float
    """Median."""
    p20: float
    p80: float
    gemm_ms: float
    """The bare product N x D by D x L of the same run."""
    memory_mb: float | None
    """Largest allocation beyond what was there before; None where the device does not say."""
    slow_rows: float | None = None
    """Fraction of rows that took the exact slow path."""
    bandwidth_share: float | None = None
    """For few tokens: one reading of W_enc, over the time and the copy bandwidth of the same run."""
    error: float | None = None
    """Largest error of an encoded value against fp64, relative to the largest value."""


class Clock:
    """Medians on one device."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[], Any]) -> tuple[float, float, float, float | None]:
        """Median, 20th and 80th percentile in milliseconds, and megabytes allocated beyond what was there."""
        run()
        self.wait()
        memory = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            self.wait()
            memory = (torch.cuda.max_memory_allocated(self.device) - before) / 1e6
        times: list[float] = []
        stop = time.perf_counter() + self.seconds
        while len(times) < 5 or (time.perf_counter() < stop and len(times) < 1000):
            times.append(self._once(run))
        cuts = statistics.quantiles(times, n=5)
        return statistics.median(times), cuts[0], cuts[3], memory

    def _once(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def activations(N: int, D: int, device: torch.device) -> Tensor:
    """Sums of a few of 2 D directions with some noise, so that a code is used as it is on real activations."""
    generator = torch.Generator(device).manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(2 * D, D, generator=generator, device=device), dim=1)
    chosen = torch.randint(0, 2 * D, (N, 16), generator=generator, device=device)
    x = torch.nn.functional.embedding_bag(chosen, atoms, mode="sum")
    return x + 0.05 * torch.randn(N, D, generator=generator, device=device)


def parts(shape: Shape, clock: Clock, args: argparse.Namespace) -> Iterator[Row]:
    """Encode, decode and backward of one shape, correctness first."""
    N, L, D, K = shape
    device = clock.device
    ours = choose(device, args.kernels)
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = activations(N, D, device)
    W = torch.empty(L, D, device=device, dtype=low)
    for rows in W.split(65536):
        rows.copy_(torch.nn.functional.normalize(torch.randn(rows.shape, device=device), dim=1))
    b = torch.zeros(L, device=device)
    x_low = x.to(low)
    product = clock.time(lambda: bare_product(x_low, W))[0]

    def row(part: str, run: Callable[[], Any], by: str = "steersman", **more: Any) -> Row:
        ms, p20, p80, memory = clock.time(run)
        return Row(shape=shape, part=part, by=by, ms=ms, p20=p20, p80=p80, gemm_ms=product, memory_mb=memory, **more)

    values, indices = ours.topk_encode(x, W, b, K)
    error = check(x_low, W, values, indices)
    more: dict[str, Any] = {"error": error}
    if N <= 64 and device.type == "cuda":
        ms = clock.time(lambda: ours.topk_encode(x, W, b, K))[0]
        more["bandwidth_share"] = W.nbytes / (ms * 1e-3) / copy_bandwidth(clock)
    if hasattr(ours, "triton_encode"):
        more["slow_rows"] = float(ours.triton_encode.topk_encode_counted(x, W, b, K)[2]) / N
    yield row("encode", lambda: ours.topk_encode(x, W, b, K), **more)
    if args.peers and 2 * N * L < 20e9:
        with torch.no_grad():
            yield row("encode", lambda: torch.topk(torch.relu(x_low @ W.T), K, dim=1), by="plain PyTorch")
    yield row("decode", lambda: ours.sparse_decode(values, indices, W, b[:D]))
    yield row("decode for training", lambda: ours.decode_and_dots(values, indices, W, b[:D], x, 1.0, low))
    if N > 64:
        g = torch.randn(N, D, device=device).to(low)

        def backward() -> None:
            order = ours.LatentOrder(indices, L)
            dz = order.value_gradient(g, W)
            order.scatter_rows(values, g)
            order.scatter_rows(dz, x_low)
            order.scatter(dz)

        if 8 * L * D < 40e9:
            yield row("backward (dense gradients)", backward)


def bare_product(x: Tensor, W: Tensor) -> None:
    """x W^T by the device's library, in blocks of latents where the result would be too large to hold."""
    for rows in W.split(max(1, int(10e9) // len(x))):
        torch.mm(x, rows.T)


def check(x: Tensor, W: Tensor, values: Tensor, indices: Tensor) -> float:
    """The largest error of the values of a few tokens against fp64, relative; raises if a larger value was left out."""
    some = torch.linspace(0, len(x) - 1, min(len(x), 16), device=x.device).long()
    Z = torch.cat([x[some].double() @ rows.double().T for rows in W.split(16384)], dim=1)
    best = Z.topk(values.shape[1], dim=1).values
    scale = Z.abs().max()
    chosen = Z.gather(1, indices[some].long())
    error = float((values[some] - chosen.relu()).abs().max() / scale)
    missed = float((best[:, -1:] - chosen).max() / scale)
    if not (error < 1e-3 and missed < 1e-3 and values.isfinite().all()):
        raise SystemExit(f"kernels: encode is wrong: values off by {error:.2g}, latents missed by {missed:.2g}")
    return error


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second of a large copy, read and written."""
    a = torch.empty(1 << 29, dtype=torch.uint8, device=clock.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / (clock.time(lambda: b.copy_(a))[0] * 1e-3)


def state_dtype(shape: Shape, args: argparse.Namespace) -> StateDtype:
    """What the optimiser's state is kept in: as asked, or int8 where float32 would not fit."""
    _, L, D, _ = shape
    return args.state_dtype or ("int8" if L * D > 3e9 else "float32")


def trainer(shape: Shape, x: Tensor, args: argparse.Namespace) -> Trainer:
    N, L, D, K = shape
    config = TrainConfig(d_sae=L, k=K, batch_size=N, device=str(x.device), state_dtype=state_dtype(shape, args))
    norms = x.norm(dim=1)
    stats = ActivationStats(mean=x.mean(dim=0).cpu(), mean_norm=float(norms.mean()), median_norm=float(norms.median()),
                            mean_squared_norm=float(norms.square().mean()), n_rows=N)  # fmt: skip
    # A long run, so that no warm-up or decay falls into what is timed.
    recipe = replace(resolve(config, D, 1_000_000_000), warmup_steps=0)
    return Trainer(config, recipe, stats, SAEConfig(d_in=D, d_sae=L, k=K))


def plain_step(shape: Shape, device: torch.device) -> Callable[[Tensor], Any]:
    """The step as one would write it in PyTorch: dense pre-activations, topk, a dense decoder product, Adam."""
    _, L, D, K = shape
    W_enc, W_dec = (torch.nn.Parameter(0.02 * torch.randn(L, D, device=device)) for _ in range(2))
    b_enc, b_dec = torch.nn.Parameter(torch.zeros(L, device=device)), torch.nn.Parameter(torch.zeros(D, device=device))
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=1e-4, fused=True)

    def step(x: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            Z = torch.nn.functional.linear(x - b_dec, W_enc, b_enc)
            values, indices = Z.topk(K, dim=1)
            code = torch.zeros_like(Z).scatter(1, indices, values.relu())
            error = x - (code @ W_dec + b_dec)
        error.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sparsify_step(shape: Shape, device: torch.device) -> Callable[[Tensor], Any]:
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    _, L, D, K = shape
    sae = SparseCoder(D, SparseCoderConfig(num_latents=L, k=K), device=device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x, x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saelens_step(shape: Shape, device: torch.device) -> Callable[[Tensor], Any]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]

    _, L, D, K = shape
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=L, k=K, device=str(device)))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(x: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            rest: Any = {"coefficients": {}, "dead_neuron_mask": None, "n_training_steps": 0}
            made = TrainStepInput(sae_in=x, is_logging_step=False, **rest)
            sae.training_forward_pass(made).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(shape: Shape, clock: Clock, args: argparse.Namespace, gemm_ms: float) -> Iterator[Row]:
    """Whole training steps: ours, then the others', one in memory at a time."""
    N, _, D, _ = shape
    x = activations(N, D, clock.device)
    makers: dict[str, Callable[[], Callable[[Tensor], Any]]] = {"steersman": lambda: trainer(shape, x, args).step}
    if args.peers:
        makers["plain PyTorch"] = lambda: plain_step(shape, clock.device)
        makers["eai-sparsify"] = lambda: sparsify_step(shape, clock.device)
        makers["SAELens"] = lambda: saelens_step(shape, clock.device)
    for name, make in makers.items():
        try:
            step = make()
            ms, p20, p80, memory = clock.time(lambda step=step: step(x))
        except (torch.OutOfMemoryError, ImportError, MemoryError) as error:
            why = "not installed" if isinstance(error, ImportError) else type(error).__name__
            print(f"  {shape} {name}: {why}")
            continue
        finally:
            step = None
            gc.collect()
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()
        yield Row(shape=shape, part="step", by=name, ms=ms, p20=p20, p80=p80, gemm_ms=gemm_ms, memory_mb=memory)


def updates(shape: Shape, clock: Clock, args: argparse.Namespace, gemm_ms: float) -> Iterator[Row]:
    """The fused backward pass and update of one step alone, where the device has it."""
    N, L, D, K = shape
    device, ours = clock.device, choose(clock.device, args.kernels)
    if not hasattr(ours, "backward_update"):
        return
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    sae = SAE(SAEConfig(d_in=D, d_sae=L, k=K), torch.Generator().manual_seed(0)).to(device)
    rule = UpdateRule(state_dtype=state_dtype(shape, args))
    W_enc, W_dec, b_enc, b_dec = (p.detach() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    state = UpdateState.of(W_enc.T, W_dec, b_enc, b_dec, rule, low)
    x = activations(N, D, device)
    centred = (x - b_dec).to(low)
    values, indices = ours.topk_encode(centred, state.enc_rows, b_enc, K)
    residual, _, dots = ours.decode_and_dots(values, indices, state.dec_rows, b_dec, x, 1.0, low)
    scale = -2 / x.numel()
    lr = torch.full((1,), 1e-4, device=device)

    def update() -> None:
        ours.backward_update(
            state, rule, lr, lr, residual, scale, centred, values, indices, dots, None, centred_by_b_dec=True
        )  # fmt: skip

    ms, p20, p80, memory = clock.time(update)
    yield Row(shape=shape, part="backward and update", by="steersman", ms=ms, p20=p20, p80=p80, gemm_ms=gemm_ms,
              memory_mb=memory)  # fmt: skip


def line(row: Row) -> str:
    extras = [f"{1e2 * row.slow_rows:.3f} % slow rows" if row.slow_rows is not None else "",
              f"{row.bandwidth_share:.2f} of bandwidth" if row.bandwidth_share is not None else "",
              f"error {row.error:.1e}" if row.error is not None else ""]  # fmt: skip
    memory = "" if row.memory_mb is None else f"{row.memory_mb:9.1f} MB"
    shape = "x".join(map(str, row.shape))
    return (
        f"{shape:<24} {row.part:<26} {row.by:<14} {row.ms:10.3f} ms  {row.ms / row.gemm_ms:7.2f} x GEMM {memory}  "
        + ", ".join(filter(None, extras))
    ).rstrip()


def shape_of(text: str) -> Shape:
    """N,L,D,K."""
    try:
        N, L, D, K = (int(number) for number in text.split(","))
    except ValueError as error:
        raise SystemExit(f"kernels: a shape is four numbers N,L,D,K, and {text!r} is not") from error
    return N, L, D, K


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    more: dict[str, Any] = {"nargs": "*", "default": ()}
    parser.add_argument(
        "--shapes", help="N,L,D,K: tokens, features, width, active features; none: the usual ones", **more
    )
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--kernels", default="auto", help="triton, torch or auto")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--peers", action=switch, default=True, help="also eai-sparsify, SAELens and plain PyTorch")
    parser.add_argument("--steps", action=switch, default=True, help="also time whole training steps")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent measuring each number")
    parser.add_argument("--state-dtype", help="the optimiser's state: float32, or int8 where float32 would not fit")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the JSON file")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    shapes = [shape_of(text) for text in args.shapes] or list(GPU if device.type == "cuda" else CPU)
    clock, rows = Clock(device, args.seconds), []
    for shape in shapes:
        with using(args.kernels, device), precision("bf16" if device.type == "cuda" else "fp32"):
            for row in parts(shape, clock, args):
                rows.append(row)
                print(line(row), flush=True)
            if shape[0] > 64 and args.steps:
                gemm_ms = rows[-1].gemm_ms
                for row in itertools.chain(updates(shape, clock, args, gemm_ms), steps(shape, clock, args, gemm_ms)):
                    rows.append(row)
                    print(line(row), flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {p: _version(p) for p in ("torch", "triton", "eai-sparsify", "sae-lens", "steersman")}
    report = {"device": name, "versions": versions, "date": datetime.date.today().isoformat(),
              "threads": torch.get_num_threads(), "kernels": choose(device, args.kernels).__name__,
              "rows": [asdict(row) for row in rows]}  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"kernels-{''.join(c if c.isalnum() else '-' for c in name.lower()).strip('-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(parsed())
