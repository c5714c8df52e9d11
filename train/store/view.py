"""One hook point of a store that holds several, as something to train on."""

from collections.abc import Iterator
from typing import Any

from steersman.train.store.batch import ActivationBatch
from steersman.train.store.statistics import ActivationStats
from steersman.train.store.store import ActivationStore


class HookView:
    """What a trainer reads of `store` at `hook`; raises a SteersmanError when the store has no such hook point."""

    def __init__(self, store: ActivationStore, hook: str):
        self.d_in = store.width(hook)
        self.store, self.hook_name = store, hook
        self.model_name, self.fingerprint = store.model_name, store.fingerprint

    def stats(self) -> ActivationStats:
        """Statistics of the hook point's rows."""
        return self.store.stats(self.hook_name)

    def n_batches(self, batch_size: int, **options: Any) -> int:
        """See `ActivationStore.n_batches`."""
        return self.store.n_batches(batch_size, **options)

    def batches(self, batch_size: int, **options: Any) -> Iterator[ActivationBatch]:
        """See `ActivationStore.batches`."""
        return self.store.batches(batch_size, hook=self.hook_name, **options)
