"""Time the kernels against the bare matrix product, and whole training steps against other libraries.

    python scripts/bench/kernels.py --part encode decode --minutes 9

For each shape, small to large, and each part: the median time, the time of the bare matrix product of the encoder in
the same run, their ratio, and memory beyond the inputs. Parts: encode (checked against a product in fp64 first, with
the fraction of rows that took the exact slow path), decode (and the unfused backward pass), update (the fused backward
pass and update alone), step (whole training steps with nothing dead, with dead latents, and as a CUDA graph), peers
(the same step by plain PyTorch, eai-sparsify and SAELens, where they are installed and fit in memory).

The table is printed and written as JSON under --out after each row, and rows of an earlier call on the same device and
versions are kept, so that parts can be measured one call at a time. What fails is a row that says so. On a CPU small
shapes run with the PyTorch kernels. With --profile, on a GPU, a row lists the kernels that ran in it.
"""

import argparse  # not tyro: a bare GPU image has to do, with torch, triton, numpy, safetensors, einops, transformers
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

from steersman import TrainConfig
from steersman.kernels import UpdateRule, UpdateState, choose, precision, using
from steersman.kernels.tools.timing import Clock, Table, activations, bare_product, encode_error, launches, unit_rows
from steersman.sae import SAE, SAEConfig
from steersman.train import ActivationStats, Trainer, resolve

Shape = tuple[int, int, int, int]
PARTS = ("encode", "decode", "update", "step", "peers")
GPU: tuple[Shape, ...] = (
    (1, 65536, 2304, 64),
    (64, 65536, 2304, 64),
    (4096, 65536, 2304, 64),
    (8192, 131072, 1024, 32),
    (8192, 131072, 4096, 64),
)
"""Shapes of a GPU. Larger ones are asked for: 16384,262144,4096,64 and 8192,1048576,4096,64."""
CPU: tuple[Shape, ...] = ((1, 4096, 384, 32), (1024, 4096, 384, 32), (1024, 16384, 384, 32))
SMALL = 64
"""Tokens up to which nobody trains."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number with what it is compared with, or why there is none."""

    shape: Shape
    part: str
    by: str
    ms: float | None = None
    """Median."""
    p20: float | None = None
    p80: float | None = None
    gemm_ms: float | None = None
    """The bare product N x D by D x L of the same run."""
    memory_mb: float | None = None
    """Largest allocation beyond what was there before; None where the device does not say."""
    slow_rows: float | None = None
    """Fraction of rows that took the exact slow path."""
    bandwidth_share: float | None = None
    """For few tokens: one reading of W_enc, over the time and the copy bandwidth of the same run."""
    error: float | None = None
    """Largest error of an encoded value against fp64, relative to the largest value."""
    failure: str | None = None
    """What went wrong."""
    kernels: list[dict[str, Any]] | None = None
    """See `timing.launches`, where it was asked for."""

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        head = f"{shape:<24} {self.part:<38} {self.by:<14}"
        if self.ms is None or self.gemm_ms is None:
            return f"{head} {self.failure}"
        extras = [f"{1e2 * self.slow_rows:.3f} % slow rows" if self.slow_rows is not None else "",
                  f"{self.bandwidth_share:.2f} of bandwidth" if self.bandwidth_share is not None else "",
                  f"error {self.error:.1e}" if self.error is not None else ""]  # fmt: skip
        memory = "" if self.memory_mb is None else f"{self.memory_mb:9.1f} MB"
        numbers = f"{self.ms:10.3f} ms  {self.ms / self.gemm_ms:7.2f} x GEMM {memory}  "
        line = (f"{head} {numbers}" + ", ".join(filter(None, extras))).rstrip()
        busy = sum(kernel["ms"] for kernel in self.kernels or ())
        lines = [f"  {k['ms']:9.3f} ms {k['launches']:6.1f} launches {k['ms'] / busy:6.1%}  {k['kernel']}"
                 for k in (self.kernels or ())[:20]]  # fmt: skip
        return "\n".join([line, *lines])


class OutOfTimeError(Exception):
    """The call's time is spent; what was measured is written."""


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


Made = tuple[Callable[[], Any], dict[str, Any]]
"""What to time, and further columns of its row."""


class Bench:
    """Measures one shape after the other."""

    def __init__(self, device: torch.device, args: argparse.Namespace):
        self.device, self.args, self.clock = device, args, Clock(device, args.seconds)
        self.stop, self.ours = time.monotonic() + 60 * args.minutes, choose(device, args.kernels)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        about = {"device": name or platform.machine(), "threads": torch.get_num_threads(),
                 "versions": {p: version(p) for p in ("torch", "triton", "eai-sparsify", "sae-lens", "steersman")},
                 "kernels": self.ours.__name__}  # fmt: skip
        plain = "".join(c if c.isalnum() else "-" for c in about["device"].lower()).strip("-")
        self.table = Table(args.out / f"kernels-{plain}.json", about, names=("shape", "part", "by"))
        self.low = torch.bfloat16 if device.type == "cuda" else torch.float32

    def row(self, shape: Shape, part: str, by: str, gemm_ms: float, make: Callable[[], Made]) -> None:
        """Measure what `make` builds, in memory alone; whatever it raises is the row."""
        if time.monotonic() > self.stop:
            raise OutOfTimeError
        run = None
        try:
            run, more = make()
            if self.args.profile:
                run()
                more |= {"kernels": launches(run, self.device)}
            row = Row(shape=shape, part=part, by=by, gemm_ms=gemm_ms, **self.clock.time(run)._asdict(), **more)
        except Exception as error:
            why = "not installed" if isinstance(error, ImportError) else type(error).__name__
            first = str(error).strip().splitlines()
            row = Row(shape=shape, part=part, by=by, failure=f"{why}: {first[0][:200] if first else ''}")
        finally:
            run = None
            self.free()
        print(row, flush=True)
        self.table.add(asdict(row) | {"shape": list(shape)})

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def shape(self, shape: Shape) -> None:
        """All parts of one shape that were asked for."""
        x = activations(shape[0], shape[2], self.device)
        gemm_ms = self.code(shape, x)
        self.free()
        if shape[0] <= SMALL:
            return
        parts = self.args.part
        for moments in moments_of(shape, self.args):
            if "update" in parts and hasattr(self.ours, "backward_update"):
                self.row(shape, f"backward and update, {moments}", "steersman", gemm_ms,
                         lambda m=moments: self.update(shape, x, m))  # fmt: skip
            if "step" in parts:
                self.steps(shape, x, moments, gemm_ms)
        if "peers" in parts:
            for name, peer in (
                ("plain PyTorch", plain_step),
                ("eai-sparsify", sparsify_step),
                ("SAELens", saelens_step),
            ):
                self.row(shape, "step", name, gemm_ms, lambda peer=peer: step_on(peer(shape, self.device), x))

    def code(self, shape: Shape, x: Tensor) -> float:
        """The parts that read weights in the dtype of the products alone; returns the bare product's milliseconds."""
        N, L, D, K = shape
        W, x_low = unit_rows(L, D, self.device, self.low), x.to(self.low)
        gemm_ms = self.clock.time(lambda: bare_product(x_low, W)).ms
        if "encode" in self.args.part:
            self.row(shape, "encode", "steersman", gemm_ms, lambda: self.encode(x, x_low, W, K))
            if "peers" in self.args.part and 2 * N * L < 20e9:
                plain = lambda: torch.topk(torch.relu(x_low @ W.T), K, dim=1)  # noqa: E731
                self.row(shape, "encode", "plain PyTorch", gemm_ms, lambda: (plain, {}))
        if "decode" in self.args.part:
            for part, make in self.decoding(x, x_low, W, K):
                self.row(shape, part, "steersman", gemm_ms, make)
        return gemm_ms

    def encode(self, x: Tensor, x_low: Tensor, W: Tensor, K: int) -> Made:
        ours, b = self.ours, torch.zeros(len(W), device=self.device)
        values, indices = ours.topk_encode(x, W, b, K)
        more: dict[str, Any] = {"error": encode_error(x_low, W, values, indices)}
        if len(x) <= SMALL and self.device.type == "cuda":
            ms = self.clock.time(lambda: ours.topk_encode(x, W, b, K)).ms
            more["bandwidth_share"] = W.nbytes / (ms * 1e-3) / self.clock.copy_bandwidth()
        if hasattr(ours, "triton_encode"):
            more["slow_rows"] = float(ours.triton_encode.topk_encode_counted(x, W, b, K)[2]) / len(x)
        return lambda: ours.topk_encode(x, W, b, K), more

    def decoding(self, x: Tensor, x_low: Tensor, W: Tensor, K: int) -> Iterator[tuple[str, Callable[[], Made]]]:
        """Decode, and the backward pass of dense gradients."""
        ours, low, (L, D) = self.ours, self.low, W.shape
        bias = torch.zeros(D, device=self.device)
        values, indices = ours.topk_encode(x, W, torch.zeros(L, device=self.device), K)
        yield "decode", lambda: (lambda: ours.sparse_decode(values, indices, W, bias), {})
        fused = lambda: ours.decode_and_dots(values, indices, W, bias, x, 1.0, low)  # noqa: E731
        yield "decode, residual, dots", lambda: (fused, {})
        if len(x) > SMALL and 8 * L * D < 40e9:
            g = x_low.flip(0).contiguous()

            def backward() -> None:
                order = ours.LatentOrder(indices, L)
                dz = order.value_gradient(g, W)
                order.scatter_rows(values, g)
                order.scatter_rows(dz, x_low)
                order.scatter(dz)

            yield "backward (dense gradients)", lambda: (backward, {})

    def update(self, shape: Shape, x: Tensor, moments: Any) -> Made:
        """The fused backward pass and update of one step alone."""
        _, L, D, K = shape
        ours, low = self.ours, self.low
        rule = UpdateRule(state_dtype=moments)
        W = unit_rows(L, D, self.device, torch.float32)
        biases = torch.zeros(L, device=self.device), torch.zeros(D, device=self.device)
        state = UpdateState.of(W.clone(), W, *biases, rule, low)
        centred = x.to(low)
        values, indices = ours.topk_encode(centred, state.enc_rows, state.b_enc, K)
        residual, _, dots = ours.decode_and_dots(values, indices, state.dec_rows, state.b_dec, x, 1.0, low)
        lr = torch.full((1,), 1e-4, device=self.device)

        def update() -> None:
            ours.backward_update(
                state, rule, lr, lr, residual, -2 / x.numel(), centred, values, indices, dots, None,
                centred_by_b_dec=True,
            )  # fmt: skip

        return update, {}

    def steps(self, shape: Shape, x: Tensor, moments: Any, gemm_ms: float) -> None:
        """Whole training steps, with and without dead latents."""
        n_dead = min(1000, shape[1] // 2)
        dead_or_not = (("nothing dead", 0), (f"{n_dead} dead", n_dead))
        forms = [(name, dead, False) for name, dead in dead_or_not]
        if self.device.type == "cuda":
            forms += [(f"{name}, graph", dead, True) for name, dead in dead_or_not]
        for name, dead, graph in forms:
            self.row(shape, f"step, {moments}, {name}", "steersman", gemm_ms,
                     lambda d=dead, g=graph: step_on(self.trainer(shape, x, moments, d, g).step, x))  # fmt: skip

    def trainer(self, shape: Shape, x: Tensor, moments: Any, n_dead: int, graph: bool) -> Trainer:
        N, L, D, K = shape
        config = TrainConfig(d_sae=L, k=K, batch_size=N, device=str(x.device), state_dtype=moments, cuda_graph=graph)
        norms = x.norm(dim=1)
        stats = ActivationStats(mean=x.mean(dim=0).cpu(), mean_norm=float(norms.mean()), n_rows=N,
                                median_norm=float(norms.median()),
                                mean_squared_norm=float(norms.square().mean()))  # fmt: skip
        # A long run, so that no warm-up or decay falls into what is timed.
        recipe = replace(resolve(config, D, 1_000_000_000), warmup_steps=0)

        def drawn_on_device(cfg: SAEConfig, *_: Any) -> SAE:
            """A trainer draws weights on the CPU, the same on every device, which takes minutes for the largest."""
            with torch.device(x.device):
                return SAE(cfg)

        with mock.patch("steersman.train.run.trainer.new_sae", drawn_on_device):
            made = Trainer(config, recipe, stats, SAEConfig(d_in=D, d_sae=L, k=K))
        if n_dead:
            dead = spread(n_dead, L, x.device)
            with torch.no_grad():
                made.sae.b_enc[dead] = -1e4  # so that they stay dead
            silent = torch.zeros(L, dtype=torch.int32, device=x.device)
            silent[dead] = recipe.dead_after_steps + 1
            made.dead_latents.restore(silent)
        return made


def spread(n: int, L: int, device: torch.device) -> Tensor:
    """The ids of n of L latents, evenly spread as features die in training. The first n would be most of the encoder's
    first wave, which bounds what the others must reach: then every row takes the exact slow path."""
    return torch.arange(n, device=device) * L // n


def step_on(step: Callable[[Tensor], Any], x: Tensor) -> Made:
    for _ in range(5):  # a graph is captured after some
        step(x)
    return lambda: step(x), {}


def moments_of(shape: Shape, args: argparse.Namespace) -> list[str]:
    """What the optimiser's state is kept in: as asked, or int8 alone where float32 would not fit."""
    _, L, D, _ = shape
    return args.moments or (["int8"] if L * D > 3e9 else ["float32", "int8"])


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


def shape_of(text: str) -> Shape:
    """N,L,D,K."""
    try:
        N, L, D, K = (int(number) for number in text.split(","))
    except ValueError as error:
        raise SystemExit(f"kernels: a shape is four numbers N,L,D,K, and {text!r} is not") from error
    return N, L, D, K


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="*",
        default=(),
        help="N,L,D,K: tokens, features, width, active features; none: the usual ones",
    )
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS, help="only these parts")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--kernels", default="auto", help="triton, torch or auto")
    parser.add_argument(
        "--moments", nargs="*", choices=("float32", "bfloat16", "int8"), default=(),
        help="what the optimiser's state is kept in; none: float32 and int8, or int8 where float32 would not fit",
    )  # fmt: skip
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--profile", action=switch, default=False, help="list the kernels of each row; needs a GPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent measuring each number")
    parser.add_argument("--minutes", type=float, default=30.0, help="time after which no further row is begun")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the JSON file")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    shapes = [shape_of(text) for text in args.shapes] or list(GPU if device.type == "cuda" else CPU)
    if args.profile and device.type != "cuda":
        raise SystemExit("kernels: --profile needs a GPU")
    bench = Bench(device, args)
    try:
        for shape in sorted(shapes, key=lambda s: s[0] * s[1] * s[2]):
            with using(args.kernels, device), precision("bf16" if device.type == "cuda" else "fp32"):
                bench.shape(shape)
            bench.free()
    except OutOfTimeError:
        print(f"kernels: {args.minutes:g} minutes are over; the rows until here are written")
    print(bench.table.path)


if __name__ == "__main__":
    main(parsed())
