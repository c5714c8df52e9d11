"""Shell completion knows the commands, their flags and their choices."""

import shutil
import subprocess
from pathlib import Path

import pytest

from steersman.cli import COMMANDS, main, run

SHELLS = ["bash", "zsh", "fish"]


def printed(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    run(["completion", shell])
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_is_there(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(shell, capsys)
    for name in COMMANDS:
        assert all(word in script for word in name.split()), name
    assert "d-sae" in script
    assert "dictionary_learning" in script


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers after `words`, the last of which is being typed."""
    line = " ".join(f"'{word}'" for word in words)
    program = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_steersman; "
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    return set(subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_offers_commands_flags_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(printed("bash", capsys))
    assert {"train", "vector"} <= completed(script, "steersman", "")
    assert "calibrate" in completed(script, "steersman", "vector", "ca")
    assert {"--k", "--kernels"} <= completed(script, "steersman", "train", "--k")
    assert completed(script, "steersman", "train", "--kernels", "t") == {"triton", "torch"}


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["completion", "csh"])
    assert end.value.code == 2
    assert "csh" in capsys.readouterr().err
