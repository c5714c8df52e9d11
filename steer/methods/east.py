"""`east`: v = sum_i w_i (h_i - c_i) / sum_i |w_i|, states weighted by what an agent did next.

The examples are the prompts of an agent's log: `weight` is the entropy of the action it chose from there (see
`action_entropy`), `group` the episode, and c_i the mean state of the episode (`centre="episode"`), of all examples
(`corpus`) or 0 (`none`). Source: arXiv 2406.00244; the vector is added at the last prompt token of every decision.

Because of the centring an episode of constant entropy adds exactly nothing: v is the covariance of entropy and state
within episodes, and no difference of means. There are no negative examples: where weights of both signs are given, the
sign says the side.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.methods.base import ROUNDING, ContrastConfig
from steersman.steer.methods.examples import Examples
from steersman.steer.methods.reading import Part
from steersman.steer.methods.streamed import Estimator, StreamedMethod


class WeightedStates(Estimator):
    """Per group: the sums of w x, x, w and 1. Groups are few beside samples."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__(config)
        self.centre = config.centre or "episode"
        self.groups: dict[int, tuple[Tensor, Tensor, float, int]] = {}
        self.size = 0.0  # sum of |w|

    def observe(self, part: Part) -> None:
        self.positive.add(part.x)
        self.size += float(part.weight.abs().sum())
        group = part.group if self.centre == "episode" else torch.zeros_like(part.group)
        for g in group.unique().tolist():
            x, w = part.x[group == g].double(), part.weight[group == g]
            self._add(g, (w @ x, x.sum(0), float(w.sum()), len(x)))

    def _add(self, g: int, sums: tuple[Tensor, Tensor, float, int]) -> None:
        known = self.groups.get(g)
        self.groups[g] = sums if known is None else tuple(a + b for a, b in zip(known, sums))  # pyright: ignore[reportArgumentType]

    def merged(self, other: Any) -> Any:
        both = super().merged(other)
        both.size = self.size + other.size
        for part in (self, other):
            for g, sums in part.groups.items():
                both._add(g, sums)
        return both

    def direction(self) -> Tensor:
        if not self.size:
            raise SteersmanError("the weights of the examples are all 0")
        centred = self.centre != "none"
        total = sum(wx - (w / n) * x if centred else wx for wx, x, w, n in self.groups.values())
        return torch.as_tensor(total) / self.size

    def check(self, method: str, hook: str) -> None:
        if float(self.direction().norm()) <= ROUNDING * float(self.positive.mean.norm()):
            raise SteersmanError(
                f"{method} gives a zero vector at {hook}: the weights do not vary with the states within an episode"
            )


class EAST(StreamedMethod):
    """Entropy-weighted states, centred within each episode."""

    name = "east"
    source = "arXiv 2406.00244"
    positions = "last"
    order = "sides"
    estimator = WeightedStates
    needs_negative = False
    takes_weights = True
    centres = ("episode", "corpus", "none")

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        if examples.negative:
            raise SteersmanError("method 'east' takes no negative examples: its weights say which state counts how")
        if not examples.weighted:
            raise SteersmanError(
                "method 'east' weighs prompts by the entropy of the action that followed: give every example a weight"
            )
        if (config.centre or "episode") == "episode" and not all(example.group for example in examples.positive):
            raise SteersmanError(
                "method 'east' centres within episodes: give every example a group, or centre='corpus'"
            )


def action_entropy(
    lm: LanguageModel,
    prompts: Sequence[Any],
    parse: Callable[[str], Hashable | None],
    *,
    samples: int = 25,
    corrected: bool = False,
    seed: int = 0,
    **options: Any,
) -> tuple[list[float], list[Mapping[Hashable, int]]]:
    """The entropy in nats of the ACTION that follows each prompt, and how often each action was seen.

    `samples` completions of a prompt are sampled (`options` as for `LanguageModel.generate`); `parse` turns each into
    its action, or None where it holds none; only those that hold one count. Few samples bias an entropy down;
    `corrected` adds (actions seen - 1) / (2 samples that parsed), the Miller-Madow correction.

    Raises SteersmanError for a prompt of whose completions none parses.
    """
    if samples < 1:
        raise SteersmanError(f"samples must be at least 1, got {samples}")
    entropies: list[float] = []
    seen: list[Mapping[Hashable, int]] = []
    for number, prompt in enumerate(prompts):
        made = lm.generate([prompt], do_sample=True, num_return_sequences=samples, seed=seed + number, **options)
        actions = Counter(action for text in made.completions if (action := parse(text)) is not None)
        n = sum(actions.values())
        if not n:
            raise SteersmanError(f"none of {samples} completions of prompt {number} holds an action")
        entropy = -sum(count / n * math.log(count / n) for count in actions.values())
        entropies.append(entropy + ((len(actions) - 1) / (2 * n) if corrected else 0.0))
        seen.append(dict(actions))
    return entropies, seen
