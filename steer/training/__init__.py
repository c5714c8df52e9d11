"""Trained edits: one loop, five losses, and the systems that are made of them."""

from steersman.steer.training import bipo, reft_r1, ssv  # noqa: F401 (a method is there when its file was read)
from steersman.steer.training.edit_method import EDIT_METHODS, EditMethod, edit_from_examples
from steersman.steer.training.latent import memorise
from steersman.steer.training.loop import TrainedEdit, TrainEditConfig, train_edit
from steersman.steer.training.loreft import loreft
from steersman.steer.training.losses import Imitated, Imitation, Likelihood, Loss, Preference, ProbeLoss, Separation
from steersman.steer.training.psr import prompted_answers, psr
from steersman.steer.training.sae_ssv import sae_ssv

__all__ = [
    "EDIT_METHODS",
    "EditMethod",
    "Imitated",
    "Imitation",
    "Likelihood",
    "Loss",
    "Preference",
    "ProbeLoss",
    "Separation",
    "TrainEditConfig",
    "TrainedEdit",
    "edit_from_examples",
    "loreft",
    "memorise",
    "prompted_answers",
    "psr",
    "sae_ssv",
    "train_edit",
]
