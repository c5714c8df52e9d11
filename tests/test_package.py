"""The layout: one import name, links to the top-level folders, a wheel that works elsewhere."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("sae", "kernels", "train", "steer")


def sources() -> list[Path]:
    folders = [ROOT / name for name in (*FOLDERS, "steersman", "tests", "scripts")]
    return sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")})


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def test_folders_are_imported_by_their_full_name() -> None:
    bare = {str(path): name for path in sources() for name in imported(path) if name.split(".")[0] in FOLDERS}
    assert not bare
    assert len(sources()) > 30


def test_links_are_relative_and_all_there() -> None:
    for name in FOLDERS:
        link = ROOT / "steersman" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_bundled_files_are_small() -> None:
    files = [p for p in (ROOT / "steersman" / "demo" / "steersman-demo").iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 3_000_000


def test_a_wheel_has_one_package_and_works_from_another_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"steersman"}
    for expected in ("kernels/reference.py", "sae/base.py", "train/store/store.py", "steer/steerer.py", "lm/model.py"):
        assert f"steersman/{expected}" in names
    assert "steersman/demo/steersman-demo/model.safetensors" in names
    assert "steersman/py.typed" in names
    program = (
        "import steersman, steersman.sae, torch\n"
        "from steersman import SAE, SAEConfig, LanguageModel, ActivationStore, Steerer, train_sae\n"
        "from steersman.demo import MODEL_PATH\n"
        "lm = LanguageModel.load(str(MODEL_PATH))\n"
        "print(steersman.__file__, lm.n_layers, SAE(SAEConfig(d_in=4, d_sae=8, k=2))(torch.zeros(3, 4)).shape)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "site"))
