"""What v does to text, not what it is made of: `y = (v / |v|) M + b` with a measured effect map (arXiv 2411.02193).

The map is fitted on unit vectors, each steered at a strength of equal cost, so v is read at unit length. A coefficient
is the predicted change of a feature's mean activation in the text that v makes. It is no part of v: the explained
variance is that of fitting v by the same features' decoder rows.
"""

import torch

from steersman.errors import SteersmanError
from steersman.steer.decompose.task import Task
from steersman.steer.decompose.terms import Terms, fitted, largest, span_of


def effect(task: Task) -> list[Terms]:
    """The predicted effects of every vector, at most k largest."""
    if hasattr(task.effect_map, "check_sae"):
        task.effect_map.check_sae(task.sae)
    D, L = task.sae.cfg.d_in, task.sae.cfg.d_sae
    M = torch.as_tensor(task.effect_map.M).to(task.vectors)
    b = torch.as_tensor(task.effect_map.b).to(task.vectors)
    if M.shape != (D, L) or b.shape != (L,):
        raise SteersmanError(
            f"this effect map is of another SAE: it maps {tuple(M.shape)}, the SAE has d_in {D} and d_sae {L}"
        )
    terms = []
    for v in task.vectors:
        y = (v / v.norm()) @ M + b
        ids = largest(y, task.config.k)
        curve = fitted(v, span_of(task.atoms, ids))
        terms.append(Terms(features=ids, coefficients=y[ids], curve=curve))
    return terms
