"""A trained critic: a value head on frozen hidden states, fitted to what on-policy texts turn out to be worth
(CriticControl, arXiv 2212.10938).

Shape letters: B texts of a batch, S their tokens, D width.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_fits
from steersman.lm.tokens import Prompt, as_prompts
from steersman.progress import progress
from steersman.reading import parse_json
from steersman.steer.decoding.population import Prefix
from steersman.steer.decoding.proposals import Critic
from steersman.tensor_files import check_format, load_tensors, save_tensors

log = logging.getLogger(__name__)

FORMAT, VERSION = "steersman.critic", 1


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """How a value head is trained. Not in the authors' code: `value="exp"`, the norm of the states, the defaults that
    fit a small run. The authors': gamma .99, td_lambda .95, lr 1.41e-5 (topic 2.82e-6), batch 128 (32), 4 epochs,
    rollouts of 25 (80) tokens at temperature 2.0 (2.8), value="logit" of a classifier's logit."""

    hook: str = ""
    """Where the states are read; empty for what the last block returns."""
    value: Literal["exp", "logit"] = "exp"
    """`exp`: V = exp(head) is fitted to exp(lam r), what makes samples of p exp(lam r) exact. `logit`: the head is
    fitted to r, a classifier's logit, and V = sigmoid(head), as the authors have it."""
    lam: float = 1.0
    """Strength of the reward in `exp`."""
    top: int = 10
    """How many of the likeliest tokens the proposal weighs by V."""
    hidden: int = 0
    """Width of a hidden layer (SiLU) of the head; 0 for a linear one."""
    rounds: int = 20
    """Rounds of new rollouts; each gives `epochs` passes over them."""
    batch_size: int = 128
    """Rollouts of a round."""
    epochs: int = 4
    """Passes over the rollouts of a round."""
    new_tokens: int = 25
    """Tokens of a rollout: V is of texts of this length."""
    temperature: float = 1.0
    """Of the rollouts. Above 1 more is seen, and V is no longer that of the model's own texts."""
    gamma: float = 1.0
    """Discount of a later value; below 1 V underrates what is far off."""
    td_lambda: float = 0.95
    """1 fits to the reward alone, 0 to the next state's value alone."""
    lr: float = 3e-3
    """Adam's learning rate, on states with mean 0 and variance 1."""
    seed: int = 0
    """Of rollouts and initial weights."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("top", "rounds", "batch_size", "epochs", "new_tokens"):
            if getattr(self, name) < 1:
                raise SteersmanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (0 <= self.td_lambda <= 1 and 0 < self.gamma <= 1):
            raise SteersmanError("td_lambda must lie in [0, 1] and gamma in (0, 1]")


class TrainedCritic(Critic):
    """V of a partial text from the hidden state of its last token. Give it to `particles(..., critic=...)`.

    `history` holds the mean loss of each round.
    """

    def __init__(self, lm_name: str, config: CriticConfig, hook: str, width: int) -> None:
        self.model_name, self.config, self.hook, self.top = lm_name, config, hook, config.top
        self.mean, self.scale = torch.zeros(width), torch.ones(width)
        inner = [nn.Linear(width, config.hidden), nn.SiLU()] if config.hidden else []
        self.last = nn.Linear(config.hidden or width, 1)
        self.head = nn.Sequential(*inner, self.last)
        g = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            for p in self.head.parameters():
                p.zero_()
            for layer in inner[:1]:
                torch.nn.init.normal_(layer.weight, 0, width**-0.5, generator=g)  # pyright: ignore[reportArgumentType]
        self.history: list[float] = []

    def check(self, lm: LanguageModel) -> None:
        """Raise a SteersmanError where it was trained on another model or at another width."""
        self.hook = check_fits(
            lm,
            what="this critic",
            model_name=self.model_name,
            hook_name=str(self.hook),
            width=len(self.mean),
        )

    def raw(self, states: Tensor) -> Tensor:
        """[...] fp32: the head of states [..., D]."""
        x = (states.float() - self.mean.to(states.device)) / self.scale.to(states.device)
        return self.head.to(states.device)(x)[..., 0]

    @torch.no_grad()
    def log_value(self, states: Tensor) -> Tensor:
        """[...] fp32: log V of states [..., D]."""
        raw = self.raw(states)
        return raw if self.config.value == "exp" else nn.functional.logsigmoid(raw)

    def log_values(self, prefixes: list[Prefix], candidates: Tensor, states: Tensor | None) -> Tensor:
        assert states is not None
        return self.log_value(states)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a safetensors file with its settings in the header, whole or not at all."""
        about = {"model_name": self.model_name, "hook": self.hook, "config": dataclasses.asdict(self.config)}
        tensors = {"mean": self.mean, "scale": self.scale}
        tensors |= {f"head.{name}": p.detach().contiguous() for name, p in self.head.state_dict().items()}
        save_tensors(path, tensors, {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TrainedCritic":
        """Read one. Raises SteersmanError, naming the file, when it holds none."""
        tensors, header = load_tensors(path)
        check_format(path, header, FORMAT, VERSION, "critic")
        try:
            about = parse_json(header["about"], f"{path}: its header")
            critic = cls(about["model_name"], CriticConfig(**about["config"]), about["hook"], len(tensors["mean"]))
            critic.mean, critic.scale = tensors.pop("mean"), tensors.pop("scale")
            critic.head.load_state_dict({name.removeprefix("head."): p for name, p in tensors.items()})
        except (KeyError, TypeError, RuntimeError) as error:
            raise SteersmanError(f"{path}: the critic in it cannot be read ({str(error)[:200]})") from error
        return critic


def train_critic(
    lm: LanguageModel,
    prompts: str | Sequence[Prompt],
    reward: Callable[[list[str]], Any],
    *,
    config: CriticConfig | None = None,
    **settings: Any,
) -> TrainedCritic:
    """Fit a value head to the rewards of texts that the model writes from `prompts`; the model's weights stay.

    `reward` takes completions and returns a number for each. A round writes `batch_size` texts, reads their states, and
    fits V of every generated token (and of the prompt's last) to the TD(lambda) return

        G_T = y,   G_t = gamma ((1 - lambda) V(s_(t+1)) + lambda G_(t+1)),

    with y = exp(lam r) under the Poisson deviance, whose least value is at the mean (`value="exp"`), or y = r under the
    squared error (`"logit"`).
    """
    config = merged(CriticConfig, config, settings)
    given = as_prompts(prompts)
    hook = lm.resolve_hook(config.hook or f"blocks.{lm.n_layers - 1}.hook_resid_post")
    critic = TrainedCritic(lm.name, config, hook, lm.hook_width(hook))
    critic.head.to(lm.device)
    optimizer = torch.optim.Adam(critic.head.parameters(), lr=config.lr)
    repeated = [given[i % len(given)] for i in range(config.batch_size)]
    for i in progress(range(config.rounds), desc="training a critic"):
        states, y, last = _rollouts(lm, repeated, reward, hook, config, config.seed + i)
        if i == 0:
            _set_norm(critic, states, y, last)
        critic.history.append(_fit(critic, optimizer, states, y, last))
    critic.head.to("cpu").requires_grad_(False)
    return critic


def _rollouts(
    lm: LanguageModel,
    prompts: list[Prompt],
    reward: Callable[[list[str]], Any],
    hook: str,
    config: CriticConfig,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(states [B, T + 1, D] from the prompt's last token on, y [B], index [B] of each text's last token in them)."""
    made = lm.generate(
        prompts, max_new_tokens=config.new_tokens, do_sample=True, temperature=config.temperature, seed=seed
    )
    states = lm.capture(made.tokens, made.attention_mask, hooks=hook)[hook][:, made.prompt_columns - 1 :].float()
    r = torch.as_tensor(reward(made.completions), dtype=torch.float32, device=states.device).flatten()
    if r.shape != (len(prompts),) or not bool(torch.isfinite(r).all()):
        raise SteersmanError("the reward must return one finite number for each text")
    return states, (config.lam * r).exp() if config.value == "exp" else r, made.new_mask.sum(1)


def _set_norm(critic: TrainedCritic, states: Tensor, y: Tensor, last: Tensor) -> None:
    """Mean and variance of the states, and a head that says the mean of y everywhere."""
    real = torch.arange(states.shape[1], device=states.device) <= last[:, None]
    kept = states[real]
    critic.mean = kept.mean(0).cpu()
    critic.scale = kept.std(0).clamp_min(1e-6).cpu()
    mean = y.double().mean()
    with torch.no_grad():
        critic.last.bias.fill_(float(mean.log() if critic.config.value == "exp" else mean))


def _fit(critic: TrainedCritic, optimizer: torch.optim.Optimizer, states: Tensor, y: Tensor, last: Tensor) -> float:
    real = torch.arange(states.shape[1], device=states.device) <= last[:, None]
    with torch.no_grad():
        raw = critic.raw(states)
        value = raw.exp() if critic.config.value == "exp" else raw
        target = td_returns(value, y, last, critic.config.gamma, critic.config.td_lambda)
    total = 0.0
    for _ in range(critic.config.epochs):
        raw = critic.raw(states)
        each = raw.exp() - target * raw if critic.config.value == "exp" else (raw - target).square()
        loss = each[real].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    return total / critic.config.epochs


def td_returns(value: Tensor, y: Tensor, last: Tensor, gamma: float, lam: float) -> Tensor:
    """[B, T] TD(lambda) returns of states with values [B, T], of which row b ends at `last[b]` with the reward y[b].

    >>> td_returns(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([8.0]), torch.tensor([2]), gamma=0.5, lam=0.5)
    tensor([[1.2500, 3.0000, 8.0000]])
    """
    out = torch.empty_like(value)
    following = y
    for t in reversed(range(value.shape[1])):
        ahead = value[:, min(t + 1, value.shape[1] - 1)]
        following = torch.where(last <= t, y, gamma * ((1 - lam) * ahead + lam * following))
        out[:, t] = following
    return out
