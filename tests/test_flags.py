"""Flags: numbers as people write them, help that loads nothing, mistakes in the words of the shell."""

import dataclasses
import logging
import subprocess
import sys
from dataclasses import dataclass

import pytest

from steersman.cli import COMMANDS, run
from steersman.config import default_of, whole_number
from steersman.errors import SteersmanError
from steersman.flag_help import flags_of
from steersman.flags import ShellFormatter, config_type, parse


@dataclass(frozen=True, kw_only=True)
class Config:
    tokens: int | None = None
    seed: int = 0
    ids: tuple[int, ...] = ()
    sizes: tuple[int, int] = (1, 2)
    batch_size: int = 4
    keep_bos: bool = False

    def __post_init__(self) -> None:
        if self.batch_size > 100:
            raise SteersmanError(f"batch_size = {self.batch_size} needs keep_bos=True; tokens={self.tokens}")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1000", 1000),
        ("1_000_000", 1_000_000),
        ("1e6", 1_000_000),
        ("2.5e3", 2500),
        ("20k", 20_000),
        ("10M", 10_000_000),
        ("1.5B", 1_500_000_000),
        ("0.5k", 500),
        ("-1", -1),
        ("+3", 3),
        ("2.0", 2),
    ],
)
def test_whole_numbers(text: str, number: int) -> None:
    assert whole_number(text) == number
    assert parse(Config, ["--tokens", text, "--seed", text, "--ids", text, "--ids", "7"], "x") == Config(
        tokens=number, seed=number, ids=(number, 7)
    )


@pytest.mark.parametrize(
    "text",
    ["", "1.5", "1e-3", "1.0001k", "10 M", "10m", "M", "0x10", "1__0", "nan", "inf", "٣", "9" * 5000, "1e999999999"],
)
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        whole_number(text)
    with pytest.raises(SteersmanError, match="--tokens"):
        parse(Config, ["--tokens", text], "x")


def test_mistakes_are_told_in_flags() -> None:
    with pytest.raises(SteersmanError, match="^--batch-size 200 needs --keep-bos; --tokens 5$"):
        parse(Config, ["--batch-size", "200", "--tokens", "5"], "x")


def test_what_is_logged_is_told_in_flags_and_moves_no_terminal() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "keep_bos=False leaves %s out", ("\x1b[2J",), None)
    assert ShellFormatter(Config).format(record) == "--no-keep-bos leaves \\x1b[2J out"


def test_an_old_flag_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from steersman.deprecation import renamed_fields

    @renamed_fields(count="tokens")
    @dataclass(frozen=True, kw_only=True)
    class Renamed:
        tokens: int = 1

    with caplog.at_level(logging.WARNING):
        assert parse(Renamed, ["--count", "2k"], "x").tokens == 2000
    assert caplog.messages == ["--count is called --tokens now; the old name goes with the next release"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_dataclass_says(name: str) -> None:
    kind = config_type(COMMANDS[name].load())
    _, flags = flags_of(COMMANDS[name].function)
    shown = {flag.field: flag for flag in flags}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    assert fields.keys() - shown.keys() <= {"options"}  # a mapping, which only YAML can give
    assert shown.keys() <= fields.keys()
    for field, flag in shown.items():
        assert flag.doc, f"--{field} has no line of help"
        default = default_of(fields[field])
        if default is dataclasses.MISSING:
            assert flag.default is None, field
        else:
            written = " ".join(map(str, default)) if isinstance(default, tuple) and default else str(default)
            assert flag.default == written, field
        assert (flag.part == "How it runs; changes none of what is computed") == (
            not fields[field].metadata.get("identity", True)
        ), field
        assert flag.repeatable == ("...]" in str(fields[field].type)), field


def test_help_of_every_command_loads_no_heavy_library() -> None:
    program = (
        "import sys; from steersman.cli import COMMANDS, run\n"
        "run(['--help'])\n"
        "for name in COMMANDS:\n"
        "    try: run([*name.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'tyro', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("usage: steersman") == 1 + len(COMMANDS)


def test_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())  # lines are as long as the terminal is wide
    titles = ["Needed:", "How to train an SAE:", "How it runs; changes none of what is computed:"]
    assert sorted(titles, key=printed.index) == titles
    assert "(default 0.25)" in printed
    assert "(default float32)" in printed
