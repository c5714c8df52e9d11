"""`steersman cache`."""

from dataclasses import dataclass, replace

from steersman.commands.options import hook_points
from steersman.config import part_of
from steersman.errors import SteersmanError
from steersman.parallel import rank_and_world_size
from steersman.train import CacheConfig, cache_activations


@dataclass(frozen=True, kw_only=True)
class CacheCommand(CacheConfig):
    """Run a model over text and store its activations at one or several hook points."""

    hook: tuple[str, ...] = ()  # a list, so that the flag may be repeated
    """Hook point, such as blocks.2.hook_resid_post or model.layers.2; several are stored side by side."""
    layer: tuple[int, ...] = ()
    """Layer in place of a hook point: the state after it, counted from 0; -1 is the last."""


def run(config: CacheCommand) -> None:
    """`steersman cache`."""
    hooks = hook_points(config.hook, config.layer, config.model, config.revision)
    if config.model is None or config.text is None or not hooks:
        raise SteersmanError("nothing to cache: give --model, --text and --hook or --layer")
    store = cache_activations(config=replace(part_of(CacheConfig, config), hook=hooks))
    if rank_and_world_size()[0]:
        return  # only rank 0 prints
    print(f"{store.path}: {store.n_rows:,} rows of {', '.join(store.hook_names)} from {store.model_name}")
    for hook in store.hook_names:
        stats = store.stats(hook)
        print(f"  {hook}: width {store.width(hook)}, mean |x| {stats.mean_norm:.4g}, median {stats.median_norm:.4g}")
        if large := stats.large_rows():
            print(f"    {large}")
