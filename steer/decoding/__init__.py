"""Decoding by more than one stream: mixtures of next-token distributions, and strength by need."""

from steersman.steer.decoding.dynamic import Controlled, KLControl, nucleus_kl
from steersman.steer.decoding.mix import Mix, MixSource

__all__ = ["Controlled", "KLControl", "Mix", "MixSource", "nucleus_kl"]
