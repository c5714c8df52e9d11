"""What a terminal is given of texts that others wrote."""

import pytest

from steersman.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Łódź, 東京, 👩‍🔬", "plain, Łódź, 東京, 👩‍🔬"),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("a\r\nb\tc", "a\\r↵b\\tc"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\x9b31m \ud83d", "\\x9b31m \\ud83d"),
        ("\U000e0041", "\\U000e0041"),
        ("", ""),
    ],
)
def test_what_could_move_the_terminal_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_lines_are_kept_where_asked() -> None:
    assert visible("a\n\x1bb", newline="\n") == "a\n\\x1bb"
