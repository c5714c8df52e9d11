"""A small model with text, an SAE on it and settings that measure in a moment."""

import os
import signal
import time
from typing import Any

import torch

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.parallel import rank_and_world_size
from steersman.sae import SAE
from steersman.steer.effects import collect
from steersman.steer.effects.config import EffectsConfig
from support.tiny_models import D, toy_sae, with_text

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["w5 w6 w7 w8 w9", "w10 w11 w12", "w12 w13 w14 w15"]


def toy(k: int = 8) -> tuple[LanguageModel, SAE]:
    lm = with_text("llama")
    sae = toy_sae(HOOK, k=k)
    with torch.no_grad():
        sae.b_enc += 0.5
        lm.model.lm_head.weight *= 5  # a model sure enough of itself for steering to change what it says
    return lm, sae


def quick(**changes: Any) -> EffectsConfig:
    settings: dict[str, Any] = {
        "vectors": "random", "n_vectors": 7, "scale_rule": "fixed", "scale_target": 2.0, "rollouts": 6, "new_tokens": 5,
        "prompts": ("w5 w6", "w7"), "top_p": None, "top_k": None, "shard_vectors": 3, "batch_rows": 18,
    }  # fmt: skip
    return EffectsConfig(**{**settings, **changes})


def measure_in_a_job(out: str, event: str = "", victim: int = 0, **changes: Any) -> Any:
    """`collect_effects` as one rank of a job, with something happening to rank `victim` before its second shard: how
    it ended, the seconds from then on, and the message."""
    shard, done = collect._shard, []
    since = time.monotonic()

    def eventful(*args: Any) -> Any:
        nonlocal since
        done.append(1)
        since = time.monotonic()
        if rank_and_world_size()[0] == victim and event == "mistake":
            raise SteersmanError("the second rank's own")
        if len(done) == 2 and rank_and_world_size()[0] == victim and event:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[event])
        return shard(*args)

    collect._shard = eventful
    lm, sae = toy()
    try:
        effects = collect.collect_effects(lm, sae, config=quick(out=out, **changes))
    except SteersmanError as error:
        return type(error).__name__, time.monotonic() - since, str(error)
    finally:
        collect._shard = shard
    return "done", time.monotonic() - since, str(len(effects))


def width() -> int:
    return D
