"""What people copy or run in `scripts/`: each can be started, and takes its settings in the one way."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXTENSION = "scripts/dev/reference.py"
"""Loaded by what builds the documentation, and run by nobody."""
SCRIPTS = sorted({path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*.py")} - {EXTENSION})
BARE = {
    "scripts/bench/kernels.py",
    "scripts/dev/autotune_kernels.py",
    "scripts/dev/check_gpu.py",
    "scripts/dev/kernel_resources.py",
}
"""Those that run without tyro too."""
PEERS = {"sae_bench", "sae_lens", "sae_probes", "sparsify"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_imports_is_there(script: str) -> None:
    missing = []
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in PEERS:
            module = importlib.import_module(node.module or "")
            missing += [f"{node.module}.{name}" for name in names if not has(module, name)]
        elif isinstance(node, ast.Import):
            missing += [name for name in names if importlib.util.find_spec(name) is None]
    assert not missing


def has(module: object, name: str) -> bool:
    """Whether `from module import name` works."""
    if hasattr(module, name):
        return True
    return importlib.util.find_spec(f"{module.__name__}.{name}") is not None  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_settings_are_a_dataclass_that_says_what_each_means(script: str) -> None:
    source = (ROOT / script).read_text()
    assert ("import argparse" in source) == (script in BARE)
    part = script.startswith("scripts/study/") and script != "scripts/study/__main__.py"  # __main__ reads its settings
    assert ("tyro.cli(" in source) == (script not in BARE and not part)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            assert [ast.unparse(decorator) for decorator in node.decorator_list] == [
                "dataclass(frozen=True, kw_only=True)"
            ]
            fields = [i for i, line in enumerate(node.body) if isinstance(line, ast.AnnAssign)]
            bare = [ast.unparse(node.body[i]) for i in fields if not isinstance(node.body[i + 1], ast.Expr)]
            assert fields or len(node.bases) > 1  # else it has those of two others
            assert not bare


def test_scripts_for_a_gpu_start_where_there_is_little_beside_pytorch() -> None:
    """An image with torch, triton, numpy, safetensors, einops and transformers has none of what is blocked here."""
    code = f"""
import contextlib, io, runpy, sys
for name in ("tyro", "wandb", "datasets", "matplotlib", "sparsify", "sae_lens", "gguf", "accelerate", "peft", "pytest"):
    sys.modules[name] = None
for script in {sorted(BARE)}:
    sys.argv, out = [script, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "usage" in out.getvalue(), script
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


def test_the_benchmarks_dead_features_are_few_of_the_encoders_first_wave() -> None:
    triton_encode = pytest.importorskip("steersman.kernels.triton_encode")
    spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "scripts/bench/kernels.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    sys.modules["bench_kernels"] = bench  # dataclasses look their module up
    try:
        spec.loader.exec_module(bench)
    finally:
        del sys.modules["bench_kernels"]
    dead = bench.spread(1000, 65536, torch.device("cpu"))
    assert dead.unique().shape == (1000,)
    assert int((dead < triton_encode.plan(65536, 64).waves[0][1]).sum()) == 16
