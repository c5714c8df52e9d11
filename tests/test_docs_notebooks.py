"""The notebooks of the documentation run from top to bottom, each in a kernel of its own, in one folder."""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbclient and ipykernel (the extra test)")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SAYS = {
    "steer_a_chat_model": ["tokens were steered, all of them the assistant's", "seaside"],
    "take_a_vector_apart": ["random directions", "reconstruction, equal norm", "a top-k SAE names up to k"],
    "train_and_look": ["ce_recovered", "' rain'"],
}
"""What the cells of each print."""
SMALL = 200_000
"""Bytes of a notebook with its outputs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them run: the store and the SAE of one are opened by the other."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels find the package, take one thread and draw no bars."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("STEERSMAN_PROGRESS", "0")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, folder: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    printed = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )
    for wanted in SAYS[path.stem]:
        assert wanted in printed


def test_every_notebook_is_held_and_small() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SAYS)
    for path in NOTEBOOKS:
        nbformat.validate(nbformat.read(path, as_version=4))
        assert path.stat().st_size < SMALL
