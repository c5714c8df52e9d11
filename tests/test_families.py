"""The page of families is what its script finds: a few of its rows, made again."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

ROOT = Path(__file__).parents[1]
ROWS = ("granite", "gemma2", "glm4", "mpt", "cohere2", "granitemoeshared", "xlm-roberta", "gemma3n_text")
"""A factor, norms after the sublayers, a block that adds inside, parts side by side, a third summand, an encoder."""


@pytest.fixture(scope="module")
def families() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", ROOT / "scripts" / "dev" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module  # where its dataclass looks for its own names
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_of_the_page(kind: str, families: ModuleType) -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip("the page was written with another version of transformers")
    row = families.tried(kind, families.mapping_of(kind))
    assert families.table_row(kind, row) in page.splitlines()
    if kind == "granite":
        assert row["adds up"] == "yes, x 0.22"
