"""What a person or a language model is shown to say what a feature stands for: texts in which it fires, from all levels
of its activation, and texts in which it does not. One pass over a store, and a few hundred stretches of it.

Shape letters: L latents, W rows of a stretch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.lm.pieces import Pieces
from steersman.sae import SAE
from steersman.sae.features import Details
from steersman.train.reports.contexts import REACH, around, token_contexts
from steersman.train.reports.features import read_features
from steersman.train.store.store import ActivationStore

_STRETCHES = 512
_SMALLEST = 8

Stretch = tuple[tuple[str, ...], tuple[float, ...]]
"""Tokens as text, and the feature's activation on each."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Texts of one feature."""

    active: list[Stretch] = field(default_factory=list)
    """Those in which it fires, strongest first, one a place of the store."""
    inactive: list[Stretch] = field(default_factory=list)
    """Those in which it does not, drawn at random."""


@torch.no_grad()
def label_examples(
    sae: SAE,
    store: ActivationStore,
    lm: LanguageModel,
    features: Sequence[int],
    *,
    active: int = 40,
    inactive: int = 20,
    reach: int = REACH,
    seed: int = 0,
) -> dict[int, Examples]:
    """Up to `active` texts in which each of `features` fires and `inactive` ones in which it does not, of at most
    2 * reach + 1 tokens that the model read together. Half of the former are the largest activations, the rest drawn
    from all levels. Raises SteersmanError for an SAE, store and model that do not belong together."""
    hook = store.hook_of(sae)
    check_sae_fits(lm, sae, hook)
    for feature in features:
        sae.check_feature(feature)
    summary = read_features(sae, store, Details(reach=reach, per_level=4, partners=0))
    kept: Any = summary.details
    pieces = Pieces(lm.tokenizer)
    drawn = _drawn(sae, store, hook, pieces, reach, seed)
    found = {}
    for feature in features:
        largest = zip(summary.example_rows[feature].tolist(), kept.example_windows[feature])
        sampled = zip(kept.sample_rows[feature].tolist(), kept.sample_windows[feature])
        chosen = _apart(list(largest), list(sampled), active, reach)
        texts = _stretches(pieces, store, chosen, reach)
        silent = [(tokens, (0.0,) * len(tokens)) for tokens, on in drawn if feature not in on]
        order = torch.randperm(len(silent), generator=torch.Generator().manual_seed(seed + feature)).tolist()
        found[feature] = Examples(active=_strongest(texts), inactive=[silent[i] for i in order[:inactive]])
    return found


def _strongest(texts: list[Stretch]) -> list[Stretch]:
    return sorted((one for one in texts if max(one[1]) > 0), key=lambda one: -max(one[1]))


def _apart(
    largest: list[tuple[int, Tensor]], sampled: list[tuple[int, Tensor]], n: int, reach: int
) -> list[tuple[int, Tensor]]:
    """n of the tokens, half of them among the largest, none within the text around another."""
    chosen: list[tuple[int, Tensor]] = []
    for part, limit in ((largest, n // 2), (sampled, n), (largest, n)):
        for row, window in part:
            if len(chosen) >= limit:
                break
            if row >= 0 and all(abs(row - other) > 2 * reach for other, _ in chosen):
                chosen.append((row, window))
    return chosen


def _stretches(pieces: Pieces, store: ActivationStore, chosen: list[tuple[int, Tensor]], reach: int) -> list[Stretch]:
    """The texts around rows and the activations [W] on them."""
    if not chosen:
        return []
    rows, windows = torch.tensor([row for row, _ in chosen]), torch.stack([window for _, window in chosen]).float()
    contexts = token_contexts(pieces, windows[:, reach], windows, around(store, rows, reach))
    return [
        (tuple(token.text for token in one.tokens), tuple(abs(token.value) for token in one.tokens)) for one in contexts
    ]


def _drawn(
    sae: SAE, store: ActivationStore, hook: str, pieces: Pieces, reach: int, seed: int
) -> list[tuple[tuple[str, ...], set[int]]]:
    """Stretches drawn from the store: their tokens, and the features that fire somewhere in them."""
    rows = torch.randint(0, store.n_rows, (_STRETCHES,), generator=torch.Generator().manual_seed(seed)).unique()
    found, drawn = around(store, rows, reach), []
    for i, row in enumerate(rows.tolist()):
        low, high = int(found.low[i]), int(found.high[i])
        if high - low >= min(_SMALLEST, 2 * reach + 1):
            x = store.activations(torch.arange(row - reach + low, row - reach + high), hook)
            code = sae.encode_sparse(x.to(sae.device).float())
            tokens = tuple(piece.text for piece in pieces(found.ids[i, low:high].tolist()))
            drawn.append((tokens, set(code.indices[code.active].tolist())))
    return drawn
