"""The particles of a run as it goes, what potentials see of them, and the weighted set that is returned.

Shape letters: P populations (one per prompt), N particles of each, R = P N rows with a prompt's particles side by side,
M candidates, T new tokens, J potentials.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.steer.decoding.resampling import effective_size, inverse_cdf

Prefix = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Writer:
    """What turns tokens into text: the prompts of a run and how they are decoded."""

    prompt_ids: Sequence[Sequence[int]]
    """The tokens of each prompt; empty where a source has none."""
    decode: Callable[[Sequence[int]], str] | None = None
    """Text of token ids, without special tokens; None for sources without text."""

    def text(self, prompt: int, prefix: Prefix) -> str:
        """Prompt and generated text."""
        if self.decode is None:
            raise SteersmanError("this source has no text: score token ids, with of='ids'")
        return self.decode([*self.prompt_ids[prompt], *prefix])

    def completion(self, prompt: int, prefix: Prefix) -> str:
        """The generated text. Cut from the whole: tokens decoded by themselves may lose the space before a word."""
        whole = self.text(prompt, prefix)
        start = self.text(prompt, ())
        assert self.decode is not None
        return whole[len(start) :] if whole.startswith(start) else self.decode(prefix)


@dataclass(frozen=True)
class Candidates:
    """Partial texts that a potential looks at, one per row."""

    writer: Writer
    prompts: list[int]
    """Which prompt each continues."""
    prefixes: list[Prefix]
    """Their generated tokens."""
    final: Tensor
    """[rows] bool: whether nothing more will be written."""

    def __len__(self) -> int:
        return len(self.prefixes)

    @cached_property
    def texts(self) -> list[str]:
        """Prompt and generated text of each."""
        return [self.writer.text(prompt, prefix) for prompt, prefix in zip(self.prompts, self.prefixes)]

    @cached_property
    def completions(self) -> list[str]:
        """The generated text of each."""
        return [self.writer.completion(prompt, prefix) for prompt, prefix in zip(self.prompts, self.prefixes)]

    @cached_property
    def ids(self) -> list[list[int]]:
        """All token ids of each, its prompt's included."""
        return [[*self.writer.prompt_ids[p], *prefix] for p, prefix in zip(self.prompts, self.prefixes)]


@dataclass
class Population:
    """What is known of every particle: [P, M] of each, M = N between steps."""

    tokens: Tensor
    """[P, M, T] int64; what stands after a particle's length means nothing."""
    length: Tensor
    """Generated tokens so far, an end token included."""
    finished: Tensor
    """bool: nothing more will be written."""
    settled: Tensor
    """bool: finished, and its potentials have their final values."""
    log_shares: Tensor
    """float64: the share of Z, weight / N."""
    log_prior: Tensor
    """float64: log-probability of the generated tokens under the model."""
    applied: Tensor
    """[P, M, J + 1] float64: log potentials that the share holds now, and the twist's."""
    memory: Tensor
    """[P, M, numbers] float64: what the potentials remember of a particle's past."""

    @classmethod
    def started(cls, P: int, N: int, T: int, J: int, numbers: int) -> "Population":
        """N particles of equal weight, with nothing written."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(P, N, *shape, dtype=dtype)

        return cls(
            tokens=zeros(T, dtype=torch.long),
            length=zeros(dtype=torch.long),
            finished=zeros(dtype=torch.bool),
            settled=zeros(dtype=torch.bool),
            log_shares=zeros() - torch.tensor(N, dtype=torch.float64).log(),
            log_prior=zeros(),
            applied=zeros(J + 1),
            memory=zeros(numbers),
        )

    def taken(self, index: Tensor) -> "Population":
        """The particles `index` [P, M'] of each population."""
        rows = torch.arange(len(index))[:, None]
        return Population(**{field.name: getattr(self, field.name)[rows, index] for field in fields(self)})

    def going(self) -> Tensor:
        """[P, M] bool: alive and not finished."""
        return ~self.finished & (self.log_shares > -torch.inf)

    def prefixes(self) -> list[Prefix]:
        """The generated tokens of every particle, population by population."""
        tokens, length = self.tokens.flatten(0, 1).tolist(), self.length.flatten().tolist()
        return [tuple(row[:n]) for row, n in zip(tokens, length)]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run took, all its prompts together."""

    forward_passes: int
    """Passes of the model, however many rows each had."""
    rows: int
    """Rows of all passes: each is one token of one particle, or the reading of its prompt."""
    reward_calls: int
    """Texts that rewards were asked for; a text that comes again is not asked for again."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


By = Literal["potential", "weight", "prior"]


@dataclass(frozen=True, kw_only=True)
class ParticleSet:
    """The weighted particles of one prompt. As a whole it is an approximation of the target, p(text) times the
    potential over Z; its best particle is a search's result and no sample."""

    prompt: str
    """The prompt as text."""
    completions: list[str]
    """The generated text of each particle; empty where the source has no text."""
    texts: list[str]
    """Prompt and completion of each."""
    tokens: list[Prefix]
    """The generated tokens of each, an end token included."""
    log_weights: Tensor
    """[N] float64: log w with Z = mean of w; -inf for particles that broke a constraint."""
    log_prior: Tensor
    """[N] float64: log-probability of the generated tokens under the model alone."""
    log_potential: Tensor
    """[N] float64: the sum of the final log potentials."""
    log_z: float | None
    """Log of the normalising constant Z = E_p[potential and constraints]: unbiased (Z, not its log). None when the
    resampling was not proper."""
    ended: Tensor
    """[N] bool: whether it ended before the limit of tokens."""
    ancestors: Tensor
    """[steps, N] int64: the particle of the step before that each one continues: the genealogy."""
    cost: Cost
    """What the run took, shared by all prompts of it."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def probabilities(self) -> Tensor:
        """[N] float64: the normalised weights."""
        return self.log_weights.softmax(0)

    @property
    def effective_size(self) -> float:
        """(sum w)^2 / sum w^2: between 1 and N."""
        return effective_size(self.log_weights)

    @property
    def roots(self) -> Tensor:
        """[N] int64: the particle of the first step from which each descends; few different ones mean degeneration."""
        index = torch.arange(len(self))
        for parents in self.ancestors.flip(0):
            index = parents[index]
        return index

    def best(self, by: By = "potential") -> int:
        """Which particle has the largest final potential (or weight, or probability under the model); ties go to the
        larger weight, then to the more probable. Particles that broke a constraint come last."""
        keys = {"potential": self.log_potential, "weight": self.log_weights, "prior": self.log_prior}
        if by not in keys:
            raise SteersmanError(f"best by one of {', '.join(keys)}, got {by!r}")
        alive = self.log_weights > -torch.inf
        rank = zip(alive.tolist(), keys[by].tolist(), self.log_weights.tolist(), self.log_prior.tolist())
        return max(enumerate(rank), key=lambda item: item[1])[0]

    def sample(self, n: int = 1, seed: int = 0) -> list[int]:
        """n particles drawn in proportion to their weights, with replacement."""
        points = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return inverse_cdf(self.log_weights, points).tolist()

    def mean(self, values: Any) -> float:
        """The weighted mean of one number per particle, such as rewards."""
        kept = self.probabilities > 0  # what broke a constraint may have no number
        return float(self.probabilities[kept] @ torch.as_tensor(values, dtype=torch.float64)[kept])
