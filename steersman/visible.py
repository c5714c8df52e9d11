"""Text of others on a terminal: what would move the cursor, colour the screen or turn a line around is written out."""

import re
import unicodedata

_KEPT = "\u200c\u200d"
"""Joiners, which scripts and emoji need and which show nothing of their own."""
_HIDDEN = re.compile(r"[^\x20-\x7e]")
_SHORT = {"\r": "\\r", "\t": "\\t"}


def visible(text: str, *, newline: str = "↵") -> str:
    """`text` on one line with its control characters, line ends and directions of writing written out.

    `newline` stands for a line end; give "\\n" to keep lines.

    >>> visible("one\\x1b[2J two\\nthree")
    'one\\\\x1b[2J two↵three'
    """
    return _HIDDEN.sub(lambda match: _shown(match[0], newline), text)


def _shown(character: str, newline: str) -> str:
    if character == "\n":
        return newline
    if character in _SHORT:
        return _SHORT[character]
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _KEPT
    if not hidden:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
