"""Some hook points of a store as something to train on."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from steersman.train.store.batch import ActivationBatch
from steersman.train.store.statistics import ActivationStats
from steersman.train.store.store import ActivationStore


class HookView:
    """Some hook points of `store` as something to train on: their rows side by side, in the store's order.

    Raises a SteersmanError when the store has no such hook point.
    """

    def __init__(self, store: ActivationStore, hooks: str | Sequence[str]) -> None:
        self.store, self.hooks = store, store.hooks_of(hooks)
        widths = [store.width(hook) for hook in self.hooks]
        self.cuts = tuple(accumulate(widths, initial=0))
        """Where each hook point's columns begin, and the end of the last: those of hooks[i] are cuts[i]:cuts[i + 1]."""
        self.d_in = self.cuts[-1]
        """The sum of the widths."""
        self.hook_name = "+".join(self.hooks)
        self.model_name, self.fingerprint = store.model_name, store.fingerprint

    def __repr__(self) -> str:
        return f"HookView({', '.join(self.hooks)} of {self.store})"

    def stats(self, hook: str | None = None) -> ActivationStats:
        """Statistics of one of the hook points, or of the rows side by side.

        Those of rows side by side hold the exact mean and mean squared norm. What their norms are follows only if the
        norms of the parts do not vary, for which the mean and median norm given are right. Of large rows only the
        largest norm is known.
        """
        if hook is not None or len(self.hooks) == 1:
            return self.store.stats(hook or self.hook_name)
        parts = [self.store.stats(hook) for hook in self.hooks]
        return replace(
            parts[0],
            mean=torch.cat([part.mean for part in parts]),
            mean_norm=math.hypot(*(part.mean_norm for part in parts)),
            median_norm=math.hypot(*(part.median_norm for part in parts)),
            mean_squared_norm=sum(part.mean_squared_norm for part in parts),
            max_norm=math.hypot(*(part.max_norm for part in parts)),
            n_large=0,
            large_share=0.0,
        )

    @property
    def has_labels(self) -> bool:
        """See `ActivationStore`."""
        return self.store.has_labels

    def n_labelled(self, **options: Any) -> int:
        """See `ActivationStore.n_labelled`."""
        return self.store.n_labelled(**options)

    def n_batches(self, batch_size: int, **options: Any) -> int:
        """See `ActivationStore.n_batches`."""
        return self.store.n_batches(batch_size, **options)

    def batches(self, batch_size: int, **options: Any) -> Iterator[ActivationBatch]:
        """See `ActivationStore.batches`; `x` is [batch_size / world_size, d_in]."""
        return self.store.batches(batch_size, hook=self.hooks, **options)
