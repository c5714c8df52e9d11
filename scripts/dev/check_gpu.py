"""Hold every path that runs on a GPU to exact references on that GPU.

    python scripts/dev/check_gpu.py --out check_gpu.json

Parts: encode, threshold, decode, update (the kernels, see `kernels.tools.checks`), train (two runs give the same bits,
graphed steps are eager steps, a run resumed from a checkpoint is the run that was never stopped), sanitizer (short
forms under NVIDIA's compute-sanitizer, where it is installed), pytest (the test modules of the kernels on the GPU,
where pytest is installed). Without --part all of them run.

The checks run in a process of their own, which is begun again after one that crashes, hangs or breaks the CUDA context.
Results are written after each check. Ends with one line; fails where a check did. With --device cpu and
TRITON_INTERPRET=1 short forms run under Triton's interpreter.
"""

import argparse  # not tyro: runs on a bare GPU image
import datetime
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from steersman import TrainConfig
from steersman.files import write_json
from steersman.kernels import using
from steersman.kernels.tools import checks
from steersman.kernels.tools.checks import Check, NotRunError, require
from steersman.sae import SAEConfig
from steersman.train import ActivationStats, Trainer, resolve
from steersman.train.run.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]
PARTS = ("encode", "threshold", "decode", "update", "train", "sanitizer", "pytest")
CRASHED = 3
"""Exit code of a child whose CUDA context no longer works."""


# --- training ---


def batches(n: int, N: int, D: int, device: torch.device) -> list[torch.Tensor]:
    """Sparse mixtures of directions, [N, D] each."""
    generator = torch.Generator(device).manual_seed(1)
    atoms = torch.randn(2 * D, D, generator=generator, device=device)
    code = torch.rand(n, N, 2 * D, generator=generator, device=device)
    return list((code * (code > 0.95)) @ atoms + 0.3)


def trainer(rows: torch.Tensor, options: dict[str, Any]) -> Trainer:
    """A small trainer whose latents die soon, so that AuxK is on."""
    N, D = rows.shape
    settings: dict[str, Any] = {"d_sae": 16 * D, "k": 4, "batch_size": N, "seed": 3, "device": str(rows.device)}
    config = TrainConfig(**settings | {"tokens": 64 * N, "dead_after": 4 * N, "fused_update": True} | options)
    norms = rows.norm(dim=1)
    stats = ActivationStats(
        mean=rows.mean(dim=0).cpu(), mean_norm=float(norms.mean()), median_norm=float(norms.median()),
        mean_squared_norm=float(norms.square().mean()), n_rows=N,
    )  # fmt: skip
    cfg = SAEConfig(d_in=D, d_sae=config.d_sae, k=config.k, architecture=config.architecture)
    return Trainer(config, resolve(config, D, 64 * N), stats, cfg)


def trained(data: list[torch.Tensor], **options: Any) -> Trainer:
    """A trainer after a step on each batch."""
    run = trainer(data[0], options)
    for x in data:
        run.step(x)
    return run


def require_same_trainers(a: Trainer, b: Trainer) -> None:
    left, right = a._state(), b._state()
    require(left.keys() == right.keys(), "the states list different tensors")
    for name, value in left.items():
        require(torch.equal(value, right[name]), f"{name} differs")


def check_same_bits(data: list[torch.Tensor], options: dict[str, Any]) -> str:
    first, second = trained(data, **options), trained(data, **options)
    require_same_trainers(first, second)
    return f"FVU of the steps {first.read_metrics()['fvu']:.3f}"


def check_graph(data: list[torch.Tensor], options: dict[str, Any]) -> str:
    require_same_trainers(trained(data, **options), trained(data, cuda_graph=True, **options))
    return f"{len(data)} steps"


def check_resume(data: list[torch.Tensor], options: dict[str, Any]) -> str:
    """A run saved after half of its steps, and gone on with from the file, is the run that was not stopped."""
    half = len(data) // 2
    with tempfile.TemporaryDirectory() as folder:
        saved = trained(data[:half], **options)
        checkpoints = Checkpoints(Path(folder), keep=1)
        saved.save(checkpoints)
        for x in data[half:]:  # while the file is written
            saved.step(x)
        checkpoints.wait()
        resumed = trainer(data[0], options)
        require(resumed.resume(Checkpoints(Path(folder), keep=1)), "no checkpoint was found")
        for x in data[half:]:
            resumed.step(x)
        require_same_trainers(saved, resumed)
    return f"after {half} of {len(data)} steps"


def train_checks(device: torch.device, short: bool) -> Iterator[Check]:
    """Whole training steps through `Trainer`."""
    data = batches(4 if short else 20, 8 if short else 512, 4 if short else 64, device)
    forms: list[dict[str, Any]] = [{}]
    if not short:
        forms += [{"state_dtype": "int8"}, {"optimizer": "signum_touched", "state_dtype": "bfloat16", "ema": 0.9}]
    for options in forms:
        what = " ".join(str(value) for value in options.values()) or "adam float32"
        for name, run in (("same bits", check_same_bits), ("resumed", check_resume), ("graph", check_graph)):
            if name != "graph" or device.type == "cuda":
                yield Check(part="train", name=f"{name} {what}", run=lambda run=run, o=options: run(data, o))


# --- programs around the kernels ---


def check_sanitizer(tool: str, part: str) -> str:
    """The short form of a part under a tool of compute-sanitizer."""
    found = shutil.which("compute-sanitizer") or next(
        (str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None
    )
    if found is None:
        raise NotRunError("compute-sanitizer is not installed")
    command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--child", "0"]
    command += ["--device", "cuda", "--short", "--part", part]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a block of the cache has no bounds of its own
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SANITIZER_SECONDS, env=environment
    )
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"part"')]
    wrong = [row["name"] for row in results if row["status"] == "failed"]
    said = [line for line in run.stdout.splitlines() if line.startswith("=========")]
    require(
        run.returncode == 0 and not wrong and len(results) > 0,
        f"exit {run.returncode}, {wrong}: {' | '.join(said[:6])}",
    )
    return f"{len(results)} checks under {tool}"


SANITIZER_SECONDS, PYTEST_SECONDS = 400, 520


def program_checks(device: torch.device, short: bool) -> Iterator[Check]:
    """compute-sanitizer and pytest."""
    if device.type == "cuda" and not short:
        for part in PARTS[:4]:
            for tool in ("memcheck", "racecheck"):
                yield Check(part="sanitizer", name=f"{tool} {part}", seconds=SANITIZER_SECONDS + 20,
                            run=lambda tool=tool, part=part: check_sanitizer(tool, part))  # fmt: skip
    modules = sorted((ROOT / "tests").glob("test_kernels_triton_*.py"))
    modules += [ROOT / "tests" / name for name in ("test_kernels_update.py", "test_train_graph.py")]
    for module in modules if not short else modules[1:2]:
        yield Check(part="pytest", name=module.name, seconds=PYTEST_SECONDS + 20, run=lambda m=module: check_pytest(m))


def check_pytest(module: Path) -> str:
    if importlib.util.find_spec("pytest") is None:
        raise NotRunError("pytest is not installed")
    if not module.exists():
        raise NotRunError("there are no tests beside this script")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(module)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=PYTEST_SECONDS)
    lines = run.stdout.splitlines()
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    require(run.returncode == 0, f"exit {run.returncode}: {' | '.join(failed[:5] or lines[-5:])} {run.stderr[-300:]}")
    return lines[-1].strip()


# --- the child, which runs checks, and the parent, which survives it ---


def every(device: torch.device, args: argparse.Namespace) -> list[Check]:
    """The checks of the parts asked for, always in the same order."""
    short = args.short or device.type == "cpu"
    found: list[Check] = []
    for family in (checks.encode_checks, checks.threshold_checks, checks.decode_checks, checks.update_checks):
        found += family(device, short)
    found += train_checks(device, short)
    found += program_checks(device, short)
    return [check for check in found if check.part in args.part and args.only in check.name]


def child(args: argparse.Namespace) -> int:
    """Run the checks from number `args.child` on; a line of JSON for the machine, then one for each check."""
    device = torch.device(args.device)
    todo = every(device, args)
    about = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, Triton's interpreter"}
    say({"about": about | versions(), "names": [(c.part, c.name, c.seconds) for c in todo]})
    for check in todo[args.child :]:
        start, status = time.perf_counter(), "passed"
        try:
            with using("triton", device):
                remark = check.run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except NotRunError as error:
            status, remark = "not run", str(error)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            status, remark = "failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        row = {"part": check.part, "name": check.name, "status": status, "remark": remark[:2000]}
        say(row | {"seconds": round(time.perf_counter() - start, 2)})
        if status == "failed" and device.type == "cuda" and not usable(device):
            return CRASHED
    return 0


def usable(device: torch.device) -> bool:
    """Whether the CUDA context survived."""
    try:
        torch.cuda.empty_cache()
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except Exception:
        return False


def versions() -> dict[str, str]:
    import triton

    cuda = {"cuda": str(torch.version.cuda)} if torch.version.cuda else {}
    return {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]} | cuda


def say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


class Supervisor:
    """Runs children until every check has a result, and keeps the results in a file."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.results: list[dict[str, Any]] = []
        self.about: dict[str, str] = {}
        self.stop = time.monotonic() + 60 * args.minutes

    def run(self) -> int:
        names: list[Any] | None = None
        while names is None or len(self.results) < len(names):
            if time.monotonic() > self.stop:
                break
            names = self._child(names)
            if names is None:
                print("check_gpu: the checks could not be begun", file=sys.stderr)
                return 1
        for part, name, _ in (names or [])[len(self.results) :]:
            self._add({"part": part, "name": name, "status": "not run", "remark": "out of time", "seconds": 0.0})
        return self._last_line()

    def _child(self, names: list[Any] | None) -> list[Any] | None:
        """One child from the first check without a result on; returns the names of all checks."""
        args = [a for name in ("device", "only") for a in (f"--{name}", getattr(self.args, name))]
        args += ["--part", *self.args.part, *["--short"] * self.args.short]
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(len(self.results)), *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None
        reader = threading.Thread(
            target=lambda out=process.stdout: [*map(lines.put, out), lines.put(None)], daemon=True
        )
        reader.start()
        limit = 120.0
        try:
            while True:
                try:
                    line = lines.get(timeout=max(1.0, min(limit, self.stop - time.monotonic())))
                except queue.Empty:
                    self._lost(
                        names, f"no result after {limit:.0f} s" if time.monotonic() < self.stop else "out of time"
                    )
                    return names
                if line is None:
                    process.wait()
                    if names and process.returncode not in (0, CRASHED):
                        self._lost(names, f"the process ended with code {process.returncode}")
                    return names
                if line.startswith('{"about"'):
                    row = json.loads(line)
                    self.about, names = row["about"], row["names"]
                elif line.startswith('{"part"'):
                    self._add(json.loads(line))
                else:
                    continue
                if names and len(self.results) < len(names):
                    limit = float(names[len(self.results)][2])
        finally:
            process.kill()

    def _lost(self, names: list[Any] | None, why: str) -> None:
        if names and len(self.results) < len(names):
            part, name, _ = names[len(self.results)]
            self._add({"part": part, "name": name, "status": "failed", "remark": why, "seconds": 0.0})

    def _add(self, row: dict[str, Any]) -> None:
        self.results.append(row)
        mark = {"passed": "ok  ", "failed": "FAIL", "not run": "-   "}[row["status"]]
        print(
            f"{mark} {row['part']:<9} {row['name']:<58} {row['seconds']:7.2f} s  {row['remark']}".rstrip(), flush=True
        )
        if self.args.out:
            report = {"about": self.about, "date": datetime.date.today().isoformat(), "results": self.results}
            write_json(self.args.out, report, indent=1)

    def _last_line(self) -> int:
        counts = {s: sum(row["status"] == s for row in self.results) for s in ("passed", "failed", "not run")}
        n = counts["passed"] + counts["failed"]
        reasons = sorted({row["remark"] for row in self.results if row["status"] == "not run"})
        left = f" ({counts['not run']} not run: {', '.join(reasons)})" if reasons else ""
        print(f"check_gpu: {counts['passed']} of {n} checks passed on {self.about.get('device')}{left}")
        return 0 if n and not counts["failed"] else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu under TRITON_INTERPRET=1")
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS, help="only these groups")
    parser.add_argument("--only", default="", help="only checks whose name contains this")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--short", action=switch, default=False, help="few and small shapes")
    parser.add_argument("--minutes", type=float, default=60.0, help="time after which nothing further is begun")
    parser.add_argument("--out", type=Path, help="the JSON file of the results")
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    if args.child is not None:
        return child(args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "check_gpu: PyTorch sees no CUDA device; --device cpu runs short forms under TRITON_INTERPRET=1"
        )
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("check_gpu: on the CPU the kernels run under TRITON_INTERPRET=1 alone; set it")
    return Supervisor(args).run()


if __name__ == "__main__":
    raise SystemExit(main(parsed()))
