"""The training of an SAE, step by step: `Trainer` holds the weights, the optimiser and the counters.

Inputs are scaled to unit variance per dimension while training, and the scale is folded into the weights at the end.
A step makes no host synchronisation: losses and counters stay on the device and are read every `log_every` steps.

A job of several ranks trains by the same code. Each holds some of the latents and sees its replica's rows; what an
architecture needs of the others goes through `SAE.latents` (`mesh/latents.py`), and what the weights need through the
updater. One process is the mesh of 1 x 1 ranks.

Shape letters: N tokens of a batch, L latents of this rank, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steersman.device import pick_device
from steersman.errors import SteersmanError
from steersman.kernels import ops
from steersman.parallel import Mesh, Ranks
from steersman.sae import SAE, SAEConfig
from steersman.sae.training import Step, TrainingState
from steersman.train.mesh.latents import new_sae
from steersman.train.run.checkpoints import Checkpoints, latent_dim, state_key
from steersman.train.run.dead_latents import DeadLatents
from steersman.train.run.graph import GraphedStep
from steersman.train.run.initial import InitialSAE
from steersman.train.run.inputs import Inputs, make_inputs, restored_inputs
from steersman.train.run.large_rows import LargeRows, largest_ordinary
from steersman.train.run.optim import FusedUpdater, Updater, make_updater
from steersman.train.run.recipe import Recipe, TrainConfig, adam_eps
from steersman.train.store.statistics import ActivationStats

_SUMS = ("squared_error", "aux", "active")
"""What is summed up for the log in every run; further losses come after them, by name."""
_ACTIVE = _SUMS.index("active")


class Trainer:
    """One SAE in training, or this rank's part of it, advanced by `step`. All ranks call its methods together."""

    def __init__(
        self,
        config: TrainConfig,
        recipe: Recipe,
        stats: ActivationStats | Sequence[ActivationStats],
        cfg: SAEConfig,
        ranks: Ranks | None = None,
        inputs: Inputs | None = None,
        initial: InitialSAE | None = None,
    ) -> None:
        """`stats` has the means of the rows that are trained on (see `large_rows.ordinary_stats`), for each hook point
        in the order of their columns where there are several; `cfg` is that of the whole SAE; `ranks` the job's, this
        process alone if not given; `inputs` what rows are to the SAE, by default what the configuration asks for;
        `initial` the SAE to start from, if not from random weights."""
        self.config, self.recipe, self.cfg = config, recipe, cfg
        self.ranks = ranks or Ranks(Mesh())
        self.held = self.ranks.mesh.local_latents(cfg.d_sae)
        """First and end latent whose weights are here."""
        self.owned = self.ranks.mesh.owned_latents(cfg.d_sae)
        """First and end latent that this rank moves."""
        self.device = pick_device(config.device)
        parts = [stats] if isinstance(stats, ActivationStats) else list(stats)
        self.labelled = bool(SAE.architectures[cfg.architecture].supervised)
        """Whether rows come with their label as a last column."""
        limits = _limits(parts, config.max_norm_ratio) + ([(1, math.inf)] if self.labelled else [])
        self.large_rows = LargeRows(limits, self.ranks.data, self.device)
        self.inputs = inputs or make_inputs(cfg, config, parts)
        self.sae = new_sae(cfg, config.seed, self.ranks).to(self.device)
        self.sae.prepare_training(config)
        with torch.no_grad():
            self.sae.b_dec.copy_(self.inputs.scaled_target(self.inputs.target_mean(parts)))
        if initial is not None:
            initial.copy_into(self.sae, self.inputs, self.held)
        self.updater: Updater = make_updater(
            self.sae, config, recipe.lr, self.ranks, adam_eps(recipe.batch_size * cfg.out_width)
        )
        self.ema = {name: p.detach().clone() for name, p in self.updater.parameters.items()} if config.ema else {}
        self.dead_latents = DeadLatents(self.sae.cfg.d_sae, recipe, config.aux_coefficient, self.ranks, self.device)
        self.n_steps_done = 0
        self.between_steps = True
        """Whether no step is half done, so that the state is one to save."""
        self.n_steps_summed = 0
        self.summed = _SUMS
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.device)
        """Losses and active features by the names in `summed`, over `n_steps_summed` steps."""
        self._graph = self._graphed() if config.cuda_graph else None

    def _graphed(self) -> GraphedStep:
        updater, obstacle = self.updater, None
        if self.device.type != "cuda":
            obstacle = "it needs a CUDA device"
        elif not self.sae.host_free:
            obstacle = f"{self.cfg.architecture} reads numbers from the device"
        elif isinstance(updater, FusedUpdater):
            return GraphedStep(self._take_step, self.device, updater.replayed)
        raise SteersmanError(
            f"cuda_graph=True cannot be: {obstacle or 'it needs the fused update'}; use cuda_graph=False"
        )

    # The step

    def without_labels(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows of a batch, and their labels [N] where it has those as its last column."""
        return (rows[:, :-1], rows[:, -1]) if self.labelled else (rows, None)

    def scaled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Input and target of rows [N, D] as the SAE sees them while training: fp32, on the device."""
        return self.inputs.scaled(rows.to(self.device, non_blocking=True).float())

    @torch.no_grad()
    def fit_encoder_scale(self, rows: Tensor) -> None:
        """Scale the encoder so that the first reconstruction of rows [N, D] has the best length.

        With the encoder the transpose of an overcomplete decoder, the K features together overshoot; least squares
        gives the one factor that helps most, and saves the first tenth of a short run.
        """
        rows, _ = self.without_labels(self.large_rows.replaced(rows.to(self.device)))
        sae, (x, target) = self.sae, self.scaled(rows)
        if self.cfg.transcoder and sae.b_enc is not None:  # nothing takes the mean off what is read
            sae.b_enc.copy_(-(self._mean(x) @ sae.W_enc))
        sae.begin_training(x, self.config)
        centred = (target - sae.skip(x) if self.cfg.skip_connection else target) - sae.b_dec
        if self.cfg.transcoder and self.config.frozen not in ("decoder", "soft_decoder"):  # these keep random rows
            self._fit_decoder(x, centred)
        rebuilt = sae.decode_training(sae.encode_training(x)) - sae.b_dec
        products = torch.stack([(centred * rebuilt).sum(), rebuilt.square().sum()])
        along, squared = self.ranks.data.all_reduce_sum_(products)
        factor = along / squared
        sae.scale_code(torch.where(factor.isfinite() & (factor > 0), factor, torch.ones_like(factor)))
        if self.cfg.transcoder:  # averages begin with the rows that were just made
            for name, average in self.ema.items():
                average.copy_(self.updater.parameters[name])
        self.large_rows.n_replaced.zero_()  # no step yet

    def _mean(self, x: Tensor) -> Tensor:
        """The mean [D] of rows [N, D] over the replicas."""
        sums = self.ranks.data.all_reduce_sum_(torch.cat([x.sum(dim=0), x.new_full((1,), len(x))]))
        return sums[:-1] / sums[-1]

    def _fit_decoder(self, x: Tensor, centred: Tensor) -> None:
        """Have each latent of a transcoder write what its activations say of the targets (less their mean) [N, D_out]:
        the direction of their products' sum. Its random encoder row says nothing of it, and a decoder row that is
        random too would first of all be a reason not to fire. A latent that no token uses keeps its row."""
        sae = self.sae
        code = sae.encode_training(x)
        rows = code.order.get().scatter_rows(code.values.detach(), centred)
        rows = self.ranks.data.all_reduce_sum_(rows)
        norms = rows.norm(dim=1, keepdim=True)
        sae.W_dec.copy_(torch.where(norms > 0, rows / norms.clamp_min(torch.finfo(rows.dtype).tiny), sae.W_dec))

    def step(self, rows: Tensor) -> None:
        """One optimiser step on this replica's rows [N, D] of a batch."""
        self.between_steps = False
        self.updater.set_rate(self.recipe.lr * self.recipe.lr_factor(self.n_steps_done))
        if self.large_rows.active:
            rows = self.large_rows.replaced(rows.to(self.device, non_blocking=True))
        aux_shape = self.dead_latents.prepare()
        if self._graph is not None:
            self._graph(rows, aux_shape)
        else:
            self._take_step(rows)
        self.n_steps_done += 1
        self.n_steps_summed += 1
        self.between_steps = True

    def _take_step(self, rows: Tensor) -> None:
        """What the device does in a step, in `grad_accumulation` parts."""
        sae, config = self.sae, self.config
        in_updater = self.updater.scales and self.inputs.is_scale
        scale = self.inputs.scale if in_updater else 1.0
        rows, labels = self.without_labels(rows.to(self.device, non_blocking=True))
        x, target = self.inputs.split(rows) if in_updater else self.scaled(rows)
        fired = torch.zeros(sae.cfg.d_sae, device=self.device)
        aux = self.dead_latents.aux_term()
        state = TrainingState(step=self.n_steps_done, n_steps=self.recipe.n_steps, aux=aux, config=config)
        # Targets have unit variance per dimension, so the loss a number estimates FVU, whatever the batch holds.
        n_values = target.numel() * self.ranks.mesh.data
        n_parts = config.grad_accumulation
        of_parts = [None] * n_parts if labels is None else labels.chunk(n_parts)
        for x_part, target_part, of_part in zip(x.chunk(n_parts), target.chunk(n_parts), of_parts):
            state = state if of_part is None else replace(state, labels=of_part)
            step = self.updater.backward(x_part, target_part, n_values, state, scale)
            self._add(step)
            n_active = self.sums[_ACTIVE : _ACTIVE + 1]
            ops.mark_active(step.code.values, step.code.order.indices, fired, n_active)
            sae.after_step(step, state)
        self.updater.step()
        for name, average in self.ema.items():
            average.lerp_(self.updater.parameters[name].detach(), 1 - config.ema)
        self.dead_latents.step_done(fired)

    # What is logged

    def _add(self, step: Step) -> None:
        losses = {name: value.detach() for name, value in {**step.losses, **step.logged}.items()}
        if step.losses.keys() - set(_SUMS):
            losses["loss"] = step.loss.detach()
        further = tuple(name for name in losses if name not in self.summed)
        if further:
            self.summed += further
            self.sums = torch.cat([self.sums, self.sums.new_zeros(len(further))])
        for name, value in losses.items():
            self.sums[self.summed.index(name)].add_(value)

    def _sums_of_ranks(self) -> Tensor:
        """`sums` over all ranks: losses are those of a replica's rows, active features those of a rank's latents."""
        sums, active = self.ranks.data.all_reduce_sum_(self.sums.clone()), slice(_ACTIVE, _ACTIVE + 1)
        sums[active] = self.ranks.latent.all_reduce_sum_(sums[active].clone())
        return sums

    def read_metrics(self) -> dict[str, float]:
        """Losses over the steps since the last reading: the one place where the host waits for the device."""
        n_tokens = max(1, self.n_steps_summed) * self.recipe.batch_size
        means = dict(zip(self.summed, (self._sums_of_ranks() / n_tokens).tolist()))
        self.sums.zero_()
        self.n_steps_summed = 0
        a_number = {name: mean / self.cfg.out_width for name, mean in means.items() if name != "active"}
        fvu, aux, loss = a_number.pop("squared_error"), a_number.pop("aux"), a_number.pop("loss", None)
        loss = fvu + self.config.aux_coefficient * aux if loss is None else loss
        if not math.isfinite(loss):
            raise SteersmanError(
                f"the loss is not finite at step {self.n_steps_done}; try a lower --lr (it was {self.recipe.lr:.2g})"
            )
        dead = self.dead_latents.fraction()
        metrics = {"loss": loss, "fvu": fvu, "aux": aux, "l0": means["active"], "dead_share": dead} | a_number
        if self.large_rows.active:
            metrics["rows_left_out"] = self.large_rows.total()
        return metrics

    # What is saved

    def _state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as named tensors. Of what belongs to latents, the part that this rank
        moves; the rest on rank 0 alone."""
        sums = self._sums_of_ranks()
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        tensors |= self.updater.state()
        tensors |= {f"ema.{state_key(name)}": value for name, value in self.ema.items()}
        tensors |= self.inputs.tensors() | self.dead_latents.state() | {"sums": sums[: len(_SUMS)]}
        tensors |= {f"sums.{name}": value for name, value in zip(self.summed[len(_SUMS) :], sums[len(_SUMS) :])}
        tensors["rng"] = torch.get_rng_state()
        if self.large_rows.active:
            tensors["rows_left_out"] = torch.tensor([self.large_rows.total()])
        own = {}
        for name, tensor in tensors.items():
            dim = latent_dim(self.sae, name, tensor)
            if dim is not None and _of_held(name):
                tensor = tensor.narrow(dim, self.owned[0] - self.held[0], self.owned[1] - self.owned[0])
            if dim is not None or self.ranks.is_rank_zero:
                own[name] = tensor
        return own

    def state_bytes(self) -> int:
        """Bytes that this rank writes in a checkpoint."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._state().values())

    def weight_bytes(self) -> int:
        """Bytes of the weights that this rank moves."""
        whole = sum(tensor.numel() * tensor.element_size() for tensor in self.sae.state_dict().values())
        return whole * (self.owned[1] - self.owned[0]) // max(1, self.held[1] - self.held[0])

    def save(self, checkpoints: Checkpoints) -> None:
        """Have the state written as a checkpoint, in the background."""
        tensors = self._state()
        axes = {name: latent_dim(self.sae, name, tensor) for name, tensor in tensors.items()}
        state = {"step": self.n_steps_done, "sae": self.cfg.record() | {"metadata": self.cfg.metadata}}
        state |= self.inputs.record() | {"axes": {name: axis for name, axis in axes.items() if axis is not None}}
        if self.n_steps_summed != self.n_steps_done % self.config.log_every:  # since `log_every` was changed
            state["steps_summed"] = self.n_steps_summed
        checkpoints.save(self.n_steps_done, tensors, self.owned, state)

    def resume(self, checkpoints: Checkpoints) -> bool:
        """Restore the newest checkpoint; False when there is none."""
        newest = checkpoints.load(lambda name: self.held if _of_held(name) else self.owned)
        if newest is None:
            return False
        with checkpoints.naming(newest[1]["step"]):
            self._restore(*newest)
        return True

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        for name, value in self.sae.state_dict().items():
            value.copy_(tensors[f"sae.{name}"])
        for name, average in self.ema.items():
            average.copy_(tensors[f"ema.{state_key(name)}"])
        self.updater.restore(tensors)
        self.dead_latents.restore(tensors["silent_steps"], tensors.get("late_counts"))
        further = [name for name in tensors if name.startswith("sums.")]
        self.summed = (*_SUMS, *(name.removeprefix("sums.") for name in further))
        sums = torch.cat([tensors["sums"], *(tensors[name][None] for name in further)])
        # They are those of all ranks: losses count once a replica, active features once a rank.
        active = sums[_ACTIVE].clone()
        sums *= self.ranks.mesh.data_index == 0
        sums[_ACTIVE] = active if self.ranks.is_rank_zero else 0
        self.sums = sums.to(self.device)
        if "rows_left_out" in tensors and self.ranks.mesh.data_index == 0:
            self.large_rows.n_replaced.copy_(tensors["rows_left_out"])
        self.inputs = restored_inputs(self.cfg, state, tensors)
        self.n_steps_done = state["step"]
        log_every = state["sae"]["metadata"].get("training", {}).get("log_every", self.config.log_every)
        self.n_steps_summed = state.get("steps_summed", self.n_steps_done % log_every)
        torch.set_rng_state(tensors["rng"])

    @torch.no_grad()
    def finish(self) -> SAE:
        """This rank's latents of the trained SAE, for inputs as they are: averaged if asked, the scale folded in."""
        for name, average in self.ema.items():
            self.updater.parameters[name].copy_(average)
        if self.ema:
            self.updater.share_weights()
        self.sae.normalize_decoder()
        self.inputs.fold(self.sae)
        return self.sae


def _limits(parts: list[ActivationStats], ratio: float | None) -> list[tuple[int, float]]:
    """Width and largest norm of an ordinary row of each hook point; no bound where no row there is passes it."""
    limits = [(stats, largest_ordinary(stats, ratio)) for stats in parts]
    return [
        (len(stats.mean), math.inf if stats.all_rows and stats.max_norm <= limit else limit) for stats, limit in limits
    ]


def _of_held(name: str) -> bool:
    """Whether a tensor of the state has all latents whose weights are here, and not only those that this rank moves."""
    return name.startswith(("sae.", "silent"))
