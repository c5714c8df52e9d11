"""The encoder's own answer: `f(v)`, or `f(b_dec + a v) / a` with `scale=a`. Always with its warnings.

Why it misleads (arXiv 2411.08790): a steering vector lies outside the encoder's input distribution (its norm is small,
so the biases decide), and a non-negative code cannot express its negative parts. The decoder bias is no part of v, and
so none of the terms.
"""

from torch import Tensor

from steersman.sae import SAE
from steersman.steer.decompose.base import DecomposeConfig, Method, Null, Problem
from steersman.steer.decompose.terms import Terms, largest

_SMALL = 0.3  # |v| over the median |x| below which the encoder is called out of its range


def encoder_input(sae: SAE, V: Tensor, scale: float | None) -> Tensor:
    """What the encoder is given for V [B, D]: V itself, or b_dec + a V; fp32."""
    return V.float() if scale is None else sae.b_dec.detach() + scale * V.float()


class Encode(Method):
    """The code of v."""

    name = "encode"
    source = "arXiv 2411.08790 (why it misleads)"
    settings = ("scale",)
    null = Null.EQUAL_NORM

    def expresses_negative(self, sae: SAE) -> bool:
        return sae.signed

    def zero_scale(self, config: DecomposeConfig) -> float | None:
        return None if config.scale is None else 1.0

    def terms(self, problem: Problem) -> list[Terms]:
        a = problem.config.scale
        terms = []
        for v in problem.vectors:  # one at a time: a dense code of many vectors over 131k latents would be large
            code = problem.sae.encode(encoder_input(problem.sae, v[None], a))[0].double()
            values = code * problem.atoms.norms / (a or 1.0)
            ids = largest(values, problem.config.k)
            terms.append(Terms(features=ids, coefficients=values[ids]))
        return terms

    def bias_warnings(self, problem: Problem, v: Tensor, ids: list[int], zero: set[int]) -> list[str]:
        cfg, stats = problem.sae.cfg, problem.sae.feature_stats
        shared = len(set(ids) & zero)
        warnings = [
            f"the encoder activates {len(zero)} features for v = 0 too, {shared} of the {len(ids)} found here among "
            "them: " + ("its biases decide, not v" if shared * 2 > len(ids) else "take those for no part of v")
        ]
        if problem.sae.exact_k:
            warnings.append(f"a top-k SAE names up to k = {cfg.k} features for any input, even for v = 0")
        given = float(v.norm()) * (problem.config.scale or 1.0)
        if stats is not None and stats.median_norm > 0 and given < _SMALL * stats.median_norm:
            warnings.append(
                f"the encoder was given a vector of norm {given:.3g}, {given / stats.median_norm:.2g} of the "
                f"activations it was trained on ({stats.median_norm:.3g}): it is far outside its range"
            )
        return warnings
