"""`steersman sweep`."""

from dataclasses import dataclass, replace

from steersman.commands.options import PrintOptions, heldout_line, hook_points, training_record
from steersman.config import part_of
from steersman.parallel import rank_and_world_size
from steersman.train import ActivationStore, SweepConfig, train_many


@dataclass(frozen=True, kw_only=True)
class SweepCommand(SweepConfig, PrintOptions):
    """Train many SAEs on one store, which is read once for all that can share it: one for each combination of what the
    lists say, or those of a file. All other settings are the same for all."""

    layers: tuple[int, ...] = ()
    """Layers in place of --hooks: the states after them, counted from 0."""


def run(config: SweepCommand) -> None:
    """`steersman sweep`."""
    settings = replace(part_of(SweepConfig, config), hooks=hook_points(config.hooks, config.layers, None))
    trained = train_many(ActivationStore.open(config.store), settings.each(), config.out)
    if rank_and_world_size()[0]:
        return  # only rank 0 prints, of the runs that it had a part in
    width = max(map(len, trained), default=0)
    lines = [f"{name:<{width}}  {heldout_line(sae)}" for name, sae in trained.items()]
    records = [{"name": name, **training_record(sae, f"{config.out}/{name}")} for name, sae in trained.items()]
    config.show(lambda: "\n".join([*lines, f"{len(trained)} runs in {config.out}"]), records)
