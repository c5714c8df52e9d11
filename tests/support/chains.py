"""A Markov chain whose every text can be listed: what particles of it should come to is known."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.steer.decoding.decoder import decode
from steersman.steer.decoding.population import ParticleSet, Prefix, Writer

STATES, STEPS = 3, 4


class Chain:
    """Three tokens, four steps. Under seed 1 the mean number of zeros is 1.18, and 1.925 under p exp(zeros) / Z."""

    def __init__(self, seed: int = 1) -> None:
        g = np.random.default_rng(seed)
        self.moves = torch.tensor(g.dirichlet(np.ones(STATES), STATES))
        self.start = torch.tensor(g.dirichlet(np.ones(STATES)))
        self.texts: list[Prefix] = list(itertools.product(range(STATES), repeat=STEPS))

    def next(self, prefix: Prefix) -> Tensor:
        """[3] float64: probabilities of the next token."""
        return self.moves[prefix[-1]] if prefix else self.start

    def probability(self, text: Prefix) -> float:
        return math.prod(float(self.next(text[:i])[x]) for i, x in enumerate(text))

    def value(self, prefix: Prefix, lam: float = 1.0) -> float:
        """E[exp(lam zeros) | prefix], by the recursion."""
        if len(prefix) == STEPS:
            return math.exp(lam * zeros(prefix))
        row = self.next(prefix)
        return sum(float(row[x]) * self.value((*prefix, x), lam) for x in range(STATES))

    def target(self, factor: Callable[[Prefix], float]) -> tuple[dict[Prefix, float], float]:
        """(p factor / Z of every text, Z)."""
        mass = {text: self.probability(text) * factor(text) for text in self.texts}
        total = sum(mass.values())
        return {text: m / total for text, m in mass.items()}, total

    def run(self, n: int, runs: int = 1, seed: int = 0, **options: Any) -> list[ParticleSet]:
        """`runs` independent populations of n particles."""
        writer = Writer(prompt_ids=[[]] * runs)
        seeds = range(seed * runs, (seed + 1) * runs)
        return decode(ChainSource(self, n * runs), writer, n, max_new_tokens=STEPS, seeds=seeds, **options)


class ChainSource:
    """The chain as a source of R rows."""

    def __init__(self, chain: Chain, rows: int) -> None:
        self.chain, self.last = chain, torch.full((rows,), -1)
        self.passes, self.rows = 1, rows

    def log_probs(self) -> Tensor:
        begun = (self.last >= 0)[:, None]
        return torch.where(begun, self.chain.moves[self.last.clamp_min(0)], self.chain.start[None]).log()

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        assert parents.shape == tokens.shape == self.last.shape
        self.last = tokens.clone()
        self.passes, self.rows = self.passes + 1, self.rows + len(tokens)


def zeros(text: Prefix) -> int:
    return sum(x == 0 for x in text)


def count_zeros(texts: Sequence[Sequence[int]]) -> list[float]:
    """The reward of the tests."""
    return [float(sum(x == 0 for x in text)) for text in texts]


def histogram(sets: Sequence[ParticleSet]) -> dict[Prefix, float]:
    """Weighted shares of the texts over many populations, each population weighted by its Z: unbiased up to a ratio."""
    total: dict[Prefix, float] = {}
    for found in sets:
        for text, w in zip(found.tokens, found.log_weights.exp().tolist()):
            total[text] = total.get(text, 0.0) + w
    mass = sum(total.values())
    return {text: w / mass for text, w in total.items()}


def distance(a: dict[Prefix, float], b: dict[Prefix, float]) -> float:
    """Total variation."""
    return 0.5 * sum(abs(a.get(text, 0.0) - b.get(text, 0.0)) for text in a.keys() | b.keys())
