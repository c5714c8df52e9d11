"""Some hook points of a store as something to train on."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from steersman.train.store.batch import ActivationBatch
from steersman.train.store.statistics import ActivationStats, stats_side_by_side
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
        """Statistics of one of the hook points, or of the rows side by side (see `stats_side_by_side`)."""
        if hook is not None:
            return self.store.stats(hook)
        return stats_side_by_side([self.store.stats(one) for one in self.hooks])

    def width(self, hook: str) -> int:
        """Width of one of the hook points."""
        return self.store.width(hook)

    def resolve_hook(self, hook: str) -> str:
        """The name under which the store has a hook point, as it is given."""
        return hook

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
