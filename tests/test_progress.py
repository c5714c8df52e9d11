"""Bars: alive on a terminal, a line now and then in a log, silent when asked."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = """
import time
import steersman.progress as p
p.TICK, p.LINE = 0.05, 0.2
bar = p.progress(desc="slow", total=2, unit="tok")
time.sleep(0.5)
bar.update(2)
bar.close()
for _ in p.progress(range(3), desc="short", total=3):
    pass
"""


def run(code: str, **environment: str) -> list[str]:
    """What a program without a terminal writes on standard error."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return done.stderr.splitlines()


def test_a_log_has_a_line_now_and_then_and_none_for_what_is_short() -> None:
    (line,) = run(SLOW)
    assert line.startswith("slow: 100% 2/2 [00:00<00:00")
    assert line.endswith("tok/s]")
    assert run(SLOW, STEERSMAN_PROGRESS="0") == []


def test_a_bar_on_a_terminal_moves_while_a_step_is_under_way() -> None:
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", SLOW], stdout=there, stderr=there, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        os.close(there)
        written = b""
        try:
            while chunk := os.read(here, 4096):
                written += chunk
        except OSError:  # how the end of a terminal reads
            pass
        assert process.wait() == 0
    os.close(here)
    before, _, _ = written.partition(b"2/2")
    assert before.count(b"0/2") > 3
    assert b"short: 100%" in written
