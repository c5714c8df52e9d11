"""`steersman cache`."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from steersman.commands.options import PrintOptions, hook_points
from steersman.config import part_of
from steersman.errors import SteersmanError
from steersman.parallel import rank_and_world_size
from steersman.train import ActivationStore, CacheConfig, cache_activations


@dataclass(frozen=True, kw_only=True)
class CacheCommand(CacheConfig, PrintOptions):
    """Run a model over text and store its activations at one or several hook points."""

    hook: tuple[str, ...] = ()  # a list, so that the flag may be repeated
    """Hook point, such as blocks.2.hook_resid_post or model.layers.2; several are stored side by side."""
    layer: tuple[int, ...] = ()
    """Layer in place of a hook point: the state after it, counted from 0; -1 is the last."""
    text: tuple[str, ...] = ()
    """File, folder or dataset id (see `open_text`). Several, each as NAME=WEIGHT, are mixed: weights are their shares
    of the tokens."""


def run(config: CacheCommand) -> None:
    """`steersman cache`."""
    hooks = hook_points(config.hook, config.layer, config.model, config.revision)
    if config.model is None or not config.text or not hooks:
        raise SteersmanError("nothing to cache: give --model, --text and --hook or --layer")
    store = cache_activations(config=replace(part_of(CacheConfig, config), hook=hooks))
    if rank_and_world_size()[0]:
        return  # only rank 0 prints
    config.show(lambda: _lines(store), _record(store))


def _record(store: ActivationStore) -> dict[str, Any]:
    hooks = {hook: {"width": store.width(hook), **asdict(store.stats(hook))} for hook in store.hook_names}
    for figures in hooks.values():
        del figures["mean"]  # a number for each dimension
    return {"path": store.path, "model": store.model_name, "rows": store.n_rows, "hooks": hooks}


def _lines(store: ActivationStore) -> str:
    lines = [f"{store.path}: {store.n_rows:,} rows of {', '.join(store.hook_names)} from {store.model_name}"]
    for hook in store.hook_names:
        stats = store.stats(hook)
        norms = f"mean |x| {stats.mean_norm:.4g}, median {stats.median_norm:.4g}"
        lines.append(f"  {hook}: width {store.width(hook)}, {norms}")
        if large := stats.large_rows():
            lines.append(f"    {large}")
    return "\n".join(lines)
