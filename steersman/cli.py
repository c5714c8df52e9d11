"""The `steersman` command: one subcommand for each step, each read from the dataclass of its Python function.

A field `batch_size` of a dataclass is the flag `--batch-size` and the YAML key `batch_size` (`--config settings.yaml`;
flags win over the file). A mistake is one line on standard error and exit code 2; work that was cut short by something
else, and that the same command resumes, is one line and exit code 75, on which a scheduler can queue it again.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

from steersman.allocator import keep_freed_memory
from steersman.errors import LostRankError, SteersmanError, UnfinishedError, near_names
from steersman.files import check_place
from steersman.flag_help import help_text
from steersman.flags import ShellFormatter, config_type, in_words_of_the_shell, parse
from steersman.threads import share_the_machine
from steersman.visible import visible

MISTAKE, INTERRUPTED, UNFINISHED = 2, 130, 75


class Command(NamedTuple):
    """One subcommand: its function, found when it is called, and a line of help.

    The function takes one argument, annotated with the dataclass of the command's flags.
    """

    function: str
    """`module:function`."""
    help: str
    resumes: bool = False
    """Whether the same command, run again, goes on where an interrupted one stopped."""
    writes: Mapping[str, Literal["file", "folder"]] = {}
    """The settings that name what it writes; the places are tried before the work."""

    def load(self) -> Callable[[Any], None]:
        module, name = self.function.split(":")
        return getattr(import_module(module), name)


FOLDER: Mapping[str, Literal["file", "folder"]] = {"out": "folder"}
FILE: Mapping[str, Literal["file", "folder"]] = {"out": "file"}

COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "steersman.commands.quickstart:run", "see everything at once on the bundled model", resumes=True, writes=FOLDER
    ),
    "cache": Command(
        "steersman.commands.cache:run", "run a model over text and store its activations", resumes=True, writes=FOLDER
    ),
    "train": Command(
        "steersman.commands.train:run", "train an SAE on a store, or straight from a model", resumes=True, writes=FOLDER
    ),
    "sweep": Command(
        "steersman.commands.sweep:run", "train many SAEs from one reading of a store", resumes=True, writes=FOLDER
    ),
    "eval": Command(
        "steersman.commands.eval:run",
        "measure an SAE: reconstruction, features, effect on the model",
        resumes=True,
        writes={"out": "file", "baselines": "folder"},
    ),
    "crosscoder": Command(
        "steersman.commands.crosscoder:run", "see what a crosscoder's hook points or models share", writes=FILE
    ),
    "features": Command(
        "steersman.commands.features:run",
        "see what each feature fires on and writes; or a site of them",
        writes={"out": "file", "html": "folder"},
    ),
    "activations": Command("steersman.commands.activations:run", "see which features fire on a text"),
    "find": Command("steersman.commands.find:run", "find features by words, by texts or by a direction"),
    "probe": Command("steersman.commands.probe:run", "see what few features tell about labelled texts", writes=FILE),
    "neighbours": Command("steersman.commands.neighbours:run", "see the features nearest others"),
    "compare": Command(
        "steersman.commands.compare:run", "see which features of several SAEs are the same", writes=FILE
    ),
    "label": Command(
        "steersman.commands.label:run",
        "label features: by their tokens, by a language model, from Neuronpedia",
        resumes=True,
        writes={"out": "file"},
    ),
    "scores": Command("steersman.commands.scores:run", "score features, and select those to steer by", writes=FOLDER),
    "plan": Command("steersman.commands.plan:run", "memory, network and time that a training run needs"),
    "steer": Command("steersman.commands.steer:run", "generate text with features turned up or down", writes=FILE),
    "ui": Command("steersman.commands.ui:run", "serve a page to steer and look at a model: the playground"),
    "methods": Command(
        "steersman.commands.methods:run", "list methods, scores and published systems, with their sources"
    ),
    "inspect": Command("steersman.commands.inspect:run", "see what a model, store, run, SAE, vector or map holds"),
    "convert": Command(
        "steersman.commands.convert:run", "write an SAE in another library's format", writes={"target": "folder"}
    ),
    "vector make": Command(
        "steersman.commands.vector_make:run", "a steering vector from examples or a feature", writes=FILE
    ),
    "vector show": Command("steersman.commands.vector_show:run", "what is known of vectors, and their cosines"),
    "vector calibrate": Command(
        "steersman.commands.vector_calibrate:run", "scale a vector to what it may cost", writes=FILE
    ),
    "vector sweep": Command(
        "steersman.commands.vector_sweep:run",
        "find the layer at which a method steers best, at equal KL",
        resumes=True,
        writes={"out": "file", "vector": "file"},
    ),
    "vector convert": Command("steersman.commands.vector_convert:run", "between safetensors and GGUF", writes=FILE),
    "bake": Command("steersman.commands.bake:run", "write an edit into a copy of the model's weights", writes=FOLDER),
    "evaluate": Command("steersman.commands.evaluate:run", "measure a vector against its baselines", writes=FOLDER),
    "effects": Command(
        "steersman.commands.effects:run", "measure what steering vectors do to features", resumes=True, writes=FOLDER
    ),
    "target": Command(
        "steersman.commands.target:run", "make the vector that raises chosen features (SAE-TS)", writes=FILE
    ),
    "decompose": Command(
        "steersman.commands.decompose:run",
        "take vectors apart into signed features",
        writes={"out": "file", "plot": "file"},
    ),
    "completion": Command("steersman.completion:run", "print the completion script of a shell"),
}
"""Subcommands, of one word or two."""


def usage(group: str = "") -> str:
    """The help of the command as a whole, or of a group such as `vector`."""
    shown = {name: command.help for name, command in COMMANDS.items() if not group or name.startswith(f"{group} ")}
    width = max(map(len, shown))
    lines = [f"  {name:<{width}}  {what}" for name, what in shown.items()]
    head = "usage: steersman COMMAND [--config FILE.yaml] [FLAGS]\n\ncommands:\n"
    return head + "\n".join(lines) + "\n\n`steersman COMMAND --help` lists a command's flags."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    share_the_machine()
    keep_freed_memory()
    try:
        run(list(sys.argv[1:] if argv is None else argv))
    except UnfinishedError as error:
        print("steersman: " + visible(" ".join(str(error).split())), file=sys.stderr, flush=True)
        if isinstance(error, LostRankError):
            os._exit(UNFINISHED)  # a broken connection may keep the interpreter from ending
        sys.exit(UNFINISHED)
    except SteersmanError as error:
        print("steersman: " + visible(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(MISTAKE)
    except BrokenPipeError:  # `steersman features | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:
        print(f"steersman: {str(stop) or _interrupted(sys.argv[1:] if argv is None else argv)}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _interrupted(argv: Sequence[str]) -> str:
    """What is said of a command that Ctrl-C ended and that has nothing to say itself."""
    names = [name for name in (" ".join(argv[:1]), " ".join(argv[:2])) if name in COMMANDS]
    resumes = bool(names) and COMMANDS[names[-1]].resumes
    return "interrupted" + ("; the same command resumes where it stopped" if resumes else "")


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
    if "--help" in rest or "-h" in rest:
        print(help_text(COMMANDS[name].function, f"steersman {name}"))
        sys.exit(0)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("steersman").setLevel(logging.INFO)
    with _ending_at_once(name):
        function = COMMANDS[name].load()
        config = parse(config_type(function), rest, f"steersman {name}")
        quiet_transformers()
        for handler in logging.getLogger().handlers:
            handler.setFormatter(ShellFormatter(type(config)))
    with in_words_of_the_shell(type(config)):
        _check_places(COMMANDS[name], config)
        function(config)


def _check_places(command: Command, config: Any) -> None:
    """Refuse what cannot be written to before anything is loaded."""
    from steersman.parallel import rank_and_world_size  # here, as it loads PyTorch

    rank, n_ranks = rank_and_world_size()
    for field, kind in command.writes.items():
        if rank == 0 and getattr(config, field) is not None:
            check_place(getattr(config, field), kind, keep=kind == "file" or n_ranks > 1)


@contextlib.contextmanager
def _ending_at_once(name: str) -> Iterator[None]:
    """Within the block Ctrl-C ends the process: libraries that are being loaded catch and bury the exception."""

    def end(*_: object) -> None:
        print(f"steersman: {_interrupted([name])}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
