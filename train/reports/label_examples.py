"""What a person or a language model is shown to say what a feature stands for: texts in which it fires, from all levels
of its activation, and texts in which it does not. One pass over a store, and a few hundred stretches of it.

Shape letters: L latents, W rows of a stretch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.progress import progress
from steersman.sae import SAE
from steersman.sae.features import Details, Rows, summarize_features
from steersman.train.reports.features import BATCH_ROWS, N_EXAMPLES
from steersman.train.store.statistics import LARGE_NORM_RATIO
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
    reach: int = 12,
    seed: int = 0,
) -> dict[int, Examples]:
    """Up to `active` texts in which each of `features` fires and `inactive` ones in which it does not, of at most
    2 * reach + 1 tokens that the model read together. Half of the former are the largest activations, the rest drawn
    from all levels. Raises SteersmanError for an SAE, store and model that do not belong together."""
    hook = store.hook_of(sae)
    check_sae_fits(lm, sae, hook)
    for feature in features:
        sae.check_feature(feature)
    bar = progress(
        store.batches(BATCH_ROWS, hook=hook, split="all", shuffle=False, drop_last=False),
        desc="reading features", total=store.n_batches(BATCH_ROWS, split="all", drop_last=False), unit="batch",
    )  # fmt: skip
    median = store.stats(hook).median_norm
    rows = (Rows(batch.x, batch.rows) for batch in bar)
    details = Details(reach=reach, per_level=4, partners=1, max_pairs=1)
    summary = summarize_features(sae, rows, median, N_EXAMPLES, LARGE_NORM_RATIO * median or float("inf"), details)
    kept: Any = summary.details
    drawn = _drawn(sae, store, hook, lm, reach, seed)
    found = {}
    for feature in features:
        largest = zip(summary.example_rows[feature].tolist(), kept.example_windows[feature])
        sampled = zip(kept.sample_rows[feature].tolist(), kept.sample_windows[feature])
        chosen = _apart(list(largest), list(sampled), active, reach)
        texts = [_stretch(store, lm, row, window, reach) for row, window in chosen]
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


def _stretch(store: ActivationStore, lm: LanguageModel, row: int, window: Tensor, reach: int) -> Stretch:
    """The text around a row and the activations [W] on it."""
    tokens, low, high = _around(store, lm, row, reach)
    return tokens, tuple(window[low - row + reach : high - row + reach].float().abs().tolist())


def _around(store: ActivationStore, lm: LanguageModel, row: int, reach: int) -> tuple[tuple[str, ...], int, int]:
    """The tokens around a row that the model read together with it, and their first and last row but one."""
    start, stop = max(0, row - reach), min(store.n_rows, row + reach + 1)
    info = store.tokens(start, stop)
    documents, positions = info.doc_ids.tolist(), info.positions.tolist()
    known = any(positions)

    def joined(i: int) -> bool:
        return documents[i] == documents[i + 1] and (not known or positions[i] < positions[i + 1])

    low = high = row - start
    while low > 0 and joined(low - 1):
        low -= 1
    while high + 1 < len(documents) and joined(high):
        high += 1
    ids = info.token_ids[low : high + 1].tolist()
    texts = [lm.tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]  # each token as it stands behind the others
    whole = [after[len(before) :] if after.startswith(before) else "" for before, after in pairwise(texts)]
    return tuple(whole), start + low, start + high + 1


def _drawn(
    sae: SAE, store: ActivationStore, hook: str, lm: LanguageModel, reach: int, seed: int
) -> list[tuple[tuple[str, ...], set[int]]]:
    """Stretches drawn from the store: their tokens, and the features that fire somewhere in them."""
    rows = torch.randint(0, store.n_rows, (_STRETCHES,), generator=torch.Generator().manual_seed(seed)).unique()
    drawn = []
    for row in rows.tolist():
        tokens, low, high = _around(store, lm, row, reach)
        if high - low >= min(_SMALLEST, 2 * reach + 1):
            x = store.activations(torch.arange(low, high), hook)
            code = sae.encode_sparse(x.to(sae.device).float())
            drawn.append((tokens, set(code.indices[code.active].tolist())))
    return drawn
