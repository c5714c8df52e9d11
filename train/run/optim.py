"""How a step's gradients reach the weights: the part of training that may be exchanged.

`Trainer` sets an updater's learning rate, gives it each part of a batch (`backward`) and then has it move the weights
(`step`). The ordinary updaters are autograd and an optimiser on dense gradients; `FusedUpdater` does all of it in one
pass of the kernels. `make_updater` chooses.

On several ranks, those that share the latents need nothing of each other here but the norm of a clipped gradient.
Replicas sum their gradients and each moves an equal part of its latents (as ZeRO does, arXiv 1910.02054), so that
optimiser state is never held twice.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import UpdateRule, UpdateState, choose, collect_row_gradients, ops
from steersman.kernels.operands import versions
from steersman.kernels.update import PART, StepSizes, apply_rule, move_b_dec, update_matrix, update_vector
from steersman.parallel import Mesh, Ranks
from steersman.sae import SAE
from steersman.sae.fused import FusedBatch, Gradients, product
from steersman.sae.training import Step, TrainingCode, TrainingState
from steersman.train.run.checkpoints import PARAMETERS, state_key
from steersman.train.run.frozen import Held
from steersman.train.run.recipe import TrainConfig

TRANSCODER_BIASES = 0.1
"""Learning rate of a transcoder's biases in units of what others' have. Nothing is taken off its input, so the
encoder's biases hold the latents' distances from the mean row, and at the full rate they silence many of them."""


def parameters_of(sae: SAE) -> dict[str, Tensor]:
    """The trained tensors by name, in the order in which states list them."""
    named: dict[str, Tensor] = dict(sae.named_parameters())
    return {name: named[name] for name in PARAMETERS if name in named} | named


class Updater(Protocol):
    """Moves the weights of an SAE; its state is named tensors, so that a resumed run gives the same bits."""

    parameters: dict[str, Tensor]
    """What it moves: the SAE's parameters or, where replicas divide their latents, views of this rank's part."""

    def set_rate(self, lr: float) -> None:
        """The learning rate of the next `step`."""
        ...

    scales: bool
    """Whether it scales the rows of a batch itself, as it reads them."""

    def backward(self, x: Tensor, target: Tensor, n_values: int, state: TrainingState, scale: float = 1.0) -> Step:
        """Take the gradients of a part, `scale` x [N, D] and target [N, D_out], of a batch whose targets are `n_values`
        numbers. What does not scale rows itself is given scaled ones, and a scale of 1."""
        ...

    def step(self) -> None:
        """Move the weights by the gradients taken since the last call; decoder rows are unit vectors afterwards."""
        ...

    def share_weights(self) -> None:
        """Give the other replicas the latents that this rank moves."""
        ...

    def state(self) -> dict[str, Tensor]: ...
    def restore(self, tensors: dict[str, Tensor]) -> None: ...


def make_updater(
    sae: SAE, config: TrainConfig, lr: float, ranks: Ranks | None = None, eps: float = UpdateRule.eps
) -> Updater:
    """The updater that the configuration asks for; lr is the peak learning rate, eps Adam's (see `recipe.adam_eps`)."""
    ranks = ranks or Ranks(Mesh())
    check_ranks(config, ranks.mesh)
    if sae.cfg.transcoder:
        config = replace(config, bias_lr_ratio=config.bias_lr_ratio * TRANSCODER_BIASES)
    fused = config.fused_update
    if fused is None:
        possible = (
            ranks.mesh.data == 1
            and sae.fused
            and sae.cfg.out_width == sae.cfg.d_in
            and config.grad_clip is None
            and config.grad_accumulation == 1
            and config.frozen is None
        )
        fused = possible and hasattr(choose(sae.device), "backward_update")
    if fused and sae.cfg.out_width != sae.cfg.d_in:
        raise SteersmanError(
            f"the fused update moves rows of one width, and this transcoder reads {sae.cfg.d_in} and predicts "
            f"{sae.cfg.out_width} numbers: use fused_update=False"
        )
    if fused:
        return FusedUpdater(sae, config, ranks, eps)
    if config.optimizer == "adam" and config.state_dtype == "float32":
        return AutogradUpdater(sae, config, lr, ranks, eps)
    return RuleUpdater(sae, config, ranks, eps)


def check_ranks(config: TrainConfig, mesh: Mesh) -> None:
    """Raise a SteersmanError where several processes are to train one SAE in a way that they cannot."""
    if config.cuda_graph and mesh.world_size > 1:
        raise SteersmanError("cuda_graph=True trains in one process only: use cuda_graph=False on several")
    if mesh.data == 1:  # a latent and its gradient are on one of them
        return
    instead = f"of {mesh.data} replicas: let all ranks share the latents (latent_shards={mesh.world_size}), or use"
    if config.fused_update:
        raise SteersmanError(f"the fused update has no gradient to be summed {instead} fused_update=False")
    if config.optimizer != "adam" or config.state_dtype != "float32":
        raise SteersmanError(
            f"optimizer={config.optimizer} with state_dtype={config.state_dtype} has no state to be divided {instead} "
            "optimizer=adam and state_dtype=float32"
        )


class _DenseGradients:
    """Gradients by autograd: summed over replicas, projected and clipped. A subclass moves the weights by them."""

    scales = False

    def __init__(self, sae: SAE, config: TrainConfig, ranks: Ranks):
        self.sae, self.config, self.ranks, self.lr = sae, config, ranks, 0.0
        self.parameters = parameters_of(sae)
        if ranks.data.size > 1:
            size = sae.cfg.d_sae // ranks.data.size
            for name, parameter in self.parameters.items():
                dim = sae.latent_dim(name)
                view = parameter.detach()
                self.parameters[name] = view if dim is None else view.narrow(dim, ranks.data.index * size, size)
        self.held = Held(config.frozen, self.parameters)
        for name in self.held.names:
            parameters_of(sae)[name].requires_grad_(False)

    def set_rate(self, lr: float) -> None:
        self.lr = lr

    def backward(self, x: Tensor, target: Tensor, n_values: int, state: TrainingState, scale: float = 1.0) -> Step:
        target = target - self.sae.skip(x) if self.sae.cfg.skip_connection else target
        with collect_row_gradients() as few:
            step = self.sae.training_step(x, target, state)
        (step.loss / n_values).backward()
        for one in few:
            one.add()
        return step

    @torch.no_grad()
    def step(self) -> None:
        """Project the decoder's gradient off its rows, clip, move, and make the rows unit vectors again."""
        if self.ranks.data.size > 1:
            self._reduce_gradients()
        self.held.without_gradient(self.parameters)
        W_dec = self.parameters["W_dec"]
        grad = W_dec.grad
        if grad is not None:  # moving along a unit row would only be undone below
            for g, w in zip(_row_blocks(grad), _row_blocks(W_dec)):
                g.sub_((g * w).sum(dim=1, keepdim=True) * w)
        if self.config.grad_clip is not None:
            self._clip(self.config.grad_clip)
        self._move()
        for parameter in self.parameters.values():
            parameter.grad = None
        for w in _row_blocks(W_dec) if "W_dec" not in self.held.names else ():
            w /= w.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self.held.project(W_dec)
        self.share_weights()

    def _move(self) -> None:
        """Move the parameters by their gradients."""
        raise NotImplementedError  # each subclass defines it

    def _reduce_gradients(self) -> None:
        """Sum the gradients over the replicas; each keeps those of the latents it moves."""
        data = self.ranks.data
        for name, whole in parameters_of(self.sae).items():
            dim, grad = self.sae.latent_dim(name), _gradient(whole)
            if dim is None:
                self.parameters[name].grad = data.all_reduce_sum_(grad)
            else:
                self.parameters[name].grad = data.reduce_scatter_sum(grad.movedim(dim, 0)).movedim(0, dim)
        self.sae.zero_grad(set_to_none=True)

    def _clip(self, largest: float) -> None:
        if self.ranks.world.size == 1:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), largest)
            return
        squares = {name: _gradient(p).square().sum() for name, p in self.parameters.items()}
        of_latents = sum(
            (square for name, square in squares.items() if self.sae.latent_dim(name) is not None),
            self.parameters["W_dec"].new_zeros(()),
        )
        norm = self.ranks.world.all_reduce_sum_(of_latents)
        for name, square in squares.items():
            norm = norm if self.sae.latent_dim(name) is not None else norm + square
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_((largest / (norm.sqrt() + 1e-6)).clamp(max=1.0))

    @torch.no_grad()
    def share_weights(self) -> None:
        """See `Updater`. (What does not belong to latents all of them moved.)"""
        if self.ranks.data.size == 1:
            return
        waiting = []
        for name, whole in parameters_of(self.sae).items():
            dim = self.sae.latent_dim(name)
            if dim is not None:
                part = self.parameters[name].movedim(dim, 0)
                waiting.append((whole.movedim(dim, 0), self.ranks.data.all_gather_later(part)))
        for whole, finish in waiting:
            whole.copy_(finish().flatten(0, 1))


def _row_blocks(matrix: Tensor) -> Sequence[Tensor]:
    """The matrix [L, D] in parts whose temporaries stay in a CPU's cache; whole on other devices."""
    return matrix.split(256 if matrix.device.type == "cpu" else max(1, len(matrix)))


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class AutogradUpdater(_DenseGradients):
    """Autograd and `torch.optim.Adam`, on dense gradients."""

    def __init__(self, sae: SAE, config: TrainConfig, lr: float, ranks: Ranks, eps: float):
        super().__init__(sae, config, ranks)
        # Rows in one piece, as they lie in memory: the fused Adam would copy the gradient of a transposed matrix.
        self._moved = {name: _in_one_piece(p) for name, p in self.parameters.items() if name not in self.held.names}
        matrices = [p for p in self._moved.values() if p.dim() > 1]
        biases = [p for p in self._moved.values() if p.dim() <= 1]
        groups = [{"params": matrices, "ratio": 1.0}, {"params": biases, "ratio": config.bias_lr_ratio}]
        self.optimizer = torch.optim.Adam(groups, lr=lr, betas=config.betas, eps=eps, fused=True)

    def _move(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["ratio"]
        for name, moved in self._moved.items():
            grad = self.parameters[name].grad
            moved.grad = None if grad is None else _like(self.parameters[name], moved, grad)
        self.optimizer.step()
        for moved in self._moved.values():
            moved.grad = None

    def state(self) -> dict[str, Tensor]:
        return {
            f"adam.{state_key(name)}.{kind}": _like(self.parameters[name], moved, value)
            for name, moved in self._moved.items()
            for kind, value in self.optimizer.state[moved].items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if "rule.n_steps" in tensors:
            tensors = _adam_of_rule(tensors)
        for name, moved in self._moved.items():
            key, parameter = f"adam.{state_key(name)}", self.parameters[name]
            moments = {kind: _like(parameter, moved, tensors[f"{key}.{kind}"]) for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[moved] = {"step": tensors[f"{key}.step"].to(moved.device)} | {
                kind: torch.empty_like(moved).copy_(value) for kind, value in moments.items()
            }


def _in_one_piece(parameter: Tensor) -> Tensor:
    """The parameter, or the transpose of a matrix that is stored as such."""
    parameter = parameter.detach()
    return parameter.T if parameter.dim() == 2 and parameter.stride(0) == 1 else parameter


def _like(parameter: Tensor, moved: Tensor, value: Tensor) -> Tensor:
    """What belongs to a parameter as it belongs to what is moved, and back."""
    return value.T if value.dim() == 2 and moved.stride() != parameter.stride() else value


# A run left free to choose its updater may be resumed where another one is chosen: Adam's state has two forms.


def _adam_of_rule(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, m in tensors.items():
        name = key.removeprefix("rule.").removesuffix(".m")
        if key != f"rule.{name}.m":
            continue
        for kind, moment in {"exp_avg": m, "exp_avg_sq": tensors[f"rule.{name}.v"]}.items():
            found[f"adam.{state_key(name)}.{kind}"] = moment.T if name == "W_enc" else moment
        found[f"adam.{state_key(name)}.step"] = tensors["rule.n_steps"][0].float()
    return found


def _rule_of_adam(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"rule.n_steps": tensors["adam.0.step"].reshape(1).int()}
    for key, value in tensors.items():
        kind, _, of = key.partition(".")
        of, _, moment = of.rpartition(".")
        if kind == "adam" and moment != "step":
            name = PARAMETERS[int(of)] if of.isdigit() else of
            found[f"rule.{name}.{_MOMENTS[moment]}"] = value.T if name == "W_enc" else value
    return found


_MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}
"""What a rule calls the moments of `torch.optim.Adam`."""


class _WithRule:
    """What updaters with a `kernels.UpdateRule` share: the rule and its state, which holds the SAE's own weights.

    Parameters beyond the four of every architecture (thresholds, gates) are moved beside those by the plain form of the
    same rule: matrices at the rate of the weights, vectors at that of the biases, with moments in fp32. Under a
    touched-only rule an entry that belongs to a latent moves where it has a gradient.
    """

    def _start(self, sae: SAE, config: TrainConfig, operands: torch.dtype, ranks: Ranks, eps: float) -> None:
        if lacking := [name for name in PARAMETERS if name not in parameters_of(sae)]:
            raise SteersmanError(
                f"{sae.name} has no {', '.join(lacking)}, which optimizer={config.optimizer} with "
                f"state_dtype={config.state_dtype} moves: use optimizer=adam and state_dtype=float32"
            )
        beta1, beta2 = config.betas
        self.rule = UpdateRule(name=config.optimizer, beta1=beta1, beta2=beta2, eps=eps, state_dtype=config.state_dtype)
        parameters = {name: parameter.detach() for name, parameter in parameters_of(sae).items()}
        W_enc, W_dec, b_enc, b_dec = (parameters.pop(name) for name in PARAMETERS)
        first, _ = ranks.mesh.local_latents(sae.whole_cfg.d_sae)
        self.state_of_rule = UpdateState.of(W_enc.T, W_dec, b_enc, b_dec, self.rule, operands, first)
        self._further = parameters
        self._further_moments = {
            name: {kind: torch.zeros_like(parameter) for kind in ("m", "v")[: 1 + self.rule.adam]}
            for name, parameter in parameters.items()
        }
        self._of_latents = {name for name in parameters if sae.latent_dim(name) is not None}

    def _move_further(self, gradients: Mapping[str, Tensor], sizes: StepSizes) -> None:
        """Move the further parameters by the gradients of their names."""
        for name, parameter in self._further.items():
            grad, moments = gradients.get(name), self._further_moments[name]
            grad = torch.zeros_like(parameter) if grad is None else grad
            size = sizes.weights if parameter.dim() > 1 else sizes.biases
            new = apply_rule(parameter, grad, moments["m"], moments.get("v"), self.rule, size, sizes.inverse_root)
            moving = grad != 0 if self.rule.touched_only and name in self._of_latents else None
            for old, fresh in zip((parameter, *moments.values()), new):
                if fresh is not None:
                    old.copy_(fresh if moving is None else torch.where(moving, fresh, old))

    def _tensors(self) -> dict[str, Tensor]:
        """The state's own tensors, by name."""
        further = {f"{name}.{kind}": m for name, each in self._further_moments.items() for kind, m in each.items()}
        return self.state_of_rule.state() | further

    def state(self) -> dict[str, Tensor]:
        return {f"rule.{name}": value for name, value in self._tensors().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if "adam.0.step" in tensors:
            tensors = _rule_of_adam(tensors)
        for name, value in self._tensors().items():
            value.copy_(tensors[f"rule.{name}"])
        self.state_of_rule.refresh()


class RuleUpdater(_WithRule, _DenseGradients):
    """Autograd and any rule of `kernels.update`, on dense gradients. A feature is touched when it has one."""

    def __init__(self, sae: SAE, config: TrainConfig, ranks: Ranks, eps: float):
        super().__init__(sae, config, ranks)
        self._start(sae, config, torch.float32, ranks, eps)

    def _move(self) -> None:
        state, rule = self.state_of_rule, self.rule
        gradients = {name: _gradient(parameter) for name, parameter in self.parameters.items()}
        W_enc, W_dec, b_enc, b_dec = (gradients[name] for name in PARAMETERS)
        state.n_steps.add_(1)
        rate = torch.full((1,), self.lr, device=state.n_steps.device)
        sizes = StepSizes.of(rule, state.n_steps, rate, rate * self.config.bias_lr_ratio)
        touched = (b_enc != 0) | (W_dec != 0).any(dim=1)
        for name, grad, seed in (("W_enc", W_enc.T, 0), ("W_dec", W_dec, 1)):
            if name in self.held.names:
                continue
            W = getattr(state, name)
            update_matrix(
                W, W, grad, state.moments[name], touched, rule, sizes, 2 * state.n_steps + seed, unit=name == "W_dec",
                first=state.first_latent,
            )  # fmt: skip
        moving = touched if rule.touched_only else None
        update_vector(state.b_enc, b_enc, state.moments["b_enc"], moving, rule, sizes.biases, sizes.inverse_root)
        update_vector(state.b_dec, b_dec, state.moments["b_dec"], None, rule, sizes.biases, sizes.inverse_root)
        self._move_further(gradients, sizes)


class FusedUpdater(_WithRule):
    """Gradients, optimiser and normalisation in one pass of the kernels: no dense gradient, no autograd.

    What the gradients are the architecture says (`SAE.fused_gradients`, `sae/fused.py`): here they reach the weights.
    Products read bf16 copies of the weights on a GPU, which the pass writes as it goes, and the weights themselves on a
    CPU. A batch comes in one part, and nothing waits for the device.

    Ranks that share the latents each do it for theirs, as every rank has the residual. They send each other their parts
    of the reconstruction and of the gradient that b_dec has through the encoder. The latter are added as one process
    adds them where a rank has a multiple of `kernels.update.PART` latents; so all weights get the same bits from the
    same residual and dot products. (The reconstruction itself is added by rank, which moves its last bits.)
    """

    scales = True

    def __init__(self, sae: SAE, config: TrainConfig, ranks: Ranks, eps: float):
        self.sae, self.config, self.parameters = sae, config, parameters_of(sae)
        self._latent = ranks.latent
        self.operands = torch.float32 if sae.device.type == "cpu" else torch.bfloat16
        self._start(sae, config, self.operands, ranks, eps)
        self.lr, self.bias_lr = (torch.zeros(1, device=sae.device) for _ in range(2))
        self._versions: tuple[int, ...] = ()
        self._taken: tuple[Tensor, TrainingCode, Gradients] | None = None

    def set_rate(self, lr: float) -> None:
        """See `Updater`. Written to the device, where a CUDA graph reads it. Rows that products read are made again
        here, before the step, if something else than `step` wrote to the weights."""
        if self._weights_changed():
            self.state_of_rule.refresh()
        self.lr.fill_(lr)
        self.bias_lr.fill_(lr * self.config.bias_lr_ratio)

    def _weights_changed(self) -> bool:
        """Whether something else than `step` wrote to the weights since the last call."""
        now = versions(self.sae.W_enc, self.sae.W_dec)
        changed, self._versions = now != self._versions, now
        return changed

    @torch.no_grad()
    def backward(self, x: Tensor, target: Tensor, n_values: int, state: TrainingState, scale: float = 1.0) -> Step:
        weights = self.state_of_rule
        bias, skips = None if self.sae.input_bias is None else weights.b_dec, self.sae.cfg.skip_connection
        centred = ops.centre(x, scale, bias, self.operands)
        if skips:  # of a transcoder alone, whose rows come scaled and of whose input nothing is subtracted
            target = target - product(centred, self.sae.W_skip.T.to(self.operands))
        batch = FusedBatch(
            x=centred, target=target, scale=scale, n_values=n_values, weights=weights, state=state
        )  # fmt: skip
        step, gradients = self.sae.fused_gradients(batch)
        if skips:
            d_skip = gradients.scale * product(gradients.residual[: len(centred)].T, centred)
            gradients = gradients._replace(further={**gradients.further, "W_skip": d_skip})
        self._taken = batch.x, step.code, gradients
        return step

    @torch.no_grad()
    def step(self) -> None:
        """Take the gradients of what `backward` was given and move the weights by them."""
        assert self._taken is not None, "backward comes before step"
        state, centred, (x, code, gradients) = self.state_of_rule, self.sae.input_bias is not None, self._taken
        residual, scale, parts = gradients.residual, gradients.scale, None
        if centred and self._latent.size > 1:
            parts = residual.new_empty(-(-len(state.W_enc) // PART), residual.shape[1], dtype=torch.float32)
        ops.backward_update(
            state, self.rule, self.lr, self.bias_lr, residual, scale, x, code.values, code.order.indices,
            gradients.dots, gradients.aux, centred_by_b_dec=centred, signed=self.sae.signed, parts=parts,
            rows=gradients.rows,
        )  # fmt: skip
        if parts is not None:
            move = getattr(choose(residual.device), "move_b_dec", move_b_dec)
            every = self._latent.all_gather(parts).flatten(0, 1)
            move(state, self.rule, self.lr, self.bias_lr, residual[: len(x)], scale, every)
        if self._further:
            sizes = StepSizes.of(self.rule, state.n_steps, self.lr, self.bias_lr)
            self._move_further(gradients.further, sizes)
        self._taken = None
        self._weights_changed()

    def replayed(self) -> None:
        """A CUDA graph has done what `backward` and `step` do on the device, of which it does not inform PyTorch."""
        for parameter in self.parameters.values():
            torch.autograd.graph.increment_version(parameter)
        self._weights_changed()

    def share_weights(self) -> None:
        """Nothing: nobody else has this rank's latents."""
