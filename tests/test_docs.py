"""The documentation, as a reader meets it: every page's Python and commands run, from top to bottom, by being there.

`support/pages.py` says how a page is run, and how it says that a block cannot be.
"""

import dataclasses
import importlib
import json
import os
import re
import runpy
import shutil
from collections.abc import Callable, Iterator

import pytest
from support.pages import ARITHMETIC, ROOT, Block, Pages, Ran, arithmetic, pages, printed_somewhere

from steersman.cli import COMMANDS
from steersman.errors import SteersmanError
from steersman.flags import config_type, parse
from study.__main__ import PARTS

PAGES = {page.name: page for page in pages()}
RUN = [name for name, page in PAGES.items() if page.runs]
NOT_RUN = [name for name, page in PAGES.items() if any(block.not_run for block in page.blocks)]

SAYS = {
    "README.md": ["^Once upon a time"],
    "docs/chat.md": ["tokens of the last question", r"^turn:0\+turn:1: [1-9]\d* tokens steered$"],
    "docs/decoding.md": [
        "tokens looked elsewhere",
        "matched=True",
        r"scarlet dog and strolled closer\. The dog rolled over",
        r"strengths \[0\.0, 2\.0, 0\.0, 0\.0",
    ],
    "docs/extending.md": [
        "tokens looked elsewhere",
        "converged",
        "diagonal_lda",
        r"'nearest': 0\.99979, 'omp': 1\.0",
        r"^topk lab lab$",
    ],
    "docs/feature_scores.md": [r"correlation \(Pearson r with the reward", r" \*", "annotation"],
    "docs/labels.md": ["1 feature: 3 requests", "words for weather"],
    "docs/operators.md": [r"F1 1\.00", r"^\[7, 0\]$"],
    "docs/particles.md": [r"^ there was a [a-z]+ girl named .* (wolf|bear|horse)"],
    "docs/recipes.md": ["tokens steered at most", "chance"],
    "docs/trained_edits.md": ["AUROC", "converged"],
}
"""Patterns of what a page prints, beside what it shows itself."""
QUICKSTART = "steersman quickstart --tokens 60000 --d-sae 128 --targets 1 --samples 2 --effect-vectors 96"
"""With little work: what pages start from needs to be there, not to be good."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Ran]]:
    """Runs a page once, and gives what came of it."""
    runner = Pages(os.environ)
    done: dict[str, Ran] = {}

    def run(name: str) -> Ran:
        if name not in done:
            folder = tmp_path_factory.mktemp("page")
            if name == "quickstart":
                done[name] = runner.run(name, [Block("bash", QUICKSTART, 0)], folder)
                return done[name]
            page = PAGES[name]
            if page.starts_from:
                begun = f"docs/{page.starts_from}.md"
                shutil.copytree(run(begun if begun in PAGES else page.starts_from).folder, folder, dirs_exist_ok=True)
            done[name] = runner.run(name, page.steps, folder)
        return done[name]

    yield run
    runner.close()


@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_from_top_to_bottom(name: str, ran: Callable[[str], Ran]) -> None:
    printed = ran(name).printed
    for pattern in SAYS.get(name, ()):
        assert re.search(pattern, printed, flags=re.MULTILINE), (pattern, printed)
    for block in PAGES[name].shown:
        there = printed_somewhere(block.text, printed, exact=arithmetic() == ARITHMETIC)
        assert there, (block.line, block.text, printed)


def test_what_pages_are_said_to_print_is_of_pages_that_run() -> None:
    assert set(SAYS) <= set(RUN)


def test_what_a_page_shows_is_held_to_what_is_printed() -> None:
    shown = "explained variance 0.82\nran to the ... pies\n"
    assert printed_somewhere(shown, "explained  variance 0.82\nran to the grove. pies", exact=True)
    assert not printed_somewhere(shown, "explained variance 0.83\nran to the grove. pies", exact=True)
    assert printed_somewhere(shown, "explained variance 0.83\nran to the bakery", exact=False)
    assert not printed_somewhere(shown, "variance 0.82\nran to the bakery", exact=False)


@pytest.mark.parametrize("name", NOT_RUN)
def test_what_does_not_run_could(name: str) -> None:
    for block in PAGES[name].blocks:
        if block.not_run and block.language == "python":
            compile(block.text, f"{name}:{block.line}", "exec")
        for words in block.commands if block.not_run and block.language == "bash" else ():
            check_command(words)


def check_command(words: list[str]) -> None:
    """Whether there are such a command and such flags, whatever files and models they name."""
    for launcher in ("-m", "pytest", "sbatch", "python"):
        if launcher in words:
            words = words[words.index(launcher) + 1 :]
    program, *arguments = words
    script = ROOT / program
    if program == "steersman":
        name = " ".join(arguments[: 2 if " ".join(arguments[:2]) in COMMANDS else 1])
        assert name in COMMANDS, " ".join(words)
        parse(config_type(COMMANDS[name].load()), arguments[len(name.split()) :], f"steersman {name}")
    elif program == "scripts/study":
        assert arguments[0] in PARTS, " ".join(words)
        check_part(*arguments)
    elif "/" in program:
        assert script.is_file(), program
        flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
        if script.suffix == ".py":
            unknown = [flag for flag in flags if flag[2:].replace("-", "_") not in script.read_text()]
            assert not unknown, " ".join(unknown)


def check_part(part: str, *arguments: str) -> None:
    """Whether a part of the study has such settings."""
    names = {field.name for field in dataclasses.fields(importlib.import_module(f"study.{part}").Config)}
    flags = {word.split("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")}
    unknown = {flag for flag in flags if flag not in names and flag.removeprefix("no_") not in names}
    assert not unknown, f"{part}: {', '.join(sorted(unknown))}"


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("python scripts/study none", "none"),
        ("python scripts/study pages --small", "pages: small"),
        ("steersman cache --model M --text T --out O --no-such-flag 3", "no flag --no-such-flag"),
        ("torchrun --nproc-per-node 8 -m steersman train --store S --out O --d-sae many", "many"),
        ("steersman vector mend", "vector mend"),
        ("python scripts/bench/none.py", "none.py"),
        ("scripts/dev/site.py --no-such-flag", "--no-such-flag"),
    ],
)
def test_a_command_that_could_not_run_is_found(line: str, wrong: str) -> None:
    with pytest.raises((SteersmanError, AssertionError), match=wrong):
        check_command(line.split())


def test_an_architecture_from_outside_trains_alike_on_one_process_and_two(ran: Callable[[str], Ran]) -> None:
    folder, _, printed = ran("docs/extending.md")
    together = folder / "runs" / "p_annealed"
    lines = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
    assert all({"fvu", "l0", "sparsity"} <= set(line) for line in lines)
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    fvu = float(re.search(r"FVU ([\d.]+)", printed["python train_p_annealed.py"])[1])  # pyright: ignore[reportOptionalSubscript]
    heldout = json.loads((together / "cfg.json").read_text())["metadata"]["steersman"]["heldout"]
    assert heldout["fvu"] == pytest.approx(fvu, abs=2e-3)


def test_particles_are_better_rewarded_than_the_model(ran: Callable[[str], Ran]) -> None:
    pattern = r"mean reward: particles ([\d.]+), the model ([\d.]+)"
    few, plain = map(float, re.findall(pattern, ran("docs/particles.md").printed)[0])
    assert few > plain + 0.3


def test_every_file_of_the_page_on_extending_runs_or_is_used(ran: Callable[[str], Ran]) -> None:
    _, _, printed = ran("docs/extending.md")
    titled = {block.title: block for block in PAGES["docs/extending.md"].blocks if block.title}
    sources = "".join(block.text for block in titled.values())
    imported = {f"{module}.py" for module in re.findall(r"^(?:import|from) (\w+)", sources, flags=re.MULTILINE)}
    assert not {name for name in titled if name not in imported and not any(name in line for line in printed)}


@pytest.mark.parametrize(("script", "page"), [("api_page.py", "docs/api.md"), ("methods_page.py", "docs/methods.md")])
def test_a_written_page_is_what_its_script_prints(script: str, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "scripts" / "dev" / script))["main"]()
    assert capsys.readouterr().out == (ROOT / page).read_text(), f"python scripts/dev/{script} > {page}"


def test_files_that_pages_name_are_there() -> None:
    """In backticks, with a folder: of the repository, or of what a page itself writes."""
    for page in PAGES.values():
        names = set(
            re.findall(
                r"`((?:scripts|steersman|train|steer|sae|kernels|tests|docs)/[\w./-]+\.(?:py|sh|md))`", page.text
            )
        )
        missing = {name for name in names if not (ROOT / name).is_file()}
        assert not missing, page.name
