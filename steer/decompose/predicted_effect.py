"""What v does to text, not what it is made of: `y = (v / |v|) M + b` with a measured effect map (arXiv 2411.02193).

The map is fitted on unit vectors, each steered at a strength of equal cost, so v is read at unit length. A coefficient
is the predicted change of a feature's mean activation in the text that v makes. It is no part of v: the explained
variance is that of fitting v by the same features' decoder rows.
"""

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.steer.decompose.base import LinearEffect, Method, Problem, Sources
from steersman.steer.decompose.terms import Terms, largest, projected_ev, refit, span_of


class PredictedEffect(Method):
    """The effects that a map predicts."""

    name = "effect"
    source = "arXiv 2411.02193"
    reads = ("effect_map",)
    units = "coefficients are predicted changes of mean activations in text steered by v at unit length"

    def read(self, sources: Sources) -> LinearEffect:
        effect_map = sources.effect_map
        assert effect_map is not None
        if (check_sae := getattr(effect_map, "check_sae", None)) is not None:
            check_sae(sources.sae)
        D, L = sources.sae.cfg.d_in, sources.sae.cfg.d_sae
        if effect_map.M.shape != (D, L) or effect_map.b.shape != (L,):
            raise SteersmanError(
                f"this effect map is of another SAE: it maps {tuple(effect_map.M.shape)}, the SAE has d_in {D} and "
                f"d_sae {L}"
            )
        return effect_map

    def terms(self, problem: Problem) -> list[Terms]:
        M = torch.as_tensor(problem.data.M).to(problem.vectors)
        b = torch.as_tensor(problem.data.b).to(problem.vectors)
        terms = []
        for v in problem.vectors:
            y = (v / v.norm()) @ M + b
            ids = largest(y, problem.config.k)
            curve = projected_ev(v, span_of(problem.atoms, ids))
            terms.append(Terms(features=ids, coefficients=y[ids], curve=curve))
        return terms

    def parts(self, problem: Problem, v: Tensor, terms: Terms) -> Tensor:
        return refit(v, problem.atoms, terms.features)
