"""Decoding by more than one stream: mixtures of next-token distributions, strength by need, and particles."""

from steersman.steer.decoding.critic import CriticConfig, TrainedCritic, train_critic
from steersman.steer.decoding.darwin import DarwinConfig, Evolved, darwin
from steersman.steer.decoding.decoder import decode
from steersman.steer.decoding.dynamic import Controlled, KLControl, nucleus_kl
from steersman.steer.decoding.masks import FunctionMask, Mask, NoRepeat, RegexMask
from steersman.steer.decoding.mix import Mix, MixSource
from steersman.steer.decoding.particles import ParticleConfig, best_of_n, particles
from steersman.steer.decoding.population import Candidates, Cost, ParticleSet, Writer
from steersman.steer.decoding.potentials import (
    POTENTIALS,
    Constraint,
    FeaturePotential,
    Potential,
    Reward,
    RolloutValue,
    StatePotential,
    Twist,
)
from steersman.steer.decoding.proposals import Critic, FunctionCritic, Proposal
from steersman.steer.decoding.resampling import (
    RESAMPLERS,
    Multinomial,
    Never,
    Resampler,
    Systematic,
    Truncation,
    WithoutReplacement,
)
from steersman.steer.decoding.sources import Source

__all__ = [
    "POTENTIALS",
    "RESAMPLERS",
    "Candidates",
    "Constraint",
    "Controlled",
    "Cost",
    "Critic",
    "CriticConfig",
    "DarwinConfig",
    "Evolved",
    "FeaturePotential",
    "FunctionCritic",
    "FunctionMask",
    "KLControl",
    "Mask",
    "Mix",
    "MixSource",
    "Multinomial",
    "Never",
    "NoRepeat",
    "ParticleConfig",
    "ParticleSet",
    "Potential",
    "Proposal",
    "RegexMask",
    "Resampler",
    "Reward",
    "RolloutValue",
    "Source",
    "StatePotential",
    "Systematic",
    "TrainedCritic",
    "Truncation",
    "Twist",
    "WithoutReplacement",
    "Writer",
    "best_of_n",
    "darwin",
    "decode",
    "nucleus_kl",
    "particles",
    "train_critic",
]
