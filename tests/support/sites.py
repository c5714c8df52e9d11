"""A small store whose tokens are hostile text, its SAE and model, and what is known of them by construction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.lm import LanguageModel
from steersman.sae import SAE, FeatureLabel, FeatureLabels, SAEConfig
from steersman.train import ActivationStore
from support.tiny_models import with_text

HOOK = "blocks.1.hook_resid_post"
HOSTILE = [
    "<script>alert(1)</script>", " <img src=x onerror=alert(2)>", "</title>", " \"><b onmouseover='alert(3)'>",
    " שלום", "\u202eevil\u202c", "\x1b[2J", "\n", " 👩‍🚀", " &amp;", "`${alert(4)}`", " مرحبا", " {{ 7*7 }}", "\u2028",
]  # fmt: skip
WIDTH, N_DOCUMENTS, LENGTH = 24, 20, 50


class HostileTokenizer:
    """Every token is text that a page must not run: token i is the i-th of `HOSTILE` and its number, but for the first
    forty, which are ordinary words."""

    def text(self, token: int) -> str:
        return f" word{token}" if token < 40 else HOSTILE[(token - 40) % len(HOSTILE)]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(self.text(int(token)) for token in ids)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0]}


@dataclass(frozen=True, eq=False)
class Planted:
    """A store of 1000 rows, 20 documents of 50 tokens, and an SAE of 130 features whose last ten never fire."""

    sae: SAE
    store: ActivationStore
    lm: LanguageModel
    dense: Tensor
    """[1000, 130]: the code of every row."""
    tokens: list[str]
    """The text of every row's token."""
    labels: FeatureLabels


def planted_site(folder: Path) -> Planted:
    """Row r holds token r % 60; features fire on random directions, and more where a token is near."""
    lm = with_text("llama")
    lm.tokenizer = HostileTokenizer()
    g = torch.Generator().manual_seed(0)
    n = N_DOCUMENTS * LENGTH
    x = torch.randn(n, 16, generator=g)
    ids = np.arange(n, dtype=np.int32) % 60
    rows = {"x": x, "token_ids": ids, "doc_ids": np.arange(n) // LENGTH}
    rows["positions"] = (np.arange(n) % LENGTH + 1).astype(np.int32)
    store = ActivationStore.from_tensors([rows], folder / "acts", HOOK, dtype="float32")
    sae = SAE(SAEConfig(d_in=16, d_sae=130, k=6, hook_name=HOOK), g)
    with torch.no_grad():
        sae.b_enc[120:] = -1e6
    tokenizer = HostileTokenizer()
    labels = {i: FeatureLabel(text=f"label-{i} {HOSTILE[i // 2 % len(HOSTILE)]}") for i in range(0, 130, 2)}
    return Planted(
        sae=sae, store=store, lm=lm, dense=sae.encode(x), tokens=[tokenizer.text(int(token)) for token in ids],
        labels=FeatureLabels(labels),
    )  # fmt: skip
