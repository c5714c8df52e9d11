"""A playground on a free port of this machine, and an SAE for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from steersman.sae import SAE, FeatureLabels, SAEConfig

if TYPE_CHECKING:
    from steersman.ui.playground.app import Playground

HOOK = "blocks.2.hook_resid_post"
PROMPT = "Once upon a time"


def demo_sae(folder: Path, labels: FeatureLabels | None = None) -> Path:
    """An untrained SAE of the bundled model, saved to `folder`."""
    config = SAEConfig(d_in=128, d_sae=32, k=4, hook_name=HOOK, model_name="steersman-demo")
    sae = SAE(config, torch.Generator().manual_seed(0))
    sae.labels = labels or FeatureLabels()
    sae.save(folder)
    return folder


@contextmanager
def served(playground: Playground, token: str | None = None) -> Iterator[str]:
    """The address of a real server, which has ended when the block has."""
    from steersman.ui.playground.serving import address, bound, server_of

    opened = bound("127.0.0.1", 0)
    server = server_of(playground)
    thread = threading.Thread(target=lambda: server.run(sockets=[opened]))
    thread.start()
    try:
        yield address("127.0.0.1", opened, token)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
