"""`steersman sweep`."""

from steersman.commands.options import heldout_line
from steersman.parallel import rank_and_world_size
from steersman.train import ActivationStore, SweepConfig, train_many


def run(config: SweepConfig) -> None:
    """`steersman sweep`."""
    trained = train_many(ActivationStore.open(config.store), config.each(), config.out)
    if rank_and_world_size()[0]:
        return  # only rank 0 prints, of the runs that it had a part in
    width = max(map(len, trained), default=0)
    for name, sae in trained.items():
        print(f"{name:<{width}}  {heldout_line(sae)}")
    print(f"{len(trained)} runs in {config.out}")
