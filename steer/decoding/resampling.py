"""Resamplers: which particles go on, and with what weight.

Weights are kept as a population's shares u of its normalising constant: Z = sum_i u_i, so that u_i = w_i / N for N
particles of weight w_i. A resampler is proper when every candidate's expected share afterwards is its share before;
then Z stays unbiased through any number of resamplings. `Truncation` alone is not, and says so.

Shape letters: P populations (one per prompt), N particles of each, M candidates of each (M = N, or N times the copies).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steersman.doors import number, whole_number
from steersman.errors import SteersmanError
from steersman.registry import Registry

RESAMPLERS: "Registry[type[Resampler]]" = Registry("resampler")
"""The resamplers by name."""


@dataclass(frozen=True)
class Chosen:
    """Which candidates go on."""

    index: Tensor
    """[N] int64: the candidate that each particle comes from."""
    log_shares: Tensor
    """[N] float64: its share of Z from now on; -inf where fewer than N candidates were left alive."""


class Resampler:
    """Chooses N of M weighted candidates of one population. A subclass with a `name` is found under it.

    `due` says whether a population needs it at all; `copies` how many continuations of each particle it chooses among.
    """

    name: ClassVar[str] = ""
    proper: ClassVar[bool] = True
    """Whether Z and expectations stay unbiased."""
    copies: int = 1

    def __init_subclass__(cls) -> None:
        RESAMPLERS.register(cls, cls)

    def due(self, log_shares: Tensor) -> bool:
        """Whether a population with these shares [M] is to be resampled now."""
        return True

    def choose(self, log_shares: Tensor, n: int, generator: torch.Generator) -> Chosen:
        """N of the candidates with `log_shares` [M] float64, at least one of which is finite."""
        raise NotImplementedError  # each resampler defines it


class Never(Resampler):
    """Sequential importance sampling: every particle keeps its own weight to the end."""

    name = "never"

    def due(self, log_shares: Tensor) -> bool:
        return False


class Multinomial(Resampler):
    """N independent draws in proportion to the weights, after which all weights are their mean (Gordon et al. 1993).

    Only where the effective number of particles (sum w)^2 / sum w^2 is below `threshold` N; 1 or more always. What is
    not resampled keeps its weight, so that both branches are unbiased: a step without resampling must not forget it.
    """

    name = "multinomial"

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = number(threshold, "threshold")
        if not self.threshold > 0:
            raise SteersmanError(f"threshold must be above 0, got {threshold}: 'never' does not resample")

    def due(self, log_shares: Tensor) -> bool:
        return self.threshold >= 1 or effective_size(log_shares) < self.threshold * len(log_shares)

    def choose(self, log_shares: Tensor, n: int, generator: torch.Generator) -> Chosen:
        index = inverse_cdf(log_shares, self.points(n, generator))
        return Chosen(index, (log_shares.logsumexp(0) - torch.tensor(n, dtype=torch.float64).log()).expand(n).clone())

    def points(self, n: int, generator: torch.Generator) -> Tensor:
        """[N] float64 in [0, 1): where the cumulated weights are looked up."""
        return torch.rand(n, dtype=torch.float64, generator=generator)


class Systematic(Multinomial):
    """As `Multinomial`, with one random number for all: the points (u + i) / N (Kitagawa 1996). Less variance."""

    name = "systematic"

    def points(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(1, dtype=torch.float64, generator=generator)
        return (torch.arange(n, dtype=torch.float64) + u) / n


class WithoutReplacement(Resampler):
    """Fearnhead and Clifford 2003 (JRSS B 65, section 5.2), as in SMC steering (arXiv 2306.03081).

    Every particle is continued `copies` times. With c such that sum_i min(1, c w_i) = N, each candidate with
    c w_i >= 1 is kept once with its own weight, and the others are drawn by stratified sampling with weight 1 / c: no
    candidate is kept twice.
    """

    name = "without_replacement"

    def __init__(self, copies: int = 3) -> None:
        self.copies = whole_number(copies, "copies", at_least=1)

    def choose(self, log_shares: Tensor, n: int, generator: torch.Generator) -> Chosen:
        total = log_shares.logsumexp(0)
        w = (log_shares - total).exp()
        alive = (w > 0).nonzero()[:, 0]
        if len(alive) <= n:  # all are kept as they are
            fill = alive[:1].expand(n - len(alive))
            kept = log_shares.new_full((n,), -torch.inf)
            kept[: len(alive)] = log_shares[alive]
            return Chosen(torch.cat([alive, fill]), kept)
        c, certain = _inverse_threshold(w, n)
        kept = certain.nonzero()[:, 0]
        rest = n - len(kept)
        if rest == 0:
            return Chosen(kept, log_shares[kept])
        small = (~certain & (w > 0)).nonzero()[:, 0]
        # Stratified: one point in each of `rest` equal parts of the small ones' mass; none is wider than a part.
        u = torch.rand(1, dtype=torch.float64, generator=generator)
        points = (torch.arange(rest, dtype=torch.float64) + u) / rest
        drawn = small[inverse_cdf(log_shares[small], points)]
        weight = (total - torch.log(c)).expand(rest)
        return Chosen(torch.cat([kept, drawn]), torch.cat([log_shares[kept], weight]))


class Truncation(Resampler):
    """Beam-like: the `keep` heaviest candidates stay, and each other place takes a random one of them (DARWIN, arXiv
    2406.15193, keeps 3).

    Not proper: what is returned is a search's result and no sample, and its Z means nothing.
    """

    name = "truncation"
    proper = False

    def __init__(self, keep: int = 3) -> None:
        self.keep = whole_number(keep, "keep", at_least=1)

    def choose(self, log_shares: Tensor, n: int, generator: torch.Generator) -> Chosen:
        alive = int((log_shares > -torch.inf).sum())
        k = min(self.keep, n, alive)
        best = log_shares.argsort(descending=True, stable=True)[:k].sort().values
        places = _stay(best, n, generator)
        return Chosen(places, log_shares[places])


def _stay(best: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """[N]: those of `best` in their own places as far as they have one, a random one of `best` in the others."""
    places = best[torch.randint(len(best), (n,), generator=generator)]
    own = best[best < n]
    places[own] = own
    missing = [int(i) for i in best[best >= n]]
    free = [i for i in range(n) if i not in set(own.tolist())]
    for place, i in zip(free, missing):
        places[place] = i
    return places


def _inverse_threshold(w: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(c, certain [M] bool) with sum_i min(1, c w_i) = N for weights w [M] that sum to 1, more than N above 0.

    Sorted by falling weight, with the k heaviest certain, c = (N - k) / (sum of the others); k is the first for which
    the next one has c w < 1.
    """
    ordered = w.sort(descending=True).values
    tail = ordered.flip(0).cumsum(0).flip(0)  # [M]: the mass from each on
    c = (n - torch.arange(n, dtype=torch.float64)) / tail[:n]
    k = int((c * ordered[:n] < 1).long().argmax()) if bool((c * ordered[:n] < 1).any()) else n
    if k == n:  # equal weights to the last bit: the n heaviest take it all
        certain = torch.zeros_like(w, dtype=torch.bool)
        certain[w.argsort(descending=True)[:n]] = True
        return torch.tensor(torch.inf, dtype=torch.float64), certain
    return c[k], c[k] * w >= 1


def inverse_cdf(log_shares: Tensor, points: Tensor) -> Tensor:
    """[n] int64: where the cumulated weights of `log_shares` [M] pass `points` [n] in [0, 1); never a weight of 0."""
    w = (log_shares - log_shares.max()).exp()
    total = w.cumsum(0)
    place = torch.searchsorted(total, points * total[-1], right=True)
    return place.clamp_max(int((w > 0).nonzero()[-1]))


def effective_size(log_shares: Tensor) -> float:
    """(sum w)^2 / sum w^2 of one population."""
    return float((2 * log_shares.logsumexp(0) - (2 * log_shares).logsumexp(0)).exp())


def as_resampler(given: "str | Resampler") -> Resampler:
    """A resampler by its name, with its defaults, or as given. Raises SteersmanError for an unknown name."""
    if isinstance(given, Resampler):
        return given
    if not isinstance(given, str):
        raise SteersmanError(f"a resampler is one of {', '.join(RESAMPLERS)} or an object, got {given!r}")
    return RESAMPLERS[given]()
