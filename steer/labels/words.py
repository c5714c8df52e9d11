"""Tokens as the words of a label: each once, trimmed, on one line."""

from collections.abc import Iterable

from steersman.visible import visible

_LONGEST = 24
_PREFIX = 3
_REPLACED = "\ufffd"


def words_of(tokens: Iterable[str], n: int | None = None) -> list[str]:
    """The first n different words among `tokens`, in their order: without the space around them, upper and lower case
    taken for one, line ends and spaces that stand alone written out, parts of characters left out.

    >>> words_of([" sun", "Sun", "sunny ", "\\n", " ", "\\ufffd"])
    ['sun', 'sunny', '↵', '␣']
    """
    found: dict[str, str] = {}
    for token in tokens:
        if _REPLACED in token or not token:
            continue
        word = visible(" ".join(token.split()) or ("↵" if "\n" in token else "␣"))[:_LONGEST]
        found.setdefault(word.casefold(), word)
        if n is not None and len(found) >= n:
            break
    return list(found.values())


def alike(a: str, b: str) -> bool:
    """Whether two words are one, or one begins with the whole other, of at least three letters.

    >>> alike("sun", "Sunny"), alike("in", "inner"), alike("sunny", "sunk")
    (True, False, False)
    """
    short, long = sorted((a.casefold(), b.casefold()), key=len)
    return short == long or (len(short) >= _PREFIX and long.startswith(short))


def whole_word(before: str, token: str, after: str) -> str:
    """The word that `token` is a part of, between the texts around it; the token itself where it is no letters.

    >>> whole_word(" were en", "tang", "led in"), whole_word("a ", " sun", "ny"), whole_word("x", "(", "y")
    ('entangled', ' sunny', '(')
    """
    letters = token.strip()
    if not letters.isalpha():
        return token
    head = "" if token[0].isspace() else _letters(before[::-1])[::-1]
    tail = "" if token[-1].isspace() else _letters(after)
    return f"{head}{token}{tail}"


def _letters(text: str) -> str:
    end = next((i for i, character in enumerate(text) if not character.isalpha()), len(text))
    return text[:end]
