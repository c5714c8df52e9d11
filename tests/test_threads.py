"""Threads of a program: they soon sleep where they wait, and their number fits the container; what users set stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steersman import threads


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*threads._WAITING, *threads._COUNTING):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    return monkeypatch


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("cpu_", "cpu.")).write_text(text + "\n")


def test_the_smallest_quota_up_the_tree_counts(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/pod/box\n")
    assert threads._cpu_quota(root, own) is None
    group(root / "pod" / "box", cpu_max="max 100000")
    assert threads._cpu_quota(root, own) is None
    group(root / "pod", cpu_max="250000 100000")
    assert threads._cpu_quota(root, own) == 2.5
    group(root, cpu_max="150000 100000")
    assert threads._cpu_quota(root, own) == 1.5
    assert threads._cpu_quota(root, tmp_path / "missing") is None


def test_quotas_of_the_first_version(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("4:memory:/m\n2:cpu,cpuacct:/job\n")
    group(root / "cpu" / "job", cpu_cfs_quota_us="300000", cpu_cfs_period_us="100000")
    group(root / "cpu", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    assert threads._cpu_quota(root, own) == 3


@pytest.mark.parametrize(("quota", "cores", "set_to"), [(None, 4, None), (0.5, 1, "1"), (2.5, 3, "3"), (64.0, 4, "4")])
def test_threads_are_as_many_as_cores(
    quota: float | None, cores: int, set_to: str | None, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr(threads, "_cpu_quota", lambda: quota)
    environment.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert threads.usable_cores() == cores
    threads.share_the_machine()
    assert os.environ.get("OMP_NUM_THREADS") == set_to
    assert {name: os.environ[name] for name in threads._SPINS} == threads._SPINS


def test_settings_of_the_user_stay(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(threads, "_cpu_quota", lambda: 1.0)
    environment.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environment.setenv("MKL_NUM_THREADS", "3")
    threads.share_the_machine()
    assert "GOMP_SPINCOUNT" not in os.environ
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_command_line_sets_them_before_pytorch_is_there() -> None:
    """And the library, which is no program, leaves the environment as it is."""
    code = (
        "import os, sys, steersman.cli as cli\n"
        "cli.run = lambda argv: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)\n"
        "cli.main([])\n"
        "import steersman.sae\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in threads._WAITING}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10000", "False"]
    code = "import os, steersman.sae; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None"]
