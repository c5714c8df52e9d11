"""`train_edit`: the parameters of an edit by gradient descent on a loss; the model's weights stay as they are.

    for each batch: loss(edit) + penalty -> gradient -> tangent to the sphere where a parameter has norm 1 -> clip
                    -> Adam -> norm 1, or within its bound

The edit is built anew from the parameters for every pass. Shape letters: N items.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.config import check_types, merged, setting
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.progress import progress
from steersman.steer.edits import Edit
from steersman.steer.scope import Scope, ScopeLike
from steersman.steer.training.checkpoint import Checkpoint
from steersman.steer.training.losses import Build, Loss, Trial

log = logging.getLogger(__name__)

Penalty = Callable[[Mapping[str, Edit], float], Tensor]
"""What a batch adds to its loss, from the edits as the last pass left them and the share of training that is done."""


@dataclass(frozen=True, kw_only=True)
class TrainEditConfig:
    """How an edit is trained."""

    lr: float = 0.01
    """Learning rate of Adam."""
    epochs: int = 3
    """Passes over the items; with `full_batch`, steps."""
    batch_size: int = 8
    """Items per forward pass."""
    full_batch: bool = False
    """One step per epoch, on the gradient of all items; the loss of an epoch is then exactly that of its parameters."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to 0 over the run."""
    warmup: int = 0
    """Steps over which it rises at first; at most a tenth of the run."""
    weight_decay: float = 0.0
    """Decoupled weight decay of Adam."""
    clip: float | None = None
    """Largest norm of the gradient of all parameters together."""
    keep: Literal["last", "best"] = "last"
    """Which parameters are the result: the last, or those of the epoch with the lowest loss over all items."""
    seed: int = 0
    """Seed of the order of items."""
    checkpoint: str | None = setting(None, identity=False)
    """File to write after each epoch, from which the same run goes on if it was cut off."""

    def __post_init__(self) -> None:
        check_types(self)
        if not (self.lr > 0 and math.isfinite(self.lr)) or self.weight_decay < 0:
            raise SteersmanError("lr must be a number above 0, and weight_decay not below 0")
        if self.epochs < 1 or self.batch_size < 1 or self.warmup < 0:
            raise SteersmanError("epochs and batch_size must be at least 1, and warmup not below 0")
        if self.clip is not None and not self.clip > 0:
            raise SteersmanError(f"clip must be above 0, got {self.clip}")

    def rate(self, step: int, steps: int) -> float:
        """The factor of the learning rate at a step, counted from 0, of a run."""
        warmup = min(self.warmup, steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]


@dataclass(frozen=True, kw_only=True)
class TrainedEdit:
    """What training came to."""

    parameters: dict[str, Tensor]
    """Name -> value, fp32 on the CPU."""
    edits: dict[str, Edit]
    """Hook point -> the edit of these parameters, as `calibrate` and `evaluate_steering` take it."""
    losses: list[float]
    """Loss of each epoch, without the penalty."""
    unsteered: float
    """Loss of the model without the edit."""
    loss: float
    """Loss of the parameters that were kept."""

    def notes(self) -> dict[str, Any]:
        """What a file should say of it."""
        return {"loss_unsteered": self.unsteered, "loss": self.loss, "epochs": len(self.losses)}


def train_edit(
    lm: LanguageModel,
    parameters: Mapping[str, Tensor],
    build: Build,
    loss: Loss,
    *,
    scope: ScopeLike = "all",
    include_bos: bool = False,
    unit: Sequence[str] = (),
    max_norm: Mapping[str, float] | None = None,
    penalty: Penalty | None = None,
    config: TrainEditConfig | None = None,
    **settings: Any,
) -> TrainedEdit:
    """Train the parameters of an edit.

    Args:
        lm: the model; none of its weights gets a gradient.
        parameters: name -> where to start, a tensor each. They are copied, not changed.
        build: from the parameters to {hook point: edit}: `lambda p: {hook: VectorEdit(p["v"])}`.
        loss: what is minimised, see `steersman.steer.training.losses`.
        scope, include_bos: where the edit acts, as for `Steerer.edit`.
        unit: parameters whose rows have norm 1: the gradient's part along them is taken out before each step, and they
            are normalised before the first and after every step.
        max_norm: name -> bound of the norm of its rows, held after every step.
        penalty: what each batch adds to its loss.
        config: the settings; `**settings` are fields of it, over those of `config`.

    Raises SteersmanError for items that the loss cannot use, a loss that is not finite, another run's checkpoint.
    """
    config = merged(TrainEditConfig, config, settings)
    count = loss.prepare(lm)
    where = Scope.of(scope, include_bos=include_bos)
    leaves = {name: p.detach().to(lm.device, torch.float32).clone() for name, p in parameters.items()}
    bounds = dict(max_norm or {})
    for name in (*unit, *bounds):
        if name not in leaves:
            raise SteersmanError(f"there is no parameter {name!r} to hold: have {', '.join(leaves)}")
    _hold(leaves, unit, bounds)
    for p in leaves.values():
        p.requires_grad_()
    trial = Trial(lm, leaves, build, where)
    optimizer = torch.optim.AdamW(list(leaves.values()), lr=config.lr, weight_decay=config.weight_decay)
    batches = math.ceil(count / config.batch_size)
    steps = config.epochs * (1 if config.full_batch else batches)
    run = Checkpoint(config, leaves, optimizer, count)
    with frozen(lm), torch.enable_grad():
        unsteered = evaluate(Trial(lm, leaves, build, where, off=True), loss, count, config.batch_size)
        run.resume()
        # With full batches an epoch's loss is known before its step, so the last epoch's parameters need one more look.
        for epoch in progress(range(run.epoch, config.epochs), desc="training the edit"):
            at = epoch if config.full_batch else epoch * batches
            before = {name: p.detach().clone() for name, p in leaves.items()} if config.full_batch else {}
            total = 0.0
            optimizer.zero_grad()
            for number, items in enumerate(_order(count, config, epoch)):
                share = len(items) / count if config.full_batch else 1.0
                value = loss.of(trial, items).mean()
                whole = value if penalty is None else value + penalty(trial.edits, (at + number) / max(1, steps))
                (whole * share).backward()
                total += float(value.detach()) * len(items) / count
                if not math.isfinite(total):
                    raise SteersmanError(f"the loss is {total} in epoch {epoch}: lower lr, now {config.lr:g}")
                if not config.full_batch:
                    _step(leaves, optimizer, unit, bounds, config, config.rate(at + number, steps))
            if config.full_batch:
                run.note(total, before)
                _step(leaves, optimizer, unit, bounds, config, config.rate(at, steps))
            else:
                if config.keep == "best":
                    total = evaluate(trial, loss, count, config.batch_size)
                run.note(total, leaves)
            run.save(epoch + 1)
        if config.full_batch:
            run.note(evaluate(trial, loss, count, config.batch_size), leaves)
    kept, value = (run.best, run.lowest) if config.keep == "best" else (leaves, run.losses[-1])
    final = {name: p.detach().to("cpu", torch.float32).clone() for name, p in kept.items()}
    on_device = {name: p.to(lm.device) for name, p in final.items()}
    edits = {lm.resolve_hook(hook): edit for hook, edit in build(on_device).items()}
    return TrainedEdit(parameters=final, edits=edits, losses=run.losses, unsteered=unsteered, loss=value)


def evaluate(trial: Trial, loss: Loss, count: int, batch_size: int) -> float:
    """The loss over all items, without gradients."""
    total = 0.0
    with torch.no_grad():
        for start in range(0, count, batch_size):
            items = list(range(start, min(count, start + batch_size)))
            total += float(loss.of(trial, items).double().sum())
    return total / count


def gradient(
    lm: LanguageModel, parameters: Mapping[str, Tensor], build: Build, loss: Loss, *, batch_size: int = 8
) -> dict[str, Tensor]:
    """The gradient of the loss over all items at `parameters`, name -> fp32 on the CPU."""
    count = loss.prepare(lm)
    leaves = {name: p.detach().to(lm.device, torch.float32).clone().requires_grad_() for name, p in parameters.items()}
    trial = Trial(lm, leaves, build, Scope.of("all"))
    with frozen(lm), torch.enable_grad():
        for start in range(0, count, batch_size):
            items = list(range(start, min(count, start + batch_size)))
            (loss.of(trial, items).sum() / count).backward()
    return {name: torch.zeros_like(p).cpu() if p.grad is None else p.grad.cpu() for name, p in leaves.items()}


@contextmanager
def frozen(lm: LanguageModel) -> Iterator[None]:
    """No weight of the model gets a gradient inside."""
    requires = [p.requires_grad for p in lm.model.parameters()]
    lm.model.requires_grad_(False)
    try:
        yield
    finally:
        for p, required in zip(lm.model.parameters(), requires):
            p.requires_grad_(required)


def _order(count: int, config: TrainEditConfig, epoch: int) -> list[list[int]]:
    """The items of an epoch in batches: in their order with full batches, else shuffled by seed and epoch."""
    if config.full_batch:
        order = list(range(count))
    else:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator).tolist()
    return [order[i : i + config.batch_size] for i in range(0, count, config.batch_size)]


def _step(
    leaves: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    unit: Sequence[str],
    bounds: Mapping[str, float],
    config: TrainEditConfig,
    rate: float,
) -> None:
    for name in unit:
        p = leaves[name]
        if p.grad is not None:  # what would only change the length, which is given, is left out
            with torch.no_grad():
                along = (p.grad * p).sum(-1, keepdim=True) / p.square().sum(-1, keepdim=True)
                p.grad -= along * p
    if config.clip is not None:
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), config.clip)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * rate
    optimizer.step()
    optimizer.zero_grad()
    _hold(leaves, unit, bounds)


@torch.no_grad()
def _hold(leaves: Mapping[str, Tensor], unit: Sequence[str], bounds: Mapping[str, float]) -> None:
    for name in unit:
        norm = leaves[name].norm(dim=-1, keepdim=True)
        if not bool((norm > 0).all()):
            raise SteersmanError(f"the parameter {name!r} is zero and should have norm 1: start it elsewhere")
        leaves[name].div_(norm)
    for name, bound in bounds.items():
        leaves[name].div_((leaves[name].norm(dim=-1, keepdim=True) / bound).clamp(min=1.0))
