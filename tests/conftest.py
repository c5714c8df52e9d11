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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter of Triton before 3.9 turns arrays of one element into numbers, which NumPy 2.5 refuses."""
    from support.helpers import triton_before

    try:
        int(np.ones(1))
    except TypeError:
        if INTERPRETED and importlib.util.find_spec("triton") is not None and triton_before(3, 9):
            for item in items:
                if item.path.name.startswith("test_kernels_triton_") or "runs_on_triton" in item.name:
                    item.add_marker(pytest.mark.skip(reason="this Triton's interpreter needs NumPy before 2.5"))


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
