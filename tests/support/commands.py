"""Run a command line that is mistaken, and read the one line it prints."""

import pytest

from steersman.cli import main


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistaken command prints; it ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("steersman: ")]
    assert len(lines) == 1, lines
    return lines[0]
