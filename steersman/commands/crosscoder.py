"""`steersman crosscoder`."""

from dataclasses import dataclass

from tyro.conf import Positional

from steersman.commands.options import ComputeOptions, PrintOptions, on_kernels
from steersman.config import part_of
from steersman.files import write_json
from steersman.train import CrosscoderConfig, crosscoder_report
from steersman.train.store.side_by_side import open_sides


@dataclass(frozen=True, kw_only=True)
class CrosscoderCommand(CrosscoderConfig, ComputeOptions, PrintOptions):
    """See which features the hook points of a crosscoder share, such as those of two models, and which only one of them
    has."""

    sae: Positional[str]
    """Folder of the crosscoder."""
    store: tuple[str, ...] = ()
    """Folders of the stores that it was trained on, in their order, to measure it on; of several hook points of one
    store, that store."""
    top: int = 10
    """Features of each kind to show."""
    out: str | None = None
    """Also write the figures, with all features, to this JSON file."""


@on_kernels
def run(config: CrosscoderCommand) -> None:
    """`steersman crosscoder`."""
    sae = config.load_sae(config.sae)
    source = open_sides(config.store, sae.cfg.sides) if config.store and sae.cfg.sides else None
    found = crosscoder_report(sae, source, part_of(CrosscoderConfig, config))
    config.show(lambda: found.to_text(config.top), found.to_json(config.top))
    if config.out is not None:
        write_json(config.out, found.to_json())
