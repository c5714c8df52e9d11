"""`steersman cache`."""

from steersman.parallel import rank_and_world_size
from steersman.train import CacheConfig, cache_activations


def run(config: CacheConfig) -> None:
    """`steersman cache`."""
    store = cache_activations(config=config)
    if rank_and_world_size()[0]:
        return  # one of several ranks speaks
    print(f"{store.path}: {store.n_rows:,} rows of {', '.join(store.hook_names)} from {store.model_name}")
    for hook in store.hook_names:
        stats = store.stats(hook)
        print(f"  {hook}: width {store.width(hook)}, mean |x| {stats.mean_norm:.4g}, median {stats.median_norm:.4g}")
