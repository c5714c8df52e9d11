"""Published systems as settings of the mechanisms that are here: `preset("cast").build(lm, ...)`.

One file for each family of mechanisms; each preset says its source, what its authors set, what it needs, how surely
that was checked, and what it does not cover.
"""

from steersman.steer.presets import (  # noqa: F401 (a preset is there when its file was read)
    attention,
    decoding,
    features,
    mixtures,
    operators,
    trained,
    uncovered,
    vectors,
    weights,
)
from steersman.steer.presets.base import PRESETS, Decoder, Need, Preset, preset

__all__ = ["PRESETS", "Decoder", "Need", "Preset", "preset"]
