"""Pages of the documentation as programs: their blocks, and what running them from top to bottom prints.

A page is run as a reader would: in a folder of its own that holds nothing else, its Python and its commands in the
order in which they stand. Untitled Python blocks are one program; a block with a title is a file, which runs where a
command names it, or at once if no command and no other file of the page does. Two
comments, on lines of their own, say otherwise:

    <!-- not run: REASON -->         of the next block, whose Python is still compiled and whose flags are looked up
    <!-- starts from: tutorial -->   the folder holds what that page of docs/ leaves; `quickstart` is the command's

A block of text directly behind one that runs is in what the page prints, whitespace apart; `...` stands for anything.
Processors sum in different orders, and an SAE that is trained on another is another in its last digits, so this is
held where arithmetic is that of the processor on which the pages were written (`ARITHMETIC`). Elsewhere the lines are
held with their numbers and other words left open.
"""

import itertools
import json
import os
import re
import selectors
import shlex
import subprocess
import sys
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)(`{3,})([\w-]*)(.*)$")
NOT_RUN = re.compile(r"<!-- not run: (\S.*?) -->")
STARTS_FROM = re.compile(r"^<!-- starts from: (\w+) -->$", flags=re.MULTILINE)
ARITHMETIC = "0cf8b21e"
"""What `arithmetic` says where the outputs that pages show were made."""
LIMIT = 240.0
"""Seconds that one page may take."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    line: int
    """Of the page, the first of the text, from 1."""
    title: str = ""
    """The file that it is, or empty."""
    not_run: str = ""
    """Why it does not run, or empty."""

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@dataclass(frozen=True)
class Page:
    """A Markdown file, by its path from the root of the repository."""

    name: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.name).read_text()

    @cached_property
    def blocks(self) -> list[Block]:
        """Its blocks in order, those within lists as well."""
        lines = self.text.splitlines()
        found, i = [], 0
        while i < len(lines):
            if not (fence := FENCE.match(lines[i])):
                i += 1
                continue
            indent, ticks, language, attributes = fence.groups()
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == ticks)
            body = [line.removeprefix(indent) for line in lines[i + 1 : end]]
            title = re.search(r'title="([\w./-]+)"', attributes)
            reason = NOT_RUN.search(lines[i - 1]) if i else None
            found.append(
                Block(
                    language,
                    "\n".join(body) + "\n",
                    i + 2,
                    title[1] if title else "",
                    reason[1] if reason else "",
                )
            )
            i = end + 1
        return found

    @property
    def shown(self) -> list[Block]:
        """The blocks of text that show what the block above them printed."""
        lines = self.text.splitlines()
        return [
            block
            for above, block in itertools.pairwise(self.blocks)
            if block.language == "text" and above.language in ("python", "bash") and not above.not_run
            if not "".join(lines[above.line + above.text.count("\n") : block.line - 2]).strip()
        ]

    @property
    def starts_from(self) -> str:
        """The page whose folder this one begins with, `quickstart`, or nothing."""
        found = STARTS_FROM.search(self.text)
        return found[1] if found else ""

    @property
    def steps(self) -> list[Block]:
        """What a reader does: files to write, Python and commands to run."""
        return [b for b in self.blocks if not b.not_run and (b.title or b.language in ("python", "bash"))]

    @property
    def runs(self) -> bool:
        return any(block.language in ("python", "bash") for block in self.steps)


class Ran(NamedTuple):
    """A page that was run: its folder, what it printed, and what each command printed."""

    folder: Path
    printed: str
    commands: Mapping[str, str]


@cache
def arithmetic() -> str:
    """Eight digits that are the same on processors whose sums have the same bits, in what a small model computes."""
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(48, 160, generator=generator), torch.randn(520, 160, generator=generator)
    h = torch.nn.functional.layer_norm(x @ W.T, (520,))
    parts = [h, torch.softmax(h, dim=1), torch.nn.functional.silu(h), h.norm(dim=1), h.double() @ h.double().T, x.sum()]
    bits = zlib.crc32(b"".join(part.contiguous().numpy().tobytes() for part in parts))
    return f"{bits:08x}"


def printed_somewhere(text: str, printed: str, *, exact: bool) -> bool:
    """Whether `text` is in what was printed: word for word, or, where not `exact`, line by line by the words of letters
    alone with which each line begins."""
    if exact:
        parts = (r"\s+".join(map(re.escape, part.split())) for part in text.split("..."))
        return re.search(r"\s*.*?\s*".join(parts), printed, flags=re.DOTALL) is not None
    heads = [re.match(r"\s*((?:[A-Za-z]+\s+)*)", line) for line in text.splitlines()]
    words = [head[1].split()[:2] for head in heads if head]
    return all(re.search(r"\s+".join(some), printed) for some in words if some)


def pages() -> list[Page]:
    """The README, what contributors read and every page of docs/."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [Page(path.relative_to(ROOT).as_posix()) for path in files]


class Pages:
    """Runs pages, each in a fresh copy of a process that has loaded the libraries once."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.page_runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **environment,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                "OMP_NUM_THREADS": "1",
                "STEERSMAN_PROGRESS": "0",
            },
        )

    def run(self, name: str, steps: list[Block], folder: Path) -> Ran:
        """Run the steps of a page in `folder`. An AssertionError has the line and the output where one fails."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"folder": str(folder), "steps": [asdict(step) for step in steps]}) + "\n")
        self._process.stdin.flush()
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            assert ready.select(LIMIT), f"{name} runs for more than {LIMIT:.0f} s"
        result = json.loads(self._process.stdout.readline())
        assert result["failed"] is None, f"{name}, line {result['failed']}\n{result['printed']}"
        return Ran(folder, result["printed"], result["commands"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
