"""Regular expressions as automata over the bytes of UTF-8, so that a token that ends inside a character is no problem.

Python's own parser reads the pattern; the tree becomes a nondeterministic automaton (Thompson 1968), and that one a
table by the subset construction. What a finite automaton cannot do (looking ahead or behind, references to groups) is
refused by name. The whole text has to match, as in `re.fullmatch`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from steersman.errors import SteersmanError

CodePoints = tuple[tuple[int, int], ...]
"""Ranges of code points, both ends included, in order and apart from one another."""

_STATES = 1 << 14
"""States of a table at most; a pattern that needs more is refused."""
_ALL: CodePoints = ((0, 0xD7FF), (0xE000, 0x10FFFF))
"""Every character: what UTF-8 can say."""


class Automaton:
    """A deterministic automaton over bytes: `table` [states, 256] int32 with -1 for no way on, `accepts` [states] bool.

    It starts in state 0, and from every state an accepting one can be reached. Raises SteersmanError for a pattern
    that is malformed, is no regular language, matches nothing, or needs too many states.

    >>> digits = Automaton(r"-?[0-9]+")
    >>> [digits.fullmatch(text) for text in ("-12", "12", "-", "1a")]
    [True, True, False, False]
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.table, self.accepts = _determinised(_Builder(pattern))

    def __len__(self) -> int:
        return len(self.table)

    def step(self, state: int, data: bytes) -> int:
        """The state after `data`, -1 when nothing that matches continues so."""
        for byte in data:
            if state < 0:
                break
            state = int(self.table[state, byte])
        return state

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches."""
        state = self.step(0, text.encode())
        return state >= 0 and bool(self.accepts[state])


class _Builder:
    """The nondeterministic automaton: `edges[s]` is {next state: bytes as the bits of an integer}, `free[s]` the
    states that cost nothing to come to."""

    def __init__(self, pattern: str) -> None:
        try:
            tree: Any = re._parser.parse(pattern)  # pyright: ignore[reportAttributeAccessIssue]
        except (re.error, RecursionError, OverflowError) as error:
            raise SteersmanError(f"{pattern!r} is no regular expression: {error}") from error
        self.pattern = pattern
        self.edges: list[dict[int, int]] = []
        self.free: list[list[int]] = []
        self.start = self.state()
        self.end = self._sequence(_without_anchors(list(tree)), self.start, tree.state.flags)

    def state(self) -> int:
        if len(self.edges) > 2 * _STATES:
            raise SteersmanError(f"{self.pattern[:60]!r} needs too many states: repeat less, or say (?a) for ASCII")
        self.edges.append({})
        self.free.append([])
        return len(self.edges) - 1

    def _sequence(self, items: Iterable[tuple[Any, Any]], at: int, flags: int) -> int:
        for op, argument in items:
            at = self._item(str(op), argument, at, flags)
        return at

    def _item(self, op: str, argument: Any, at: int, flags: int) -> int:
        """The state after what `op` says, from the state `at`."""
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._characters(_code_points(op, argument, flags), at)
        if op == "SUBPATTERN":
            _, add, without, inner = argument
            return self._sequence(inner, at, (flags | add) & ~without)
        if op == "BRANCH":
            end = self.state()
            for branch in argument[1]:
                begin = self.state()
                self.free[at].append(begin)
                self.free[self._sequence(branch, begin, flags)].append(end)
            return end
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(*argument, at=at, flags=flags)
        what = {"AT": "an anchor inside it", "GROUPREF": "a reference to a group", "ASSERT": "looking ahead or behind"}
        what |= {"ASSERT_NOT": what["ASSERT"], "ATOMIC_GROUP": "an atomic group"}
        raise SteersmanError(f"{self.pattern[:60]!r} has {what.get(op, op.lower())}, which no finite automaton can do")

    def _repeat(self, least: int, most: Any, inner: Any, *, at: int, flags: int) -> int:
        for _ in range(int(least)):
            at = self._sequence(inner, at, flags)
        end = self.state()
        if str(most) == "MAXREPEAT":
            loop = self.state()
            self.free[at].append(loop)
            self.free[self._sequence(inner, loop, flags)].append(loop)
            self.free[loop].append(end)
            return end
        for _ in range(int(most) - int(least)):
            self.free[at].append(end)
            at = self._sequence(inner, at, flags)
        self.free[at].append(end)
        return end

    def _characters(self, points: CodePoints, at: int) -> int:
        end = self.state()
        nodes: dict[int, int] = {_END: end}

        def place(node: int) -> int:
            if node not in nodes:
                nodes[node] = self.state()
                attach(node, nodes[node])
            return nodes[node]

        def attach(node: int, here: int) -> None:
            for following, bits in tree[node].items():
                self.edges[here][place(following)] = bits

        tree, root = _utf8_tree(points)
        begin = self.state()
        self.free[at].append(begin)
        attach(root, begin)
        return end


def _without_anchors(items: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """^ and $ at the ends say nothing where the whole text has to match anyway."""
    while items and str(items[0][0]) == "AT" and "BEGINNING" in str(items[0][1]):
        items = items[1:]
    while items and str(items[-1][0]) == "AT" and str(items[-1][1]) in ("AT_END", "AT_END_STRING"):
        items = items[:-1]
    return items


# Characters


def _code_points(op: str, argument: Any, flags: int) -> CodePoints:
    """The characters that one item of a pattern stands for."""
    if op == "ANY":
        return _ALL if flags & re.DOTALL else _complement(((10, 10),))
    entries = argument if op == "IN" else [("LITERAL", argument)]
    negated, ranges = op == "NOT_LITERAL", []
    for kind, value in entries:
        if str(kind) == "NEGATE":
            negated = True
        elif str(kind) == "LITERAL":
            ranges.append((value, value))
        elif str(kind) == "RANGE":
            ranges.append(tuple(value))
        else:
            ranges += _category(str(value), bool(flags & re.ASCII))
    points = _joined(ranges)
    if flags & re.IGNORECASE:
        points = _any_case(points, bool(flags & re.ASCII))
    return _complement(points) if negated else _within_text(points)


@cache
def _category(name: str, ascii_only: bool) -> CodePoints:
    """CATEGORY_DIGIT, _SPACE or _WORD, or what is not one (CATEGORY_NOT_...)."""
    kind = name.removeprefix("CATEGORY_").removeprefix("NOT_").removeprefix("UNI_")
    runs = re.compile({"DIGIT": r"\d+", "SPACE": r"\s+", "WORD": r"\w+"}[kind], re.ASCII if ascii_only else 0)
    every = "".join(map(chr, range(128 if ascii_only else 0x110000)))
    points: CodePoints = tuple((run.start(), run.end() - 1) for run in runs.finditer(every))
    return _complement(points) if "NOT_" in name else points


def _any_case(points: CodePoints, ascii_only: bool) -> CodePoints:
    if sum(hi - lo + 1 for lo, hi in points) > 4096:
        return points
    forms = {form for lo, hi in points for i in range(lo, hi + 1) for form in (chr(i).lower(), chr(i).upper())}
    more = [ord(form) for form in forms if len(form) == 1 and not (ascii_only and ord(form) > 127)]
    return _joined([*points, *((i, i) for i in more)])


def _joined(ranges: Iterable[tuple[int, int]]) -> CodePoints:
    out: list[tuple[int, int]] = []
    for lo, hi in sorted(ranges):
        if out and lo <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(hi, out[-1][1]))
        else:
            out.append((lo, hi))
    return tuple(out)


def _complement(points: CodePoints) -> CodePoints:
    out, at = [], 0
    for lo, hi in points:
        if at < lo:
            out.append((at, lo - 1))
        at = hi + 1
    return _within_text((*out, (at, 0x10FFFF)) if at <= 0x10FFFF else tuple(out))


def _within_text(points: CodePoints) -> CodePoints:
    parts = ((max(lo, a), min(hi, b)) for lo, hi in points for a, b in _ALL)
    return tuple((lo, hi) for lo, hi in parts if lo <= hi)


# UTF-8

_END = -1


@cache
def _utf8_tree(points: CodePoints) -> tuple[list[dict[int, int]], int]:
    """(nodes, root): node -> {next node: bits of the bytes}, with `_END` after a character's last byte. Equal ends of
    different characters are one node."""
    nodes: list[dict[int, int]] = []
    known: dict[tuple[tuple[tuple[int, int], ...], ...], int] = {}

    def node(sequences: tuple[tuple[tuple[int, int], ...], ...]) -> int:
        if sequences in known:
            return known[sequences]
        rest: dict[int, list[tuple[tuple[int, int], ...]]] = {}
        for first, *more in sequences:
            for byte in range(first[0], first[1] + 1):
                rest.setdefault(byte, []).append(tuple(more))
        edges: dict[int, int] = {}
        for byte, following in rest.items():
            to = _END if following == [()] else node(tuple(following))
            edges[to] = edges.get(to, 0) | 1 << byte
        nodes.append(edges)
        known[sequences] = len(nodes) - 1
        return known[sequences]

    root = node(tuple(sequence for lo, hi in points for sequence in _utf8_sequences(lo, hi)))
    return nodes, root


def _utf8_sequences(lo: int, hi: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """The characters lo..hi as sequences of ranges of bytes, each a product of its ranges."""
    for end in (0x7F, 0x7FF, 0xFFFF):  # one length each
        if lo <= end < hi:
            yield from _utf8_sequences(lo, end)
            yield from _utf8_sequences(end + 1, hi)
            return
    for places in (1, 2, 3):  # all values of the last `places` bytes, or one value of those before
        size = 1 << 6 * places
        if lo // size != hi // size and hi > 0x7F:
            if lo % size:
                yield from _utf8_sequences(lo, lo - lo % size + size - 1)
                yield from _utf8_sequences(lo - lo % size + size, hi)
                return
            if hi % size != size - 1:
                yield from _utf8_sequences(lo, hi - hi % size - 1)
                yield from _utf8_sequences(hi - hi % size, hi)
                return
    yield tuple(zip(chr(lo).encode(), chr(hi).encode()))


# The table


def _determinised(builder: _Builder) -> tuple[np.ndarray, np.ndarray]:
    """(table, accepts) of the subset construction, without the states from which nothing accepts."""
    reach = _free_closures(builder.free)
    classes, representatives = _byte_classes({bits for edges in builder.edges for bits in edges.values()})
    members: dict[int, list[int]] = {}
    start = reach(builder.start)
    numbers, order = {start: 0}, [start]
    rows: list[list[int]] = []
    for subset in order:
        moves: list[set[int]] = [set() for _ in representatives]
        for s in subset:
            for to, bits in builder.edges[s].items():
                if bits not in members:
                    members[bits] = [i for i, byte in enumerate(representatives) if bits >> byte & 1]
                for i in members[bits]:
                    moves[i].add(to)
        row = []
        for targets in moves:
            following = frozenset().union(*map(reach, targets)) if targets else None
            if following is not None and following not in numbers:
                numbers[following] = len(order)
                order.append(following)
                if len(order) > _STATES:
                    raise SteersmanError(
                        f"{builder.pattern[:60]!r} needs more than {_STATES} states: repeat less, or say (?a) for ASCII"
                    )
            row.append(-1 if following is None else numbers[following])
        rows.append(row)
    table = np.array(rows, dtype=np.int32)[:, classes]
    accepts = np.array([builder.end in subset for subset in order])
    return _trimmed(table, accepts, builder.pattern)


def _free_closures(free: Sequence[Sequence[int]]) -> Any:
    @cache
    def reach(state: int) -> frozenset[int]:
        found, stack = {state}, [state]
        while stack:
            for other in free[stack.pop()]:
                if other not in found:
                    found.add(other)
                    stack.append(other)
        return frozenset(found)

    return reach


def _byte_classes(edge_bits: set[int]) -> tuple[np.ndarray, list[int]]:
    """([256] the class of each byte, one byte of each class): bytes that no edge tells apart are one class."""
    ordered = sorted(edge_bits)
    seen: dict[tuple[bool, ...], int] = {}
    classes = [seen.setdefault(tuple(bool(bits >> b & 1) for bits in ordered), len(seen)) for b in range(256)]
    return np.array(classes), [classes.index(i) for i in range(len(seen))]


def _trimmed(table: np.ndarray, accepts: np.ndarray, pattern: str) -> tuple[np.ndarray, np.ndarray]:
    alive = distances(table, accepts, np.arange(256)) < np.inf
    if not alive[0]:
        raise SteersmanError(f"no text matches {pattern[:60]!r}")
    number = np.where(alive, np.cumsum(alive) - 1, -1).astype(np.int32)
    kept = table[alive]
    return np.where(kept < 0, -1, number[kept]).astype(np.int32), accepts[alive]


def distances(table: np.ndarray, accepts: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[states] float: how many moves over the given columns of `table` lead to an accepting state; inf if none do."""
    out = np.where(accepts, 0.0, np.inf)
    moves = table[:, columns]
    while True:
        following = np.where(moves < 0, np.inf, out[moves])
        nearer = np.minimum(out, 1 + following.min(1, initial=np.inf))
        if np.array_equal(nearer, out):
            return out
        out = nearer
