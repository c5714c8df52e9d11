"""`steersman train`."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from steersman.commands.options import PrintOptions, heldout_line, hook_points, left_out_line, training_record
from steersman.config import parse_yaml, part_of
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.parallel import rank_and_world_size
from steersman.sae import SAE
from steersman.train import (
    ActivationStore,
    ActivationStream,
    HookView,
    SideBySide,
    StreamConfig,
    TrainConfig,
    stream_activations,
    train_sae,
)
from steersman.train.run.run import check_predicted


@renamed_fields(contexts="model_batch_size")
@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig, StreamConfig, PrintOptions):
    """Train an SAE on a store (--store), or straight from a model and text with nothing written (--model, --text,
    --hook). What says how text becomes activations is for the second. A crosscoder is trained on several stores of the
    same tokens, or several hook points."""

    out: str
    """Run folder. A run that was interrupted is resumed; a finished one is left as it is."""
    store: tuple[str, ...] = ()
    """Folder of a store that `steersman cache` wrote; of several, for a crosscoder, the rows stand side by side."""
    hook: tuple[str, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride] - a store says its own
    """Hook point: which of the store's, or where to read the model; several, for a crosscoder, stand side by side."""
    batch_size: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - that of training
    """Rows a step; None: a power of two between 512 and 4096 that leaves about 1000 steps."""
    layer: tuple[int, ...] = ()
    """Layer in place of --hook: the state after it, counted from 0; -1, the last, where a model is read."""
    model_batch_size: int = StreamConfig.batch_size
    """Without a store: contexts of a forward pass (the batch size of `steersman cache`)."""
    text: tuple[str, ...] = ()
    """File, folder or dataset id (see `open_text`). Several, each as NAME=WEIGHT, are mixed: weights are their shares
    of the tokens."""
    option: tuple[str, ...] = ()
    """Setting of the architecture's own, as name=value; may be repeated."""


_STREAMED = {
    field.name: field.default for field in fields(StreamConfig) if field.name not in ("hook", "tokens", "device")
}
"""Settings that only training straight from a model reads, but for `batch_size`, which is training's here."""


def run(config: TrainCommand) -> None:
    """`steersman train`."""
    source = _source(config)
    settings = replace(part_of(TrainConfig, config), options=config.options | _options(config.option))
    sae = train_sae(source, settings, config.out)
    if rank_and_world_size()[0]:
        return  # only rank 0 prints
    hooks = " | ".join(map(str, sae.cfg.sides)) or sae.cfg.hook_name
    line = f"{config.out}: {sae.cfg.d_sae} features at {hooks}; held out: {heldout_line(sae)}"
    text = f"{line}\n{left_out_line(sae)}".rstrip()
    config.show(lambda: text, training_record(sae, config.out))


def _source(config: TrainCommand) -> ActivationStore | HookView | SideBySide | Callable[[], ActivationStream]:
    if config.hook and config.layer:
        raise SteersmanError("give either --hook or --layer, not both")
    if config.store and (config.model or config.text):
        raise SteersmanError("give either --store, or --model with --text and --hook, not both")
    hooks = hook_points(config.hook, config.layer, config.model, config.revision)
    if max(len(config.store), len(hooks)) > 1 and not SAE.architectures[config.architecture].side_by_side:
        raise SteersmanError(
            f"several stores or hook points are for a crosscoder, not {config.architecture}: add --architecture "
            "crosscoder, or train an SAE of each"
        )
    if config.store:
        for name, default in (_STREAMED | {"model_batch_size": StreamConfig.batch_size}).items():
            if name not in ("batch_size", "text") and getattr(config, name) != default:
                flag = f"--{name.replace('_', '-')}"
                raise SteersmanError(f"{flag} is for training straight from a model: a store's rows are there already")
        stores = [ActivationStore.open(path) for path in config.store]
        views = [HookView(store, hooks) for store in stores] if hooks else stores
        return views[0] if len(views) == 1 else SideBySide(views)
    if not (config.model and config.text and hooks):
        raise SteersmanError("nothing to train on: give --store, or --model with --text and --hook or --layer")
    settings: dict[str, Any] = {name: getattr(config, name) for name in _STREAMED}
    given: list[str] = [*hooks, *([] if config.hook_out is None else [config.hook_out])]
    if config.hook_out is not None:
        check_predicted(hooks[0], config.hook_out)
    settings |= {"hook": given[0] if len(given) == 1 else tuple(given)}
    stream = StreamConfig(**settings | {"device": config.device, "batch_size": config.model_batch_size})
    return lambda: stream_activations(config=stream)


def _options(given: tuple[str, ...]) -> dict[str, Any]:
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SteersmanError(f"option {text!r} is not of the form name=value, such as sparsity=0.3")
        options[name] = parse_yaml(value, f"option {name}")
    return options
