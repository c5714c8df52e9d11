"""What is public: the names in the `__all__` of the packages, used by somebody, and all that scripts and pages use."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACES = ("steersman", "steersman.lm", "steersman.kernels", "steersman.sae", "steersman.train", "steersman.steer")
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def users() -> Iterator[tuple[str, str]]:
    """(name, source) of what is held to the public names: scripts that people copy or run, pages, the README."""
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        if path.parent.name != "dev":  # tools for those who change the inside
            yield path.name, path.read_text()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for match in BLOCK.finditer(page.read_text()):
            yield page.name, match[1]


def imports(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each import from the package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "steersman":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "steersman")


def test_scripts_and_pages_use_public_names_alone() -> None:
    inner = set()
    for user, source in users():
        for module, name in imports(source):
            public = getattr(importlib.import_module(module), "__all__", ())
            if name and name not in public:
                inner.add(f"{user}: {module}.{name}")
    assert not inner


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_is_there_and_used(face: str) -> None:
    module = importlib.import_module(face)
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != "test_public.py"]
    pages = [path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    texts = [*tests, *pages, *(source for _, source in users())]
    words = set(re.findall(r"\w+", "\n".join(texts)))
    unused = [name for name in module.__all__ if getattr(module, name) is None or name not in words]
    assert not unused


def test_the_designs_lines_have_their_names() -> None:
    import steersman

    verbs = {"cache_activations", "train_sae", "train_many", "stream_activations", "evaluate_sae", "summarize_features"}
    verbs |= {"collect_effects", "decompose", "evaluate_steering"}
    kinds = {"LanguageModel", "SAE", "SAEConfig", "ActivationStore", "TrainConfig", "Steerer", "Edit", "SteeringVector"}
    assert verbs | kinds | {"EffectMap", "SteersmanError"} <= set(steersman.__all__)
    assert dir(steersman) == sorted(steersman.__all__)
