"""Baselines of an SAE that have learned no features, from its own recipe (arXiv 2602.14111).

    frozen decoder         random directions to write, which stay
    soft-frozen decoder    directions to write that stay within a cosine of 0.8 of random ones
    frozen encoder         random directions to read, which stay

What an SAE reaches says that it has found something only where it is better than these. What each holds fast is in
`train/run/frozen.py`.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from steersman.errors import SteersmanError
from steersman.sae import SAE
from steersman.train.run.frozen import Frozen
from steersman.train.run.recipe import TrainConfig
from steersman.train.run.run import train_sae
from steersman.train.store.store import ActivationStore
from steersman.train.store.view import HookView

BASELINES: Mapping[str, Frozen] = {
    "frozen decoder": "decoder",
    "soft-frozen decoder": "soft_decoder",
    "frozen encoder": "encoder",
}
"""What they are called, and what `TrainConfig.frozen` is for each."""


def random_baselines(
    sae: SAE,
    store: ActivationStore,
    out: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    device: str = "auto",
) -> dict[str, SAE]:
    """Train the baselines of `sae` on `store`, each in its own folder below `out`, or read those that are there.

    Width, k, architecture, rates and seed are those of the run that made `sae`, so that the order of rows is the same,
    and so are the first weights, but of a run that began from another SAE. Interrupted, the same call goes on.

    Args:
        sae: an SAE that Steersman trained.
        store: the store that it was trained on, or another of its hook point.
        out: folder for the baselines' run folders.
        tokens: rows to train each on; by default as many as the run had.
        device: where to train.

    Returns:
        name -> SAE, by the names in `BASELINES`.

    Raises:
        SteersmanError: an SAE whose metadata records no training, a store of another hook point or model, and what
            `train_sae` raises.
    """
    training = sae.cfg.metadata.get("training")
    if not isinstance(training, dict):
        raise SteersmanError(
            "this SAE records no training, so its recipe cannot be repeated: baselines are trained for SAEs that "
            "Steersman trained"
        )
    config = replace(TrainConfig.of_run(training), fused_update=None, init=None, device=device)
    config = config if tokens is None else replace(config, tokens=tokens)
    source = HookView(store, store.hook_of(sae))
    return {
        name: train_sae(source, replace(config, frozen=frozen), Path(out) / name.replace(" ", "_"))
        for name, frozen in BASELINES.items()
    }
