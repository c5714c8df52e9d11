"""The encoder's own answer: `f(v)`, or `f(b_dec + a v) / a` with `scale=a`. Always with its warnings.

Why it misleads (arXiv 2411.08790): a steering vector lies outside the encoder's input distribution (its norm is small,
so the biases decide), and a non-negative code cannot express its negative parts. The decoder bias is no part of v, and
so none of the terms.
"""

from torch import Tensor

from steersman.sae import SAE
from steersman.steer.decompose.task import Task
from steersman.steer.decompose.terms import Terms, largest


def encoder_input(sae: SAE, V: Tensor, scale: float | None) -> Tensor:
    """What the encoder is given for V [B, D]: V itself, or b_dec + a V; fp32."""
    return V.float() if scale is None else sae.b_dec.detach() + scale * V.float()


def encode(task: Task) -> list[Terms]:
    """The code of every vector, at most k largest."""
    a = task.config.scale
    terms = []
    for v in task.vectors:  # one at a time: a dense code of many vectors over 131k latents would be large
        code = task.sae.encode(encoder_input(task.sae, v[None], a))[0].double()
        values = code * task.atoms.norms / (a or 1.0)
        ids = largest(values, task.config.k)
        terms.append(Terms(features=ids, coefficients=values[ids]))
    return terms
