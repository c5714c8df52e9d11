"""What `evaluate_steering` is asked to measure."""

import math
from dataclasses import dataclass

from steersman.config import check_types
from steersman.errors import SteersmanError

SCALES = (0.5, 1.0, 2.0, 4.0)  # not the field's default: a flag that may be repeated adds to its default


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How steering is measured."""

    scale: tuple[float, ...] = ()
    """Multiples of the vector; without any, 0.5, 1, 2 and 4. 0 (unsteered) is always measured too; negative ones may
    be given."""
    scope: str | None = None
    """Tokens to steer: all, prompt, generation, last_prompt, a window such as 2:10, tokens:15,27, or several joined by
    +; by default all, or those that edits of a file are meant for."""
    samples: int = 1
    """Continuations per prompt and scale."""
    max_new_tokens: int = 32
    """Tokens per continuation."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float | None = None
    """Nucleus sampling: keep the smallest set of tokens with this probability."""
    batch_size: int = 32
    """Rows per forward pass or generation."""
    max_nll_rise: float = 1.0
    """What a scale may cost to be chosen: nats per token of the steered text under the unsteered model, above those of
    unsteered text."""
    seed: int = 0
    """Seed of the sampling, the random direction and the intervals."""

    def __post_init__(self) -> None:
        check_types(self)
        if not all(map(math.isfinite, self.scale)):
            raise SteersmanError(f"a scale must be a finite number, got {', '.join(map(str, self.scale))}")
        if len(set(self.scale)) != len(self.scale):
            raise SteersmanError(f"a scale is repeated: {', '.join(f'{s:g}' for s in self.scale)}")
        if self.samples < 1 or self.batch_size < 1 or self.max_new_tokens < 1:
            raise SteersmanError("samples, batch_size and max_new_tokens must be at least 1")
        if self.temperature < 0 or (self.temperature == 0 and (self.top_p is not None or self.samples > 1)):
            raise SteersmanError("greedy decoding (temperature 0) takes no top_p and gives one sample per prompt")

    @property
    def steered_scales(self) -> list[float]:
        """The scales to measure besides 0, rising."""
        return sorted(s for s in self.scale or SCALES if s != 0)
