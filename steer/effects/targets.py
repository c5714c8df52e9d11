"""What an effect should be: target features with their weights, in any of the ways that a user writes them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from steersman.errors import SteersmanError

Targets = Mapping[int, float] | Tensor | int | Sequence[int]
"""{feature: weight}, a tensor [L], one feature, or several of weight 1."""


def weights_of(targets: Targets, d_sae: int) -> dict[int, float]:
    """Target weights by feature, from what a user writes."""
    if isinstance(targets, Mapping):
        return {int(j): float(w) for j, w in targets.items()}
    if isinstance(targets, Tensor):
        if targets.shape != (d_sae,):
            raise SteersmanError(f"target weights must be [{d_sae}], one for each feature, got {tuple(targets.shape)}")
        return {int(j): float(targets[j]) for j in targets.nonzero()[:, 0]}
    if isinstance(targets, int):
        return {targets: 1.0}
    if isinstance(targets, Sequence) and not isinstance(targets, str):
        return {int(j): 1.0 for j in targets}
    raise SteersmanError(f"targets are {{feature: weight}}, feature ids or a tensor [{d_sae}], got {targets!r}")
