"""What many steering vectors do to the features, the map fitted to it, and the vectors read off it (SAE-TS)."""

from steersman.steer.effects.map import EffectMap
from steersman.steer.effects.verify import verify_effect

EffectMap.verify = verify_effect  # declared in the class, which the function needs
