"""What many steering vectors do to the features, the map fitted to it, and the vectors read off it (SAE-TS)."""

from steersman.steer.effects.map import EffectMap
from steersman.steer.effects.verify import verify_effect

setattr(EffectMap, "verify", verify_effect)  # noqa: B010 (declared in the class for type checkers only)
