"""`steersman completion`."""

import argparse
from dataclasses import dataclass
from typing import Literal

import shtab
from tyro.conf import Positional

from steersman.cli import COMMANDS
from steersman.flag_help import Flag, flags_of
from steersman.flags import flag_of

_KINDS = {"TEXT", "N", "X", "None"}


@dataclass(frozen=True, kw_only=True)
class CompletionCommand:
    """Print the completion script of a shell: commands, flags, choices and file names at the press of Tab.

    bash: `steersman completion bash > ~/.local/share/bash-completion/completions/steersman`; zsh: into a file
    `_steersman` on the fpath; fish: `steersman completion fish > ~/.config/fish/completions/steersman.fish`.
    """

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """The shell."""


def run(config: CompletionCommand) -> None:
    """`steersman completion`."""
    print(shtab.complete(parser(), shell=config.shell))


def parser() -> argparse.ArgumentParser:
    """The commands and their flags as argparse has them, which is what completion scripts are made from."""
    top = argparse.ArgumentParser("steersman", add_help=False)
    top.add_argument("--version", action="store_true")
    groups = {"": top.add_subparsers()}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            what = f"commands of {group}s"
            groups[group] = groups[""].add_parser(group, help=what, add_help=False).add_subparsers()
        one = groups[group].add_parser(last, help=command.help, add_help=False)
        one.add_argument("--help", action="store_true")
        one.add_argument("--config").complete = shtab.FILE  # type: ignore[attr-defined]
        for flag in flags_of(command.function)[1]:
            _add(one, flag)
    return top


def _add(to: argparse.ArgumentParser, flag: Flag) -> None:
    if not flag.value:
        names = [flag_of(flag.field)]
        names += [f"--no-{names[0][2:]}"] if flag.default == "True" else []
        to.add_argument(*names, action="store_true", help=_line(flag))
        return
    choices = [] if flag.value in _KINDS else [value for value in flag.value.split("|") if value not in _KINDS]
    name = flag.field if flag.positional else flag_of(flag.field)
    added = to.add_argument(name, help=_line(flag), choices=choices if "|" in flag.value and choices else None)
    if "TEXT" in flag.value:
        added.complete = shtab.FILE  # type: ignore[attr-defined]


def _line(flag: Flag) -> str:
    """The first sentence of what a flag is, which a shell shows beside it."""
    return flag.doc.split(". ")[0].split(": ")[0].rstrip(".").replace("%", "%%")[:80]
