"""SAEs of other libraries' trainers, on the rows that `train_sae` trains on, in the same order and batches.

Each library takes the steps that its own trainer takes, with that trainer's optimiser and losses at their defaults; the
learning rate is given, and what depends on the length of a run is set for this one where the default is of runs of
millions of rows:

    sae-lens       `SAETrainer.step`: Adam, decoder norms in the code, AuxK. The rate falls to a tenth over the last
                   fifth of the steps, features count as dead after 1 % of them, the inputs' scale is taken from 20
                   batches.
    eai-sparsify   as in its `Trainer.fit`: FVU, sign descent without a schedule (schedule-free, momentum 0.95), decoder
                   rows of unit norm; no AuxK.

Rows of huge norm (attention sinks) are replaced by others of their batch, as `train_sae` does: they would set the scale
of the inputs and most of the loss of the other libraries too.
"""

import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import torch
from torch import Tensor

from steersman import SAE, SteersmanError
from steersman.train import ActivationStore, HookView

Source = ActivationStore | HookView


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """One run of another library's trainer."""

    library: str
    """One of `PEERS`."""
    d_sae: int
    """Features."""
    k: int
    """Active features a token, on average where the architecture is not told."""
    lr: float
    """Learning rate."""
    batch_size: int
    """Rows a step."""
    n_steps: int
    """Steps."""
    architecture: str = "topk"
    """Of sae-lens also batchtopk."""
    seed: int = 0
    """Of the first weights and of the order of rows."""


def rows_again(source: Source, batch_size: int, seed: int) -> Iterator[Tensor]:
    """The batches [N, D] of `train_sae`, pass after pass, fp32."""
    limit = source.stats().large_norm
    for epoch in count():
        for batch in source.batches(batch_size, seed=seed, epoch=epoch):
            yield ordinary(batch.x.float(), limit)


def ordinary(x: Tensor, limit: float) -> Tensor:
    """Rows [N, D] with the first ones of them in the places of those that are longer than `limit`."""
    large = x.norm(dim=1) > limit
    if not large.any() or large.all():
        return x
    places = (~large).nonzero()[:, 0]
    x = x.clone()
    x[large] = x[places[torch.arange(int(large.sum())) % len(places)]]
    return x


class PeerTrainer(ABC):
    """An SAE of another library in training."""

    module: ClassVar[str]
    """The module that the library is imported as."""
    rates: ClassVar[tuple[float, float]]
    """Two learning rates to try, the more usual one first."""

    @abstractmethod
    def step(self, x: Tensor) -> None:
        """One step on rows [N, D]."""

    @abstractmethod
    def save(self, folder: str) -> None:
        """Write the trained SAE in the library's own format."""


class SAELensTrainer(PeerTrainer):
    """sae-lens."""

    module = "sae_lens"
    rates = (3e-3, 1e-2)

    def __init__(self, config: PeerConfig, source: Source) -> None:
        from sae_lens import (  # pyright: ignore[reportMissingImports]
            BatchTopKTrainingSAE,
            BatchTopKTrainingSAEConfig,
            TopKTrainingSAE,
            TopKTrainingSAEConfig,
        )
        from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

        kinds: dict[str, Any] = {
            "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
            "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
        }
        kind, settings_of = kinds[config.architecture]
        settings = settings_of(
            d_in=source.d_in, d_sae=config.d_sae, k=config.k, normalize_activations="expected_average_only_in",
            device="cpu",
        )  # fmt: skip
        torch.manual_seed(config.seed)
        steps, batch = config.n_steps, config.batch_size
        self._trainer: Any = SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=steps * batch, train_batch_size_samples=batch, lr=config.lr,
                lr_end=config.lr / 10, lr_decay_steps=steps // 5, dead_feature_window=max(10, steps // 100),
            ),
            sae=kind(settings),
            data_provider=iter(()),
        )  # fmt: skip
        norms = [x.norm(dim=1).mean() for x in islice(rows_again(source, batch, config.seed), 20)]
        self._trainer.activation_scaler.scaling_factor = source.d_in**0.5 / float(torch.stack(norms).mean())

    def step(self, x: Tensor) -> None:
        self._trainer.step(x)
        self._trainer.n_training_steps += 1

    def save(self, folder: str) -> None:
        sae, scaler = self._trainer.sae, self._trainer.activation_scaler
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
        sae.save_inference_model(folder)


class SparsifyTrainer(PeerTrainer):
    """eai-sparsify. Its own rate for signum is 5e-3 / sqrt(d_sae / 16384): 7.1e-3 at 8,192 features."""

    module = "sparsify"
    rates = (7e-3, 2e-3)

    def __init__(self, config: PeerConfig, source: Source) -> None:
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
        from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]
        from sparsify.trainer import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]

        if config.architecture != "topk":
            raise SteersmanError(f"{config.library} trains topk, not {config.architecture}")
        torch.manual_seed(config.seed)
        self._sae: Any = SparseCoder(source.d_in, SparseCoderConfig(num_latents=config.d_sae, k=config.k))
        self._optimizer: Any = ScheduleFreeWrapper(SignSGD(self._sae.parameters(), lr=config.lr), momentum=0.95)
        self._optimizer.train()
        self._begun = False
        self._fired = torch.zeros(config.d_sae, dtype=torch.bool)
        self._since_fired = torch.zeros(config.d_sae, dtype=torch.long)

    def step(self, x: Tensor) -> None:
        sae = self._sae
        if not self._begun:
            sae.b_dec.data = x.mean(0)
            self._begun = True
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, x, total_variance=(x - x.mean(0)).pow(2).sum())
        self._fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._since_fired += len(x)
        self._since_fired[self._fired] = 0
        self._fired.zero_()

    def save(self, folder: str) -> None:
        self._optimizer.eval()  # the average, which is what its trainer saves
        self._sae.save_to_disk(folder)


PEERS: dict[str, Any] = {"eai-sparsify": SparsifyTrainer, "sae-lens": SAELensTrainer}
"""The trainers by the names of their packages."""


def installed() -> list[str]:
    """Those of `PEERS` that are there."""
    return [name for name, kind in PEERS.items() if find_spec(kind.module)]


def peer_trainer(config: PeerConfig, source: Source) -> PeerTrainer:
    """A trainer that has taken no step yet. Raises a SteersmanError for a library that is not there."""
    if config.library not in installed():
        raise SteersmanError(f"{config.library} is not installed: pip install steersman[peers]")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    return PEERS[config.library](config, source)


def train_peer(source: Source, config: PeerConfig, out: Path) -> SAE:
    """An SAE of another library's trainer, read from the files that it writes and kept in the folder `out`; one that
    is there is read."""
    if not (out / "cfg.json").exists():
        trainer = peer_trainer(config, source)
        for x in islice(rows_again(source, config.batch_size, config.seed), config.n_steps):
            trainer.step(x)
        with tempfile.TemporaryDirectory() as own:
            trainer.save(own)
            sae = SAE.load(own)
        sae.cfg = replace(sae.cfg, hook_name=source.hook_name, model_name=source.model_name)
        sae.save(out)
    return SAE.load(out)
