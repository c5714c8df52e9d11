"""Runs pages that `pages.py` sends, one JSON line each: a process that has loaded the libraries, copied for every page.

A copy has the state of a fresh process (registries, random numbers, modules, folder) without the seconds of its
imports. The libraries are loaded, and nothing is computed, before the first copy: no thread is lost in it.
"""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from support.pages import LIMIT, ROOT, Block

PRELOAD = ("datasets", "matplotlib.pyplot", "transformers.models.llama", "steersman.steer", "steersman.train", "tyro")


def run_page(folder: Path, steps: list[Block], report: Path) -> None:
    """Run the steps in `folder`; the result goes to `report`."""
    os.chdir(folder)
    sys.path[:] = [str(folder), *(place for place in sys.path if place != str(ROOT / "tests"))]
    result: dict[str, Any] = {"failed": None, "commands": {}}
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for step in steps:
            result["failed"] = step.line
            if step.title:
                Path(step.title).parent.mkdir(parents=True, exist_ok=True)
                Path(step.title).write_text(step.text)
                if step.language == "python" and not is_named(step, steps):
                    run_command(["python", step.title])
            elif step.language == "python":
                exec(compile("\n" * (step.line - 1) + step.text, "page", "exec"), names)
            else:
                for words in step.commands:
                    sys.stdout.flush()
                    begin = os.fstat(1).st_size
                    run_command(words)
                    sys.stdout.flush()
                    result["commands"][" ".join(words)] = os.pread(1, os.fstat(1).st_size - begin, begin).decode()
        result["failed"] = None
    except BaseException:  # SystemExit of a command as well
        traceback.print_exc()
    report.write_text(json.dumps(result))


def is_named(step: Block, steps: list[Block]) -> bool:
    """Whether a command of the page, or another file or program of it, names the file."""
    stem = re.escape(Path(step.title).stem)
    imports = re.compile(rf"^\s*(?:import|from) {stem}\b", flags=re.MULTILINE)
    texts = [other.text for other in steps if other is not step and other.language == "python"]
    return any(map(imports.search, texts)) or any(
        step.title in words for other in steps if other.language == "bash" for words in other.commands
    )


def run_command(words: list[str]) -> None:
    import torch

    from steersman.cli import main

    program, *arguments = words
    if program == "steersman":
        try:
            main(arguments)
        except SystemExit as stop:
            if stop.code:
                raise
    elif program == "python" and arguments[0].endswith(".py"):
        torch.manual_seed(torch.default_generator.initial_seed())
        before, sys.argv = sys.argv, arguments
        runpy.run_path(arguments[0], run_name="__main__")
        sys.argv = before
    else:
        sys.stdout.flush()
        if program == "torchrun":
            words = [sys.executable, "-m", "torch.distributed.run", *arguments]
        env = {**os.environ, "PYTHONPATH": f"{os.getcwd()}{os.pathsep}{ROOT}"}
        subprocess.run(words, env=env, check=True)


def main() -> None:
    for name in PRELOAD:
        __import__(name)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        report, log = folder.with_suffix(".json"), folder.with_suffix(".txt")
        child = os.fork()
        if child == 0:
            signal.alarm(int(LIMIT) - 5)
            with log.open("w+b") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            run_page(folder, [Block(**step) for step in job["steps"]], report)
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        result = json.loads(report.read_text()) if report.exists() else {"failed": "?, it ended early", "commands": {}}
        sys.stdout.write(json.dumps({**result, "printed": log.read_text(errors="replace")}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
