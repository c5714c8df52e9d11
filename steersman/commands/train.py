"""`steersman train`."""

from dataclasses import dataclass
from typing import Any

from steersman.config import part_of
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.parallel import rank_and_world_size
from steersman.train import ActivationStore, ActivationStream, HookView, TrainConfig, train_sae


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig):
    """Train an SAE on a store (--store), or straight from a model and text with nothing written (--model, --text,
    --hook)."""

    out: str
    """Run folder. A run that was interrupted is resumed; a finished one is left as it is."""
    store: str | None = None
    """Folder of a store that `steersman cache` wrote."""
    hook: str | None = None
    """Hook point: which of the store's, or where to read the model."""
    model: str | None = None
    """Without a store: folder or hub id of the model."""
    text: str | None = None
    """Without a store: file, folder or dataset id of the text."""
    revision: str | None = None
    """Without a store: revision of the model on the hub."""
    buffer_rows: int = 65_536
    """Without a store: rows of the buffer that activations are shuffled in."""


def run(config: TrainCommand) -> None:
    """`steersman train`."""
    settings = part_of(TrainConfig, config)
    sae = train_sae(_source(config), settings, config.out)
    if rank_and_world_size()[0]:
        return  # only rank 0 prints
    heldout = sae.cfg.metadata["heldout"]
    measured = f"FVU {heldout['fvu']:.4f}, L0 {heldout['l0']:.1f}, dead {100 * heldout['dead_share']:.2f} %"
    print(f"{config.out}: {sae.cfg.d_sae} features at {sae.cfg.hook_name}; held out: {measured}")


def _source(config: TrainCommand) -> Any:
    if config.store is not None:
        if config.model or config.text:
            raise SteersmanError("give either --store, or --model with --text and --hook, not both")
        store = ActivationStore.open(config.store)
        return store if config.hook is None else HookView(store, config.hook)
    if not (config.model and config.text and config.hook):
        raise SteersmanError("nothing to train on: give --store, or --model with --text and --hook")
    model, text, hook = config.model, config.text, config.hook

    def stream() -> ActivationStream:
        lm = LanguageModel.load(model, device=config.device, revision=config.revision)
        return ActivationStream(lm, text, hook=hook, buffer_rows=config.buffer_rows)

    return stream
