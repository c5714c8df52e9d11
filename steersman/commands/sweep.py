"""`steersman sweep`."""

from steersman.parallel import rank_and_world_size
from steersman.train import ActivationStore, SweepConfig, train_many


def run(config: SweepConfig) -> None:
    """`steersman sweep`."""
    trained = train_many(ActivationStore.open(config.store), config.each(), config.out)
    if rank_and_world_size()[0]:
        return  # only rank 0 prints, of the runs that it had a part in
    width = max(map(len, trained), default=0)
    for name, sae in trained.items():
        heldout = sae.cfg.metadata["heldout"]
        measured = f"FVU {heldout['fvu']:.4f}, L0 {heldout['l0']:.1f}, dead {100 * heldout['dead_share']:.2f} %"
        print(f"{name:<{width}}  {measured}")
    print(f"{len(trained)} runs in {config.out}")
