"""The house: which part may import which, read from the source, imports inside functions included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = ["ground", "kernels", "lm", "sae", "train", "steer", "ui", "serve", "demo", "commands"]
MAY_IMPORT = {
    "ground": {"ground"},
    "kernels": {"kernels", "ground"},
    "lm": {"lm", "ground"},
    "sae": {"sae", "kernels", "ground"},
    "train": {"train", "sae", "lm", "kernels", "ground"},
    "steer": {"steer", "sae", "lm", "kernels", "ground"},
    "ui": {"ui", "train", "steer", "sae", "lm", "kernels", "ground"},
    "demo": {"demo", "ui", "train", "steer", "sae", "lm", "kernels", "ground"},
    "commands": {"commands", "demo", "ui", "train", "steer", "sae", "lm", "kernels", "ground"},
}
"""Part -> what it may import. `ground` is the modules of `steersman/` itself, of which these may import all."""
TOP = ("steersman", "steersman.cli", "steersman.completion", "steersman.__main__")


def modules() -> dict[str, Path]:
    """Module name -> file, through the links in `steersman/`."""
    files = {}
    for entry in sorted((ROOT / "steersman").iterdir()):
        for path in [entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = path
    return files


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports: a submodule where it is one that is named."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: import by the full name"
            stem = node.module or ""
            for alias in node.names:
                target = f"{stem}.{alias.name}" if f"{stem}.{alias.name}" in known else stem
                # A package's face, which only hands names on, is no room of its own to the modules inside it.
                if target in known and target != name and not f"{package}.".startswith(f"{target}."):
                    yield target


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(name, path, known)) for name, path in known.items()}


def part(module: str) -> str:
    stem = module.split(".")[1] if module.count(".") else ""
    return stem if stem in FLOORS else "ground"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(v: str) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in sorted(graph[v]):
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            component = [stack.pop()]
            while component[-1] != v:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for v in sorted(graph):
        if v not in index:
            visit(v)
    return found


def test_the_graph_is_whole(graph: dict[str, set[str]], tmp_path: Path) -> None:
    """A walk that loses the linked folders, or imports inside functions, would let everything pass."""
    assert {part(name) for name in graph} >= set(MAY_IMPORT)
    hidden = tmp_path / "hidden.py"
    hidden.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from steersman.sae import base\n"
        "def late():\n    import steersman.train.store.store\n    from steersman.lm.model import LanguageModel\n"
    )
    found = set(imported("steersman.hidden", hidden, modules()))
    assert found == {"steersman.sae.base", "steersman.train.store.store", "steersman.lm.model"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_circle_of_modules(graph: dict[str, set[str]]) -> None:
    assert circles(graph) == []


def test_parts_import_only_what_stands_below_them(graph: dict[str, set[str]]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        if name not in TOP
        for target in targets
        if part(target) not in MAY_IMPORT[part(name)] or target in TOP
    ]
    assert wrong == []


def test_train_and_steer_know_nothing_of_each_other(graph: dict[str, set[str]]) -> None:
    for name, targets in graph.items():
        forbidden = {"train": "steer", "steer": "train"}.get(part(name))
        assert not {target for target in targets if part(target) == forbidden}, name


def test_no_module_goes_through_the_face_of_its_own_part() -> None:
    """`from steersman.sae import SAE` inside `sae/` works or fails by who was imported first."""
    faces = {f"steersman.{floor}" for floor in MAY_IMPORT if floor != "demo"}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in faces:
                inside = f"{name}.".startswith(f"{node.module}.")
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                assert not inside or named <= set(modules()), f"{name} imports from {node.module}"


def test_tests_share_through_support_and_never_import_one_another() -> None:
    """What two test modules need is in `tests/support` or `tests/conftest.py`, where moving a test breaks no other."""
    files = sorted(path for path in (ROOT / "tests").rglob("*.py") if "data" not in path.parts)
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    assert len(tests) > 90
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {part for name in named for part in name.split(".")} & (tests | {"conftest"})
            assert not found, f"{path.name} imports {found}: move what they share to tests/support"
