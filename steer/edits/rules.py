"""How much an edit writes, as a function of what it reads: the closed list that vectors, probes and features share.

With rho what is read of h, s the strength, m a threshold and u the direction written, an edit is h + k(rho) u:

| rule | k | changes nothing at |
|---|---|---|
| `add` | s | s = 0 |
| `set` | s - rho | |
| `floor` | relu(s - rho) | s = -inf |
| `cap` | -relu(rho - s) | s = inf |
| `scale` | (s - 1) rho; s = 0 ablates | s = 1 |
| `project_out` | -s rho, which is `scale` by 1 - s | s = 0 |
| `positive_clamp` | s - relu(rho) | |
| `mirror` | 2 s (m - rho) where rho < m | s = 0, m = -inf |
| `set_if_below` | s - rho where rho < m | m = -inf |
| `probe` | s relu(rho) | s = 0 |
| `rotate` | turns h in a plane, see `rotated` | |

Sources: `cap` and `floor` are the capping of arXiv 2601.10387; `floor` and `positive_clamp` AxBench's thresholding and
clamping (2501.17148); `probe` ReFT-r1's and PSR's gate (2501.17148, 2605.03907); `set_if_below` and `mirror` StTP and
StMP (2604.08169), of which the first jumps at m by s - m; `rotate` angular steering (2510.26243).

Shape letters: n tokens, M directions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.errors import SteersmanError, near_names


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of the table."""

    coefficient: Callable[[Tensor, Tensor, Tensor], Tensor]
    """k from rho, s and m, each [n, M] or broadcast to it."""
    idle: Callable[[Tensor, Tensor], Tensor] = lambda s, m: torch.zeros_like(s + m, dtype=torch.bool)
    """Where s and m are such that nothing is ever changed."""
    reads: bool = True
    """Whether k depends on rho."""
    affine: bool = False
    """Whether k is an affine function of rho."""
    plain: bool = False
    """Whether s is a factor, and no value that rho might have."""
    limit: float = math.nan
    """The infinite strength that has a meaning, if one has."""
    thresholds: bool = False
    """Whether m is read."""


def rotated(rho: Tensor, degrees: Tensor, share: Tensor) -> Tensor:
    """What is added along an orthonormal pair to turn the part of h in its plane, rho [n, 2], to the angle `degrees`
    from the first towards the second: h - P h + |P h| (cos s, sin s), arXiv 2510.26243.

    `share` of the turn is made, the shorter way round, so that every share keeps |h|.
    """
    length, angle = rho.norm(dim=-1, keepdim=True), torch.atan2(rho[..., 1:], rho[..., :1])
    turn = torch.remainder(torch.deg2rad(degrees[..., :1]) - angle + math.pi, 2 * math.pi) - math.pi
    new = angle + share[..., :1] * turn
    return length * torch.cat([new.cos(), new.sin()], dim=-1) - rho


def _rotate(rho: Tensor, s: Tensor, m: Tensor) -> Tensor:
    return rotated(rho, s, torch.ones_like(s))


RULES: dict[str, Rule] = {
    "add": Rule(coefficient=lambda rho, s, m: s, idle=lambda s, m: s == 0, reads=False, affine=True),
    "set": Rule(coefficient=lambda rho, s, m: s - rho, affine=True),
    "floor": Rule(coefficient=lambda rho, s, m: (s - rho).relu(), idle=lambda s, m: s == -torch.inf, limit=-math.inf),
    "cap": Rule(coefficient=lambda rho, s, m: -(rho - s).relu(), idle=lambda s, m: s == torch.inf, limit=math.inf),
    "scale": Rule(coefficient=lambda rho, s, m: (s - 1) * rho, idle=lambda s, m: s == 1, affine=True, plain=True),
    "project_out": Rule(coefficient=lambda rho, s, m: -s * rho, idle=lambda s, m: s == 0, affine=True, plain=True),
    "positive_clamp": Rule(coefficient=lambda rho, s, m: s - rho.relu()),
    "mirror": Rule(
        coefficient=lambda rho, s, m: torch.where(rho < m, 2 * s * (m - rho), 0.0),
        idle=lambda s, m: (s == 0) | (m == -torch.inf),
        plain=True,
        thresholds=True,
    ),
    "set_if_below": Rule(
        coefficient=lambda rho, s, m: torch.where(rho < m, s - rho, 0.0),
        idle=lambda s, m: (m == -torch.inf).expand_as(s + m),
        thresholds=True,
    ),
    "probe": Rule(coefficient=lambda rho, s, m: s * rho.relu(), idle=lambda s, m: s == 0, plain=True),
    "rotate": Rule(coefficient=_rotate, plain=True),
}
"""Name -> rule: see the table of `steersman.steer.edits.rules`."""


def rule_named(name: str) -> Rule:
    """The rule of a name. Raises SteersmanError for one that is none."""
    if name not in RULES:
        near = near_names(name, list(RULES), limit=1)
        hint = f"; the nearest is {near!r}" if near else ""
        raise SteersmanError(f"unknown rule {name!r}: use one of {', '.join(RULES)}{hint}")
    return RULES[name]
