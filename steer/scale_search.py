"""The scale at which a cost that rises from 0 meets its target: of one vector, or of many at once.

Both bracket the target and narrow on the logarithms of scale and cost, where a cost is nearly a straight line (KL grows
as the square of a small scale). Every figure returned was measured: nothing is extrapolated. `search_scale` spends few
evaluations, each of which is dear; `search_scales` evaluates all vectors that are still searched for in one go.

Shape letters: G vectors, n of them still searched for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steersman.errors import SteersmanError

MAX_EVALUATIONS = 8
TOLERANCE = 0.05
"""Fraction of the budget by which a result may miss it."""
WIDEST = 3.0
"""Largest factor between two scales tried one after the other while the budget is not bracketed."""


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """The outcome of a search for a scale. Every number in it was measured."""

    scale: float
    """The scale whose cost came closest to the budget; where the budget is out of reach, the scale at the limit."""
    value: float
    """The cost measured at that scale."""
    target: float
    """The budget."""
    converged: bool
    """Whether the cost is within the tolerance of the budget."""
    reason: str
    """`converged`; `unreachable`: below the budget even at the largest scale allowed; `exceeded`: above it even at the
    smallest; `evaluations`: bracketed, but not within the tolerance after the evaluations allowed."""
    evaluations: list[tuple[float, float]]
    """(scale, cost) in the order they were measured."""


def search_scale(
    cost: Callable[[float], float],
    target: float,
    *,
    start: float,
    low: float,
    high: float,
    max_evaluations: int = MAX_EVALUATIONS,
    tolerance: float = TOLERANCE,
) -> ScaleSearch:
    """The scale in [low, high] whose cost is `target`, for a cost that rises with the scale from 0.

    Works on x = log scale and y = log(cost / target). While the budget is not bracketed it follows the slope of the
    last two points (2 at first: a small push costs its square), by at most `WIDEST`; once it is, it takes the root of
    the inverse parabola through the three points nearest the budget where that stays near the line between the
    bracket's ends, else the line's. A cost that is not finite counts as above the budget.

    >>> search = search_scale(lambda s: s * s, 4.0, start=1.0, low=0.01, high=100.0)
    >>> search.scale, search.reason, len(search.evaluations)
    (2.0, 'converged', 2)
    """
    if not (target > 0 and math.isfinite(target)):
        raise SteersmanError(f"a budget must be a number above 0, got {target}")
    if not 0 < low <= high:
        raise SteersmanError(f"scales must satisfy 0 < lowest <= highest, got {low} and {high}")
    points: list[tuple[float, float]] = []
    scale, reason = min(max(start, low), high), "evaluations"
    while len(points) < max_evaluations and reason == "evaluations":
        value = cost(scale)
        points.append((scale, value))
        if math.isfinite(value) and abs(value - target) <= tolerance * target:
            reason = "converged"
        elif value < target and all(v < target for _, v in points) and scale >= high:
            reason = "unreachable"
        elif not value < target and not any(v < target for _, v in points) and scale <= low:
            reason = "exceeded"
        else:
            scale = min(max(_next(points, target), low), high)
    scale, value = points[-1]
    if reason == "evaluations":
        scale, value = min(points, key=lambda p: abs(_height(p[1], target)))
    return ScaleSearch(
        scale=scale, value=value, target=target, converged=reason == "converged", reason=reason, evaluations=points
    )


FLOOR = 1e-30  # stands in for a cost of 0 or below, which has no logarithm


def _height(value: float, target: float) -> float:
    """y = log(cost / target); a cost that is not finite is far above."""
    return math.log(max(value, FLOOR) / target) if math.isfinite(value) else 1e3


def _next(points: Sequence[tuple[float, float]], target: float) -> float:
    """The scale to try after `points`."""
    track = [(math.log(s), _height(v, target)) for s, v in points]
    under, over = [p for p in track if p[1] < 0], [p for p in track if p[1] >= 0]
    if under and over:
        return math.exp(_inside(track, max(under), min(over)))
    x, y = track[-1]
    slope, margin = 2.0, 1.0
    if len(track) > 1 and track[-2][0] != x:
        slope = min(max((y - track[-2][1]) / (x - track[-2][0]), 0.5), 4.0)
        margin = 1.1  # a little further, so that it brackets
    widest = math.log(WIDEST)
    return math.exp(x + min(max(-y / slope * margin, -widest), widest))


def _inside(track: Sequence[tuple[float, float]], below: tuple[float, float], above: tuple[float, float]) -> float:
    """The next x between the ends of the bracket."""
    (a, low), (b, high) = below, above
    width, middle = b - a, (a + b) / 2
    if high >= 1e3 or width <= 0:
        return middle  # nothing can be read off a cost that is not finite, or off one that falls with the scale
    line = a - width * low / (high - low)
    guess = line
    near = sorted(sorted(track, key=lambda p: abs(p[1]))[:3])
    if len(near) == 3 and near[0][1] < near[1][1] < near[2][1]:
        (x1, y1), (x2, y2), (x3, y3) = near  # Lagrange's formula for x at y = 0
        root = x1 * y2 * y3 / ((y1 - y2) * (y1 - y3)) + x2 * y1 * y3 / ((y2 - y1) * (y2 - y3))
        root += x3 * y1 * y2 / ((y3 - y1) * (y3 - y2))
        if abs(root - line) <= width / 4 and a + 0.02 * width < root < b - 0.02 * width:
            guess = root
    if len(track) > 5:
        guess = (guess + middle) / 2  # slow so far: the curve is not what it seems, so halve as well
    return min(max(guess, a + 0.02 * width), b - 0.02 * width)


class Scales(NamedTuple):
    """The outcome of a search for the scales of G vectors."""

    scale: Tensor
    """[G] fp32: the scale; where the target lies beyond the limit, the limit."""
    achieved: Tensor
    """[G] fp32: the rule's measure at that scale; NaN for rules that measure nothing."""
    reached: Tensor
    """[G] bool: whether the measure came within the tolerance of the target."""


def search_scales(
    measure: Callable[[Tensor, Tensor], Tensor],
    n_vectors: int,
    *,
    target: float,
    start: float,
    limit: float,
    tolerance: float = 0.05,
    evaluations: int = 14,
) -> Scales:
    """Find the smallest scale at which each vector's measure equals `target`, within `tolerance` as a fraction of it.

    `measure(which [n], scales [n])` gives the measure [n] of the vectors `which` at those scales; at 0 it is 0. The
    search starts at `start` and never goes beyond `limit`.

    >>> search = search_scales(lambda which, s: (which + 1) * s**2, 3, target=4.0, start=0.1, limit=3.0)
    >>> [round(float(s), 1) for s in search.scale], search.reached.tolist()
    ([2.0, 1.4, 1.1], [True, True, True])
    """
    s = torch.full((n_vectors,), min(start, limit), dtype=torch.float64)
    low, high = torch.zeros_like(s), torch.full_like(s, float("inf"))
    g_low, g_high = torch.zeros_like(s), torch.full_like(s, float("nan"))
    best, achieved = s.clone(), torch.full_like(s, float("nan"))
    done = torch.zeros(n_vectors, dtype=torch.bool)
    reached = torch.zeros(n_vectors, dtype=torch.bool)
    for _ in range(evaluations):
        which = (~done).nonzero()[:, 0]
        if not len(which):
            break
        g = measure(which, s[which].float()).double().cpu().nan_to_num(nan=float("inf"))
        tried = s[which]
        under = g < target
        better = achieved[which].isnan() | ((g - target).abs() < (achieved[which] - target).abs())
        best[which] = torch.where(better, tried, best[which])
        achieved[which] = torch.where(better, g, achieved[which])
        low[which], g_low[which] = torch.where(under, tried, low[which]), torch.where(under, g, g_low[which])
        high[which], g_high[which] = torch.where(under, high[which], tried), torch.where(under, g_high[which], g)
        close = (g - target).abs() <= tolerance * target
        reached[which] = close
        out = under & (tried >= limit)
        best[which], achieved[which] = torch.where(out, tried, best[which]), torch.where(out, g, achieved[which])
        done[which] = close | out
        s[which] = _next_of_many(low[which], high[which], g_low[which], g_high[which], target, limit)
    return Scales(best.float(), achieved.float(), reached)


def _next_of_many(low: Tensor, high: Tensor, g_low: Tensor, g_high: Tensor, target: float, limit: float) -> Tensor:
    """The next scale to try for each bracket; `high` is infinite and `low` 0 where that end is not known."""
    # Without an upper end: up by at most a factor of 2.5, aiming a little beyond the target by the square law of
    # small scales. Without a lower end: down by the same law.
    ratio = (target / g_low.clamp_min(1e-12)).sqrt()
    up = (low * (1.1 * ratio).clamp(1.25, 2.5)).clamp(max=limit)
    down = high * (target / g_high).sqrt().clamp(0.1, 0.8)
    # log g against log s between the ends, kept away from both so that the bracket shrinks in any case
    x, y = low.clamp_min(1e-30).log(), g_low.clamp_min(1e-12).log()
    dx, dy = high.log() - x, g_high.log() - y
    fraction = ((torch.log(torch.tensor(target)) - y) / dy).nan_to_num(nan=0.5).clamp(0.15, 0.85)
    between = (x + fraction * dx).exp()
    unbounded, bare = high.isinf(), low <= 0
    return torch.where(unbounded, up, torch.where(bare, down, between))
