"""A small language model in which a direction is a concept: its tokens write it, and it makes their logits larger."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steersman.lm import LanguageModel
from support.tiny_models import D, V, with_text

LAST = "blocks.2.hook_resid_post"
"""The last hook point. There is no norm behind it: the logits are linear in what it holds."""


@dataclass(frozen=True, eq=False)
class Planted:
    """The model and what is in it."""

    lm: LanguageModel
    direction: Tensor
    """[D], of norm 1."""
    words: list[str]
    """The tokens of the concept."""
    others: list[str]
    """The rest."""

    def text(self, g: torch.Generator, n: int, of: list[str]) -> str:
        """n words drawn from a list."""
        return " ".join(of[i] for i in torch.randint(0, len(of), (n,), generator=g).tolist())

    def pairs(self, n: int, seed: int = 0, length: int = 5) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """(prompt, answer) with words of the concept in the answer, and the same prompts with others."""
        g = torch.Generator().manual_seed(seed)
        prompts = [self.text(g, 3, self.others) for _ in range(n)]
        sides = [[(p, " " + self.text(g, length, of)) for p in prompts] for of in (self.words, self.others)]
        return sides[0], sides[1]


def concept_lm(written: float = 3.0, read: float = 1.0) -> Planted:
    """Tokens w30 to w39 write `written` times the direction, and their logits rise by `read` per unit of it. What else
    the model does is small beside that."""
    lm = with_text("llama")
    direction = torch.randn(D, generator=torch.Generator().manual_seed(7))
    direction = direction / direction.norm()
    with torch.no_grad():
        lm.model.model.norm = nn.Identity()
        lm.model.lm_head.weight *= 0.3
        for block in lm.model.model.layers:
            block.self_attn.o_proj.weight *= 0.1
            block.mlp.down_proj.weight *= 0.1
        lm.model.model.embed_tokens.weight[30:40] += written * direction
        lm.model.lm_head.weight[30:40] += read * direction
    words = [f"w{i}" for i in range(30, 40)]
    return Planted(lm, direction, words, [f"w{i}" for i in range(4, V) if not 30 <= i < 40])
