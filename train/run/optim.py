"""How a step's gradients reach the weights: the part of training that may be exchanged.

`Trainer` gives an updater each part of a batch (`learn`) and then asks it to move the weights (`apply`). The ordinary
updaters are autograd and an optimiser on dense gradients; `FusedUpdater` does all of it in one pass of the kernels.
`make_updater` chooses.

Shape letters: N tokens, L latents, D width, K active latents a token, A candidates of the AuxK loss.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import UpdateRule, UpdateState, choose, ops
from steersman.kernels.update import StepSizes, update_matrix, update_vector
from steersman.sae import SAE, AuxTerm, TrainingCode, auxk_gradients, auxk_loss
from steersman.train.run.recipe import TrainConfig


class Learned(NamedTuple):
    """What a part of a batch gave: its code, and its losses summed over tokens, without gradients."""

    code: TrainingCode
    squared_error: Tensor
    aux: Tensor


class Updater(Protocol):
    """Moves the weights of an SAE; its state is named tensors, so that a resumed run goes on bit for bit."""

    def learn(self, x: Tensor, n_values: int, aux: AuxTerm | None) -> Learned:
        """Take the gradients of a part x [N, D] of a batch of `n_values` numbers."""
        ...

    def apply(self, lr: float) -> None:
        """Move the weights by the gradients taken since the last call; decoder rows are unit vectors afterwards."""
        ...

    def state(self) -> dict[str, Tensor]: ...
    def restore(self, tensors: dict[str, Tensor]) -> None: ...


def parameters_of(sae: SAE) -> list[Tensor]:
    """The trained tensors, in the order in which states list them."""
    return [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec]


def make_updater(sae: SAE, config: TrainConfig, lr: float) -> Updater:
    """The updater that the configuration asks for, in a single process; lr is the peak learning rate."""
    fused = config.fused_update
    if fused is None:
        possible = config.grad_clip is None and config.grad_accumulation == 1
        fused = possible and hasattr(choose(sae.device), "backward_update")
    if fused:
        return FusedUpdater(sae, config)
    if config.optimizer == "adam" and config.state_dtype == "float32":
        return AutogradUpdater(sae, config, lr)
    return RuleUpdater(sae, config)


def check_many(config: TrainConfig) -> None:
    """Raise a SteersmanError where several processes are to train one SAE in a way that only one can."""
    if config.fused_update:
        raise SteersmanError(
            "the fused update has no gradient that processes could add up: use fused_update=False on several of them"
        )
    if config.cuda_graph:
        raise SteersmanError("cuda_graph=True trains in one process only: use cuda_graph=False on several")
    if config.optimizer != "adam" or config.state_dtype != "float32":
        raise SteersmanError(
            f"optimizer={config.optimizer} with state_dtype={config.state_dtype} trains in one process only: use "
            "optimizer=adam and state_dtype=float32 on several"
        )


class Autograd:
    """Gradients by autograd, projected and clipped; a subclass moves the weights by them."""

    def __init__(self, sae: SAE, config: TrainConfig):
        self.sae, self.config = sae, config

    def moved(self) -> list[Tensor]:
        """What the optimiser moves, in the order of `parameters_of`: all of it, unless other ranks move a part."""
        return parameters_of(self.sae)

    def learn(self, x: Tensor, n_values: int, aux: AuxTerm | None) -> Learned:
        sae = self.sae
        code = sae.encode_training(x)
        residual = x - sae.decode_training(code)
        squared_error = residual.square().sum()
        aux_loss = residual.new_zeros(())
        if aux is not None:
            aux_loss = aux.weight * auxk_loss(sae, x, residual, aux.candidates, aux.alive, aux.k)
        ((squared_error + self.config.aux_coefficient * aux_loss) / n_values).backward()
        return Learned(code, squared_error.detach(), aux_loss.detach())

    @torch.no_grad()
    def apply(self, lr: float) -> None:
        """Project the decoder's gradient off its rows, clip, step, and make the rows unit vectors again."""
        W_dec = self.sae.W_dec
        grad = W_dec.grad
        if grad is not None:  # moving along a unit row would only be undone below
            grad.sub_((grad * W_dec).sum(dim=1, keepdim=True) * W_dec)
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters_of(self.sae), self.config.grad_clip)
        self._move(lr)
        for parameter in parameters_of(self.sae):
            parameter.grad = None
        self.sae.normalize_decoder()

    def _move(self, lr: float) -> None:
        """Move the parameters by their gradients."""
        raise NotImplementedError  # each subclass defines it


class AutogradUpdater(Autograd):
    """Autograd and `torch.optim.Adam`, on dense gradients."""

    def __init__(self, sae: SAE, config: TrainConfig, lr: float):
        super().__init__(sae, config)
        W_enc, W_dec, b_enc, b_dec = self.moved()
        groups = [
            {"params": [W_enc, W_dec], "ratio": 1.0},
            {"params": [b_enc, b_dec], "ratio": config.bias_lr_ratio},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=lr, betas=config.betas, fused=True)

    def _move(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        return {
            f"adam.{i}.{name}": value
            for i, parameter in enumerate(self.moved())
            for name, value in self.optimizer.state[parameter].items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for i, parameter in enumerate(self.moved()):
            self.optimizer.state[parameter] = {
                name: torch.empty_like(parameter).copy_(tensors[f"adam.{i}.{name}"])
                if name != "step"
                else tensors[f"adam.{i}.{name}"].to(parameter.device)
                for name in ("step", "exp_avg", "exp_avg_sq")
            }


def _rule(config: TrainConfig) -> UpdateRule:
    beta1, beta2 = config.betas
    return UpdateRule(name=config.optimizer, beta1=beta1, beta2=beta2, state_dtype=config.state_dtype)


def _state(sae: SAE, rule: UpdateRule, operands: torch.dtype) -> UpdateState:
    """The rule's state, holding the SAE's own weights."""
    W_enc, W_dec, b_enc, b_dec = (parameter.detach() for parameter in parameters_of(sae))
    return UpdateState.of(W_enc.T, W_dec, b_enc, b_dec, rule, operands)


class _WithRule:
    """What updaters with a `kernels.UpdateRule` share: their state."""

    state_of_rule: UpdateState

    def state(self) -> dict[str, Tensor]:
        return {f"rule.{name}": value for name, value in self.state_of_rule.state().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.state_of_rule.state().items():
            value.copy_(tensors[f"rule.{name}"])
        self.state_of_rule.refresh()


class RuleUpdater(_WithRule, Autograd):
    """Autograd and any rule of `kernels.update`, on dense gradients. A feature is touched when it has one."""

    def __init__(self, sae: SAE, config: TrainConfig):
        super().__init__(sae, config)
        self.rule = _rule(config)
        self.state_of_rule = _state(sae, self.rule, torch.float32)

    def _move(self, lr: float) -> None:
        state, rule = self.state_of_rule, self.rule
        W_enc, W_dec, b_enc, b_dec = (parameter.grad for parameter in parameters_of(self.sae))
        assert W_enc is not None
        assert W_dec is not None
        assert b_enc is not None
        assert b_dec is not None
        state.n_steps.add_(1)
        rate = torch.full((1,), lr, device=state.n_steps.device)
        sizes = StepSizes.of(rule, state.n_steps, rate, rate * self.config.bias_lr_ratio)
        touched = (b_enc != 0) | (W_dec != 0).any(dim=1)
        for name, grad, seed in (("W_enc", W_enc.T, 0), ("W_dec", W_dec, 1)):
            W = getattr(state, name)
            update_matrix(
                W, W, grad, state.moments[name], touched, rule, sizes, 2 * state.n_steps + seed, unit=name == "W_dec"
            )
        moving = touched if rule.touched_only else None
        update_vector(state.b_enc, b_enc, state.moments["b_enc"], moving, rule, sizes.biases, sizes.inverse_root)
        update_vector(state.b_dec, b_dec, state.moments["b_dec"], None, rule, sizes.biases, sizes.inverse_root)


class FusedUpdater(_WithRule):
    """Gradients, optimiser and normalisation in one pass of the kernels: no dense gradient, no autograd.

    Products read bf16 copies of the weights on a GPU, which the pass writes as it goes, and the weights themselves on a
    CPU. A batch comes in one part, and nothing waits for the device.
    """

    def __init__(self, sae: SAE, config: TrainConfig):
        self.sae, self.config, self.rule = sae, config, _rule(config)
        self.operands = torch.float32 if sae.device.type == "cpu" else torch.bfloat16
        self.state_of_rule = _state(sae, self.rule, self.operands)
        self.lr, self.bias_lr = (torch.zeros(1, device=sae.device) for _ in range(2))
        self._versions: list[int] = []
        self._learned: tuple[Any, ...] | None = None

    def _weights_changed(self) -> bool:
        """Whether something else than `apply` wrote to the weights since the last call."""
        versions = [self.sae.W_enc._version, self.sae.W_dec._version]
        changed, self._versions = versions != self._versions, versions
        return changed

    @torch.no_grad()
    def learn(self, x: Tensor, n_values: int, aux: AuxTerm | None) -> Learned:
        sae, state = self.sae, self.state_of_rule
        if self._weights_changed():
            state.refresh()
        code = sae.encode_training(x, state.enc_rows)
        values, indices = code.values, code.order.indices
        residual, squares = ops.decode_residual(values, indices, state.dec_rows, state.b_dec, x)
        centred = (x if sae.input_bias is None else x - state.b_dec).to(self.operands)
        aux_loss, aux_rows = residual.new_zeros(()), None
        if aux is not None:
            scale = aux.weight * (self.config.aux_coefficient / n_values)
            aux_loss, aux_rows = auxk_gradients(
                sae, state.enc_rows, state.dec_rows, centred, residual, aux.candidates, aux.alive, aux.k, scale
            )
            aux_loss = aux.weight * aux_loss
        # The gradient of the reconstruction is -2 residual / n_values.
        self._learned = residual.to(self.operands), -2 / n_values, centred, values, indices, aux_rows
        return Learned(code, squares.sum(), aux_loss)

    def set_rate(self, lr: float) -> None:
        """The learning rate of the next `apply`, written to the device."""
        self.lr.fill_(lr)
        self.bias_lr.fill_(lr * self.config.bias_lr_ratio)

    @torch.no_grad()
    def apply(self, lr: float) -> None:
        """Take the gradients of the part that was learned and move the weights by them."""
        assert self._learned is not None, "learn comes before apply"
        if not (self.lr.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph reads the rate of its replay
            self.set_rate(lr)
        inward = self.sae.input_bias is not None
        ops.backward_update(
            self.state_of_rule,
            self.rule,
            self.lr,
            self.bias_lr,
            *self._learned,
            centred_by_b_dec=inward,
            signed=self.sae.signed,
        )
        self._learned = None
        self._weights_changed()
