"""From layers to heads: a cheaper search than a profile of every head.

AutoPASTA (arXiv 2409.10790): steer all heads of one layer at a time, keep the best layers, profile the heads of those
alone, and take some of each layer or the best of all. Its sets: 6 layers; 4, 6 or 8 heads of each, or 16, 24, 32 or 64
of all; which is chosen on other examples.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.analysis.heads import Head, HeadProfile, profile_heads, profile_layers

SteerHeads = Callable[[Mapping[int, list[int] | None]], AbstractContextManager[Any]]
"""From {layer: heads, or None for all of them} to what steers those heads, such as
`lambda heads: st.highlight(prompts, spans, heads=heads)`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadSearch:
    """What was found, coarse and fine."""

    layers: HeadProfile
    """The rise of the score with all heads of each layer steered: a profile of one column."""
    heads: HeadProfile
    """The profile of the heads of the best layers."""

    def per_layer(self, k: int) -> list[Head]:
        """The k best heads of each of the best layers, in the order of the model."""
        ranked = self.heads.ranked()
        kept = [[head for head in ranked if head[0] == layer][:k] for layer in self.heads.layers]
        return sorted(head for heads in kept for head in heads)

    def pooled(self, k: int) -> list[Head]:
        """The k best heads of all of them."""
        return self.heads.top(k)


def coarse_to_fine(
    lm: LanguageModel, steer: SteerHeads, score: Callable[[], Tensor], *, layers: int = 6, **settings: Any
) -> HeadSearch:
    """Rank layers by the rise of a score with all heads of one steered, then the heads of the best of them alone.

    L + layers x H runs of `score` in place of L x H. `score` and `settings` as for `profile_heads`; both rankings are
    made on the same half of the examples.
    """
    if not 1 <= layers <= lm.n_layers:
        raise SteersmanError(f"layers must be between 1 and the {lm.n_layers} of {lm.name}, got {layers}")
    whole = profile_layers(lm, lambda layer: steer({layer: None}), score, **settings)
    best = sorted(layer for layer, _ in whole.top(layers))
    return HeadSearch(
        layers=whole,
        heads=profile_heads(lm, lambda layer, head: steer({layer: [head]}), score, layers=best, **settings),
    )
