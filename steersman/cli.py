"""The `steersman` command: one subcommand for each step, each read from the dataclass of its Python function.

A field `batch_size` of a dataclass is the flag `--batch-size` and the YAML key `batch_size` (`--config settings.yaml`;
flags win over the file). A mistake is one line on standard error and exit code 2; work that was cut short by something
else, and that the same command goes on with, is one line and exit code 75, on which a scheduler can queue it again.
"""

import contextlib
import dataclasses
import io
import logging
import os
import sys
import typing
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from steersman.allocator import keep_freed_memory
from steersman.errors import LostRankError, SteersmanError, UnfinishedError, near_names

MISTAKE, INTERRUPTED, UNFINISHED = 2, 130, 75

COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("steersman.demo.quickstart", "QuickstartConfig", "see everything at once on the bundled model"),
    "cache": ("steersman.commands.pipeline", "CacheConfig", "run a model over text and store its activations"),
    "train": ("steersman.commands.pipeline", "TrainCommand", "train an SAE on a store, or straight from a model"),
    "eval": ("steersman.commands.pipeline", "EvalCommand", "measure an SAE: reconstruction, effect on the model"),
    "features": ("steersman.commands.pipeline", "FeaturesCommand", "see what each feature fires on and writes"),
    "plan": ("steersman.commands.cluster", "PlanConfig", "memory, network and time that a training run needs"),
    "steer": ("steersman.commands.pipeline", "SteerConfig", "generate text with features turned up or down"),
    "inspect": ("steersman.commands.sae_files", "InspectCommand", "see what an SAE's files hold, in any format"),
    "convert": ("steersman.commands.sae_files", "ConvertCommand", "write an SAE in another library's format"),
    "vector make": ("steersman.commands.vectors", "VectorMakeCommand", "a steering vector from examples or a feature"),
    "vector show": ("steersman.commands.vectors", "VectorShowCommand", "what is known of vectors, and their cosines"),
    "vector calibrate": ("steersman.commands.vectors", "VectorCalibrateCommand", "scale a vector to what it may cost"),
    "vector convert": ("steersman.commands.vectors", "VectorConvertCommand", "between safetensors and GGUF"),
    "evaluate": ("steersman.commands.vectors", "EvaluateCommand", "measure a vector against its baselines"),
    "effects": ("steersman.commands.effects", "EffectsCommand", "measure what steering vectors do to features"),
    "target": ("steersman.commands.effects", "TargetCommand", "make the vector that raises chosen features (SAE-TS)"),
    "decompose": ("steersman.commands.decompose", "DecomposeCommand", "take vectors apart into signed features"),
}
"""Subcommand, of one word or two: the module, the dataclass of its flags and a line of help. The module's
`run_<subcommand>` (`run_vector_make`) runs it."""


def usage(group: str = "") -> str:
    """The help of the command as a whole, or of a group such as `vector`."""
    shown = {name: what for name, (_, _, what) in COMMANDS.items() if not group or name.startswith(f"{group} ")}
    width = max(map(len, shown))
    lines = [f"  {name:<{width}}  {what}" for name, what in shown.items()]
    head = "usage: steersman COMMAND [--config FILE.yaml] [FLAGS]\n\ncommands:\n"
    return head + "\n".join(lines) + "\n\n`steersman COMMAND --help` lists a command's flags."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    try:
        run(list(sys.argv[1:] if argv is None else argv))
    except UnfinishedError as error:
        print("steersman: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        if isinstance(error, LostRankError):
            os._exit(UNFINISHED)  # a broken connection may keep the interpreter from ending
        sys.exit(UNFINISHED)
    except SteersmanError as error:
        print("steersman: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(MISTAKE)
    except BrokenPipeError:  # `steersman features | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("steersman: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(argv: list[str]) -> None:
    """Run one command; raises `SteersmanError` on a mistake."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        from steersman import __version__

        print(f"steersman {__version__}")
        return
    name, rest = _command(argv)
    if name is None:
        print(usage(argv[0]))
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("steersman").setLevel(logging.INFO)
    module = import_module(COMMANDS[name][0])
    config = parse(getattr(module, COMMANDS[name][1]), rest, f"steersman {name}")
    quiet_transformers()
    getattr(module, f"run_{name.replace(' ', '_')}")(config)


def _command(argv: list[str]) -> tuple[str | None, list[str]]:
    """The subcommand and its flags; None where the help of a group is asked for."""
    first, *rest = argv
    members = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if members and (not rest or rest[0] in ("-h", "--help", "help")):
        return None, []
    if members:
        first, rest = f"{first} {rest[0]}", rest[1:]
    if first not in COMMANDS:
        raise SteersmanError(f"no command {first!r}; near it: {near_names(first, members or list(COMMANDS), 3)}")
    return first, rest


def quiet_transformers() -> None:
    """Leave standard error to this program's own bars and lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def parse(config_type: type[Any], args: list[str], program: str) -> Any:
    """An instance of the dataclass `config_type` from flags and, where `--config` names one, a YAML file.

    Raises a SteersmanError for an unknown flag or key, a missing or malformed value, and what the dataclass refuses.
    """
    import tyro

    args = _with_file(config_type, args)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                config_type, args=args, prog=program, return_unknown_args=True, config=(tyro.conf.UseAppendAction,)
            )
    except SystemExit as stop:
        if stop.code == MISTAKE:
            raise SteersmanError(_one_line(complaint.getvalue()) + f" (see {program} --help)") from None
        raise
    if unknown:
        flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config_type)]
        raise SteersmanError(f"{program} has no flag {unknown[0]}; near it: {near_names(unknown[0], flags, 3)}")
    return config


def _one_line(complaint: str) -> str:
    """The message inside tyro's box."""
    lines = [line.strip(" │|") for line in complaint.splitlines()]
    body = [line for line in lines[1:] if line and set(line) - set("-─╭╮╰╯")]
    ends = [i for i, line in enumerate(body) if line.startswith(("For full helptext", "Argument helptext"))]
    return " ".join(body[: ends[0]] if ends else body) or "these flags cannot be read"


def _with_file(config_type: type[Any], args: list[str]) -> list[str]:
    """Put the settings of the `--config` file in front of the flags, those that flags repeat left out."""
    for i, arg in enumerate(args):
        if arg == "--config" and i + 1 < len(args):
            path, rest = args[i + 1], args[:i] + args[i + 2 :]
            break
        if arg.startswith("--config="):
            path, rest = arg.removeprefix("--config="), args[:i] + args[i + 1 :]
            break
        if arg == "--config":
            raise SteersmanError("--config needs the name of a YAML file")
    else:
        return args
    given = {arg.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for arg in rest}
    return _flags(config_type, Path(path), given) + rest


def _flags(config_type: type[Any], path: Path, given: set[str]) -> list[str]:
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SteersmanError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SteersmanError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise SteersmanError(f"{path} must hold a mapping of settings, such as `d_sae: 4096`")
    hints = typing.get_type_hints(config_type)
    names = [field.name for field in dataclasses.fields(config_type)]
    flags: list[str] = []
    for key, value in settings.items():
        if key not in names:
            raise SteersmanError(f"{path}: unknown key {key!r}; near it: {near_names(str(key), names, 3)}")
        if key in given:
            continue
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, list | tuple):
            repeated = "..." in str(hints[key])
            flags += [part for item in value for part in (flag, str(item))] if repeated else [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    return flags
