"""Some hundred damaged files of the kinds that are quick to read: what `scripts/soak/damaged_files.py` does by the
thousand."""

import importlib.util
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "soak" / "damaged_files.py"
KINDS = ("sae", "inspect", "vector", "yaml", "text")


@pytest.fixture(scope="module")
def soak() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("damaged_files", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_damaged_files_are_refused_or_what_they_were(
    soak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(soak.logging, "disable", lambda _: None)  # for the tests after this one
    monkeypatch.setattr(soak.torch, "set_num_threads", lambda _: None)
    before = {number: signal.signal(number, soak.hang) for number in (signal.SIGALRM, signal.SIGPROF)}
    soak.make(tmp_path, KINDS)
    tries = soak.Tries(tmp_path, soak.Config(kinds=KINDS, seed=1))
    try:
        found = [tries.one(number) for number in range(160)]
    finally:
        tries.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not [result for result in found if result[1] in soak.BAD]
    counts = Counter((kind, outcome) for kind, outcome, _ in found)
    assert all(counts[kind, "refused"] > 10 for kind in KINDS)
    assert sum(counts[kind, "equal"] for kind in KINDS) > 2
