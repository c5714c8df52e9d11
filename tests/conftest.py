"""Without a GPU the Triton kernels run under Triton's interpreter, which has to be chosen before they are imported."""

import importlib.util
import os

import numpy as np
import pytest
import torch

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
