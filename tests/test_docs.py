"""The documentation's files and commands, run as a reader would run them."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|bash)(?: title=\"([\w./-]+)\")?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "steersman": [sys.executable, "-m", "steersman"],
}


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, file name or "", text) of each block of a page, in order."""
    return [(m[1], m[2] or "", m[3]) for m in BLOCK.finditer((ROOT / "docs" / page).read_text())]


def run_line(line: str, folder: Path) -> str:
    """What one command of a page prints; fails with what it printed otherwise."""
    words = shlex.split(line, comments=True)
    command = PROGRAMS.get(words[0], [words[0]]) + words[1:]
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "STEERSMAN_PROGRESS": "0"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def printed_by(page: str, folder: Path) -> str:
    """What the Python of a page of docs/ prints, run from top to bottom as one program."""
    program = "\n".join(text for language, _, text in blocks(page) if language == "python")
    (folder / "page.py").write_text(program)
    return run_line("python page.py", folder)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder that a reader of the page on extending has at its end, and what each command printed."""
    folder = tmp_path_factory.mktemp("extending")
    printed: dict[str, str] = {}
    for language, name, text in blocks("extending.md"):
        if language == "python":
            assert name, "a file of this page has a name"
            (folder / name).write_text(text)
        else:
            for line in filter(None, text.splitlines()):
                printed[line.partition("#")[0].strip()] = run_line(line, folder)
    return folder, printed


def test_the_page_on_operators_runs_from_top_to_bottom(tmp_path: Path) -> None:
    printed = printed_by("operators.md", tmp_path)
    assert "F1 1.00" in printed
    assert "\n[7, 0]\n" in printed, "the condition steers the row that meets it and no other"


def test_the_page_of_public_names_is_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "scripts" / "dev" / "api_page.py"))["main"]()
    assert capsys.readouterr().out == (ROOT / "docs" / "api.md").read_text(), (
        "python scripts/dev/api_page.py > docs/api.md"
    )


def test_every_file_is_run_or_used(walked: tuple[Path, dict[str, str]]) -> None:
    folder, printed = walked
    named = {name for _, name, _ in blocks("extending.md") if name}
    sources = "".join((folder / name).read_text() for name in named)
    imported = {f"{module}.py" for module in re.findall(r"^(?:import|from) (\w+)", sources, flags=re.MULTILINE)}
    unused = {name for name in named if name not in imported and not any(name in line for line in printed)}
    assert not unused


def test_an_architecture_from_outside_trains_alike_on_one_process_and_two(walked: tuple[Path, dict[str, str]]) -> None:
    folder, printed = walked
    alone, together = printed["python train_p_annealed.py"], (folder / "runs" / "p_annealed")
    lines = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
    assert all({"fvu", "l0", "sparsity"} <= set(line) for line in lines)
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    fvu = float(re.search(r"FVU ([\d.]+)", alone)[1])  # pyright: ignore[reportOptionalSubscript]
    heldout = json.loads((together / "cfg.json").read_text())["metadata"]["steersman"]["heldout"]
    assert heldout["fvu"] == pytest.approx(fvu, abs=2e-3)


def test_what_the_pages_programs_print(walked: tuple[Path, dict[str, str]]) -> None:
    _, printed = walked
    assert "tokens looked elsewhere" in printed["python use_highlight.py"]
    assert "converged" in printed["python use_sharpen.py"]
    assert "diagonal_lda" in printed["python use_diagonal_lda.py"]
    assert "'nearest': 0.99979, 'omp': 1.0" in printed["python use_nearest.py"]
    assert printed["python use_lab_format.py"].split() == ["topk", "lab", "lab"]


def test_the_page_of_feature_scores_runs_from_top_to_bottom(tmp_path: Path) -> None:
    printed = printed_by("feature_scores.md", tmp_path)
    assert "correlation (Pearson r with the reward" in printed
    assert " *" in printed
    assert "annotation" in printed


def test_the_page_of_methods_is_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "scripts" / "dev" / "methods_page.py"))["main"]()
    assert capsys.readouterr().out == (ROOT / "docs" / "methods.md").read_text(), (
        "python scripts/dev/methods_page.py > docs/methods.md"
    )


def test_the_page_of_recipes_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for language, name, text in re.findall(r"^```(\w+) title=\"([\w.]+)\"\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        assert language in ("python", "yaml")
        (tmp_path / name).write_text(text)
    printed = printed_by("recipes.md", tmp_path)
    assert "tokens steered at most" in printed
    assert "chance" in printed


def test_the_page_of_particles_runs_from_top_to_bottom(tmp_path: Path) -> None:
    printed = printed_by("particles.md", tmp_path)
    assert re.search(r"^ there was a [a-z]+ girl named .* (wolf|bear|horse)", printed)
    few, plain = map(float, re.findall(r"mean reward: particles ([\d.]+), the model ([\d.]+)", printed)[0])
    assert few > plain + 0.3


def test_the_page_of_trained_edits_runs_from_top_to_bottom(tmp_path: Path) -> None:
    printed = printed_by("trained_edits.md", tmp_path)
    assert "AUROC" in printed
    assert "converged" in printed


def test_the_page_of_decoding_runs_from_top_to_bottom(tmp_path: Path) -> None:
    printed = printed_by("decoding.md", tmp_path)
    assert "tokens looked elsewhere" in printed
    assert "matched=True" in printed
    assert "scarlet dog and strolled closer. The dog rolled over" in printed
    assert "strengths [0.0, 2.0, 0.0, 0.0" in printed


def test_the_page_of_chat_runs_from_top_to_bottom(tmp_path: Path) -> None:
    printed = printed_by("chat.md", tmp_path)
    assert "tokens of the last question" in printed
    steered = dict(re.findall(r"^(\S+): (\d+) tokens steered$", printed, re.MULTILINE))
    assert set(steered) == {"assistant", "last_user", "turn:0+turn:1"}
    assert all(int(n) > 0 for n in steered.values())


def test_the_flags_that_the_page_of_chat_shows_are_there() -> None:
    for language, _, text in blocks("chat.md"):
        for line in text.splitlines() if language == "bash" else ():
            words = shlex.split(line)[1:]
            command = " ".join(words[: 2 if words[0] == "vector" else 1])
            known = run_line(f"steersman {command} --help", ROOT)
            for flag in (word for word in words if word.startswith("--")):
                assert flag in known, (command, flag)
