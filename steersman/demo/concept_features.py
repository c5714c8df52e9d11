"""Which feature of an SAE stands for which concept of the grammar, by AUROC against the exact labels.

Shape letters: T tokens, L latents, C concepts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steersman.demo.concepts import CONCEPTS
from steersman.demo.grammar import Story, concept_labels
from steersman.lm import LanguageModel
from steersman.lm.final_norm import norm_gain
from steersman.ranking import auroc
from steersman.sae import SAE

__all__ = ["ConceptFeature", "auroc", "encode_stories", "match_concepts", "writing_features"]


@dataclass(frozen=True, kw_only=True)
class ConceptFeature:
    """The feature that tells a concept's words from all others best."""

    concept: str
    """Name of the concept."""
    feature: int
    """Feature id, chosen on one half of the stories."""
    auroc: float
    """Area under the ROC curve of its activation on the other half: 0.5 is chance, 1 perfect."""
    n_tokens: int
    """Tokens of the concept's words in that half."""


@torch.no_grad()
def encode_stories(lm: LanguageModel, sae: SAE, stories: Sequence[Story]) -> tuple[Tensor, Tensor]:
    """Codes [T, L] and labels [T, C] of all tokens of `stories` but BOS, each story by itself."""
    codes, labels = [], []
    for start in range(0, len(stories), 32):
        part = stories[start : start + 32]
        batch = lm.encode([story.text for story in part])
        h = lm.capture(batch.input_ids, batch.attention_mask, hooks=[sae.cfg.hook_name])[sae.cfg.hook_name]
        for row, story in enumerate(part):
            encoded = lm.tokenizer(story.text, add_special_tokens=False, return_offsets_mapping=True)
            n = len(encoded["offset_mapping"])
            first = int(batch.attention_mask[row].sum()) - n  # BOS, where there is one
            codes.append(sae.encode(h[row, first : first + n]).cpu())
            labels.append(torch.from_numpy(concept_labels(story.spans, encoded["offset_mapping"])))
    return torch.cat(codes), torch.cat(labels)


def match_concepts(lm: LanguageModel, sae: SAE, stories: Sequence[Story]) -> list[ConceptFeature]:
    """The best feature of each concept, chosen on the first half of `stories` and scored on the second; best first."""
    half = len(stories) // 2
    choosing, scoring = (encode_stories(lm, sae, part) for part in (stories[:half], stories[half:]))
    chosen = np.nan_to_num(auroc(*choosing).numpy(), nan=-1.0).argmax(axis=0)
    codes, labels = scoring
    scores = auroc(codes[:, chosen], labels)
    found = [
        ConceptFeature(
            concept=name, feature=int(chosen[c]), auroc=float(scores[c, c]), n_tokens=int(labels[:, c].sum())
        )
        for c, name in enumerate(CONCEPTS)
        if bool(labels[:, c].any())
    ]
    return sorted(found, key=lambda match: -match.auroc)


@torch.no_grad()
def writing_features(lm: LanguageModel, sae: SAE, words: Sequence[str], n: int = 4) -> list[int]:
    """The n features whose decoder rows raise the logits of `words` most above the mean of all tokens (logit lens)."""
    W_U, norm = lm.unembed()
    first = torch.tensor([lm.token_ids(" " + word)[0] for word in words], device=W_U.device)
    logits = (sae.W_dec.to(W_U.device) * norm_gain(norm).to(W_U.device)) @ W_U.float()
    score = logits[:, first].mean(dim=1) - logits.mean(dim=1)
    return score.topk(min(n, len(score))).indices.tolist()
