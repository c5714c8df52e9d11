"""Masks: which tokens may come next. A particle's weight takes up the probability that the mask leaves (arXiv
2306.03081), so that what is sampled is the model's own distribution given that the mask is kept.

Prefixes are the generated tokens alone, without the prompt.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.generate import stop_ids as ids_of
from steersman.steer.decoding.automaton import Automaton, distances

Prefix = tuple[int, ...]


class Mask:
    """Which tokens may follow a prefix. A subclass needs `allowed` alone."""

    what = "the mask"
    """What messages call it."""

    def allowed(self, prefix: Prefix, remaining: int) -> Tensor:
        """[V] bool: the tokens that may come next, of which this one and `remaining` - 1 more can be written."""
        raise NotImplementedError  # each mask defines it

    def complete(self, prefix: Prefix) -> bool:
        """Whether the text may stand as it is when no more tokens can be written."""
        return True

    def closed(self, prefix: Prefix) -> bool:
        """Whether the text is finished although no token says so."""
        return False


class FunctionMask(Mask):
    """A mask from `fn(prefix)`, which returns [V] bool or the ids that are allowed."""

    def __init__(self, fn: Callable[[Prefix], Any], vocabulary: int) -> None:
        self.fn, self.vocabulary = fn, vocabulary
        self.what = f"the mask {getattr(fn, '__name__', type(fn).__name__)}"

    def allowed(self, prefix: Prefix, remaining: int) -> Tensor:
        given = self.fn(prefix)
        table = given if isinstance(given, Tensor) else torch.as_tensor(given if len(given) else np.zeros(0, np.int64))
        if table.dtype == torch.bool:
            if table.shape != (self.vocabulary,):
                raise SteersmanError(f"{self.what} returned {tuple(table.shape)}, expected [{self.vocabulary}] bool")
            return table.cpu()
        ids = table.long().flatten().cpu()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise SteersmanError(f"{self.what} allows a token that the vocabulary of {self.vocabulary} does not have")
        out = torch.zeros(self.vocabulary, dtype=torch.bool)
        out[ids] = True
        return out


class NoRepeat(Mask):
    """No n tokens in the order in which the generated text has them already (CriticControl, arXiv 2212.10938: 4)."""

    def __init__(self, n: int, vocabulary: int) -> None:
        self.n, self.vocabulary = whole_number(n, "n", at_least=1), vocabulary
        self.what = f"the mask against repeated {self.n}-grams"

    def allowed(self, prefix: Prefix, remaining: int) -> Tensor:
        out = torch.ones(self.vocabulary, dtype=torch.bool)
        last = prefix[len(prefix) - self.n + 1 :] if self.n > 1 else ()
        if len(last) == self.n - 1:
            for i in range(len(prefix) - self.n + 1):
                if prefix[i : i + self.n - 1] == last:
                    out[prefix[i + self.n - 1]] = False
        return out


class RegexMask(Mask):
    """The generated text as a whole matches a regular expression, as in `re.fullmatch`, within the tokens there are.

    Python's syntax, but for what no finite automaton can do (looking ahead or behind, references). The text is the
    bytes that the tokens write after the prompt: with most tokenizers a word's first token writes the space before it,
    so a pattern often begins with ` ?`. An end token is allowed only where the text matches, and a token only if the
    text can still match within the tokens that remain: such a token has no share in the target, so nothing is lost.
    `needs_end=False` ends a text without an end token where it matches and nothing could follow; otherwise the
    probability of the end token is part of the weight.

    Raises SteersmanError for a malformed pattern, one that is not regular, and one that the tokens cannot write.
    """

    def __init__(self, lm: LanguageModel, pattern: str, *, needs_end: bool = True) -> None:
        self.what = f"the regular expression {pattern[:60]!r}"
        self.automaton = Automaton(pattern)
        self.needs_end = needs_end
        self.stop_ids = ids_of(lm.model.generation_config.eos_token_id)
        self._words = _Words(lm.tokenizer, lm.hook_width("logits"), self.stop_ids)
        self._states: dict[Prefix, int] = {(): 0}
        self._next: dict[int, np.ndarray] = {}
        self._exact: np.ndarray | None = None
        singles = self._words.single_bytes
        self._nearest = distances(self.automaton.table, self.automaton.accepts, singles)
        self._leaf = np.all(self.automaton.table < 0, axis=1)

    def state(self, prefix: Prefix) -> int:
        """The automaton's state after a prefix, -1 where the text cannot match any more."""
        known = self._states.get(prefix)
        if known is None:
            before = self.state(prefix[:-1])
            if before < 0 or prefix[-1] in self.stop_ids:
                known = before if before >= 0 and self.automaton.accepts[before] else -1
            else:
                known = int(self._following(before)[prefix[-1]])
            self._states[prefix] = known
        return known

    def _following(self, state: int) -> np.ndarray:
        """[V] int32: the state after each token, -1 where the text can no longer match."""
        if state not in self._next:
            self._next[state] = self._words.walk(self.automaton.table, state)
        return self._next[state]

    def allowed(self, prefix: Prefix, remaining: int) -> Tensor:
        state = self.state(prefix)
        if state < 0:
            return torch.zeros(self._words.vocabulary, dtype=torch.bool)
        following = self._following(state)
        fits = following >= 0
        # One token for each byte is always enough; where that is too many, count the tokens it takes exactly.
        if (self._nearest[following[fits]] > remaining - 1).any():
            fits = fits & (self._tokens_needed()[following] <= remaining - 1)
        out = torch.from_numpy(fits.copy())
        if self.automaton.accepts[state]:
            out[self.stop_ids] = True
        return out

    def complete(self, prefix: Prefix) -> bool:
        state = self.state(prefix)
        return state >= 0 and bool(self.automaton.accepts[state])

    def closed(self, prefix: Prefix) -> bool:
        return not self.needs_end and self.complete(prefix) and bool(self._leaf[self.state(prefix)])

    def _tokens_needed(self) -> np.ndarray:
        """[states + 1] float: the least number of tokens from a state to a whole match; inf for state -1."""
        if self._exact is None:
            ways = [np.unique(self._words.walk(self.automaton.table, s)) for s in range(len(self.automaton))]
            needed = np.where(self.automaton.accepts, 0.0, np.inf)
            needed = np.append(needed, np.inf)  # the entry of state -1
            while True:
                nearer = needed.copy()
                for s, to in enumerate(ways):
                    nearer[s] = min(nearer[s], 1 + needed[to].min(initial=np.inf))
                if np.array_equal(nearer, needed):
                    break
                needed = nearer
            self._exact = needed
        return self._exact


class _Words:
    """The bytes that each token writes, as a matrix [V, longest] with -1 after a token's end."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Sequence[int]) -> None:
        words = token_bytes(tokenizer, vocabulary)
        for stop in stop_ids:
            words[stop] = b""
        self.vocabulary = vocabulary
        self.lengths = np.array([len(word) for word in words])
        self.bytes = np.full((vocabulary, max(1, int(self.lengths.max()))), -1, dtype=np.int32)
        for i, word in enumerate(words):
            self.bytes[i, : len(word)] = np.frombuffer(word, np.uint8)
        self.single_bytes = np.unique(self.bytes[self.lengths == 1, 0])

    def walk(self, table: np.ndarray, state: int) -> np.ndarray:
        """[V] int32: the state after each token from `state`; -1 where there is none, or for tokens without text."""
        out = np.full(self.vocabulary, -1, dtype=np.int32)
        alive = np.nonzero(self.lengths)[0]
        states = np.full(len(alive), state, dtype=np.int32)
        for place in range(self.bytes.shape[1]):
            states = table[states, self.bytes[alive, place]]
            going = states >= 0
            alive, states = alive[going], states[going]
            done = self.lengths[alive] == place + 1
            out[alive[done]] = states[done]
            alive, states = alive[~done], states[~done]
            if not len(alive):
                break
        return out


def token_bytes(tokenizer: Any, vocabulary: int) -> list[bytes]:
    """What each token writes in the middle of a text; empty for special tokens and for ids that are no token.

    Knows byte-level BPE, SentencePiece with its byte tokens, and otherwise asks the tokenizer what a token adds to a
    text.
    """
    if tokenizer is None:
        raise SteersmanError("a regular expression needs the model's tokenizer to know what its tokens write")
    n = min(vocabulary, len(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(list(range(n)))
    special = set(tokenizer.all_special_ids)
    added = {int(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    kinds = _decoder_kinds(tokenizer)
    letters = _byte_letters() if "ByteLevel" in kinds else {}
    words = [b""] * vocabulary
    for i, token in enumerate(tokens):
        if i in special or token is None:
            continue
        if i in added:
            words[i] = added[i].encode()
        elif letters:
            words[i] = bytes(letters[c] for c in token) if all(c in letters for c in token) else token.encode()
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            words[i] = _fallback_byte(token) or token.replace("\u2581", " ").encode()
        else:
            words[i] = _added_text(tokenizer, tokens, i, special)
    return words


def _decoder_kinds(tokenizer: Any) -> set[str]:
    with contextlib.suppress(AttributeError, ValueError, TypeError):
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        return {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    return set()


@cache
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level BPE: printable ones for themselves, the others from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _fallback_byte(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        with contextlib.suppress(ValueError):
            return bytes([int(token[3:5], 16)])
    return b""


def _added_text(tokenizer: Any, tokens: Sequence[str], i: int, special: Iterable[int]) -> bytes:
    """What token i adds to a text that ends with another token."""
    anchor = next(j for j in range(len(tokens)) if j not in set(special))
    before = tokenizer.decode([anchor], skip_special_tokens=True)
    both = tokenizer.decode([anchor, i], skip_special_tokens=True)
    return both[len(before) :].encode() if both.startswith(before) else str(tokens[i]).encode()
