"""The text around rows of a store, for people to read.

Shape letters: n rows, W rows of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from steersman.lm.pieces import Pieces
from steersman.train.reports.feature import Context
from steersman.train.store.store import ActivationStore

REACH = 12
"""Tokens on each side of the one that fired."""


class TokenValue(NamedTuple):
    """A token of a context."""

    text: str
    """Its text, of several tokens that share a character together."""
    value: float
    """The feature's activation on it: of several the one of largest magnitude."""


@dataclass(frozen=True, kw_only=True)
class TokenContext:
    """A stretch of a store's tokens with a feature's activation on each."""

    tokens: tuple[TokenValue, ...]
    """The tokens that the model read together, in order."""
    centre: int
    """Which of them the context is about."""
    value: float
    """The feature's activation there."""
    document: int
    """Number of the document in the text source."""
    position: int
    """Place of the token in what the model read at once."""


class Around(NamedTuple):
    """The tokens around n rows."""

    ids: np.ndarray
    """[n, W] token ids."""
    low: np.ndarray
    """[n]: first column that the model read together with the row: in one document, in one context."""
    high: np.ndarray
    """[n]: the column after the last such."""
    documents: np.ndarray
    """[n] document numbers."""
    positions: np.ndarray
    """[n] places in the context."""


def around(store: ActivationStore, rows: Tensor, reach: int = REACH) -> Around:
    """The tokens around `rows` [n], W = 2 * reach + 1. A context ends where positions do not rise; where a store knows
    none, they are all 0, the document alone counts."""
    here = rows.numpy()
    wanted = here[:, None] + np.arange(-reach, reach + 1)
    inside = (wanted >= 0) & (wanted < store.n_rows)
    info = store.row_info(wanted.clip(0, max(0, store.n_rows - 1)).reshape(-1))
    ids, documents, positions = (part.numpy().reshape(wanted.shape) for part in info[:3])
    known = (positions * inside).any(axis=1, keepdims=True)
    rises = positions[:, :-1] < positions[:, 1:]
    joined = (documents[:, :-1] == documents[:, 1:]) & (rises | ~known) & inside[:, :-1] & inside[:, 1:]
    before, after = joined[:, :reach][:, ::-1], joined[:, reach:]
    return Around(
        ids=ids,
        low=reach - np.logical_and.accumulate(before, axis=1).sum(axis=1),
        high=reach + 1 + np.logical_and.accumulate(after, axis=1).sum(axis=1),
        documents=documents[:, reach],
        positions=positions[:, reach],
    )


def spread(documents: Sequence[int], n: int) -> list[int]:
    """The places of the first `n` of some contexts, one a document while there are enough documents, in order."""
    first: dict[int, int] = {}
    for i, document in enumerate(documents):
        first.setdefault(document, i)
    chosen = list(first.values())
    taken = set(chosen)
    chosen += [i for i in range(len(documents)) if i not in taken]
    return sorted(chosen[:n])


def plain_contexts(tokenizer: Any, values: Tensor, found: Around) -> list[Context]:
    """The contexts of rows with the activations `values` [n], as text."""
    contexts = []
    for i, value in enumerate(values.tolist()):
        ids, here = found.ids[i].tolist(), found.ids.shape[1] // 2
        before, after = ids[found.low[i] : here], ids[here + 1 : found.high[i]]
        head = tokenizer.decode(before)
        upto = tokenizer.decode([*before, ids[here]])
        whole = tokenizer.decode([*before, ids[here], *after])
        contexts.append(
            Context(
                activation=value,
                before=head,
                token=upto[len(head) :] if upto.startswith(head) else tokenizer.decode([ids[here]]),
                after=whole[len(upto) :] if whole.startswith(upto) else tokenizer.decode(after),
                document=int(found.documents[i]),
                position=int(found.positions[i]),
            )
        )
    return contexts


def token_contexts(pieces: Pieces, values: Tensor, windows: Tensor, found: Around) -> list[TokenContext]:
    """The contexts of rows with the activations `values` [n] and `windows` [n, W] around them, token by token."""
    contexts, reach = [], found.ids.shape[1] // 2
    for i, (value, acts) in enumerate(zip(values.tolist(), windows.tolist())):
        low, high = int(found.low[i]), int(found.high[i])
        tokens, centre = [], 0
        for piece in pieces(found.ids[i, low:high].tolist()):
            if piece.start <= reach - low < piece.stop:
                centre = len(tokens)
            part = acts[low + piece.start : low + piece.stop]
            tokens.append(TokenValue(piece.text, part[0] if len(part) == 1 else max(part, key=abs)))
        contexts.append(
            TokenContext(
                tokens=tuple(tokens),
                centre=centre,
                value=value,
                document=int(found.documents[i]),
                position=int(found.positions[i]),
            )
        )
    return contexts
