"""What must be set before anything is imported, and fixtures that many modules share.

Without a GPU the Triton kernels run under Triton's interpreter. One thread: what is compared to the last bit must not
depend on how many a process has, tensors here are small, and threads that wait for one another spin.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from steersman.lm import LanguageModel

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _interpreter_obstacle() -> str | None:
    """Why Triton's interpreter cannot run here although there is a Triton, or None."""
    from support.helpers import triton_before

    if not INTERPRETED or importlib.util.find_spec("triton") is None or not triton_before(3, 9):
        return None
    try:
        int(np.ones(1))
    except TypeError:  # the interpreter of Triton before 3.9 turns arrays of one element into numbers
        import triton

        return (
            f"the kernels were NOT tested: the interpreter of Triton {triton.__version__} needs NumPy before 2.4, and "
            f"this is {np.__version__}; install another of the two"
        )
    return None


OBSTACLE = _interpreter_obstacle()


LONGEST = (
    "test_docs.py", "test_kernels_compiled.py", "test_docs_notebooks.py", "test_demo_quickstart.py",
    "test_kernels_triton_update.py", "test_train_sharded_update.py", "test_train_trainer.py",
    "test_train_parallel_cache.py", "test_train_transcoder.py", "test_docs_site.py", "test_train_model_ranks.py",
    "test_steer_training_vectors.py", "test_train_cache.py", "test_earlier_versions.py",
)  # fmt: skip
"""Modules of a minute or so: they come first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules before the others."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of the kernels that cannot run fail, so that nobody takes a suite without them for one that passed."""
    if OBSTACLE and (item.path.name.startswith("test_kernels_triton_") or "runs_on_triton" in item.name):
        pytest.fail(OBSTACLE, pytrace=False)


@pytest.fixture
def seeded() -> None:
    """PyTorch's own generator starts from 0."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A random Llama of three blocks with a tokenizer of words; a module that needs another has an `lm` of its own."""
    from support.tiny_models import with_text

    return with_text("llama")


@pytest.fixture
def no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lines about the progress of long work."""
    monkeypatch.setenv("STEERSMAN_PROGRESS", "0")
