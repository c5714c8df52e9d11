"""Presets that edit attention and its heads."""

from collections.abc import Sequence
from typing import Any

from steersman.lm import LanguageModel
from steersman.steer.edits import EditSet
from steersman.steer.methods.head_vectors import function_vector, intervene_on_heads
from steersman.steer.presets.base import NOTES, PAIRS, Need, Preset, at, sides_of
from steersman.steer.vectors.vector import SteeringVector


class ITI(Preset):
    name = "iti"
    title = "Inference-time intervention"
    source = "arXiv 2306.03341"
    mechanism = "head profile by probe, vectors added to head outputs at hook_z"
    certainty = NOTES
    values = {"k": 48, "alpha": 15.0, "direction": "mass mean", "model": "LLaMA-7B (32 x 32 heads)"}
    needs = {"examples": PAIRS}
    traps = ("of a thousand heads the best look good by chance: the profile holds their null and a held-out column",)

    def make(
        self, lm: LanguageModel, *, examples: Any, k: int | None = None, alpha: float = 15.0, **rest: Any
    ) -> EditSet:
        positive, negative = sides_of(examples)
        heads = lm.n_layers * int(getattr(lm.config, "num_attention_heads", 1))
        k = max(1, round(heads * 48 / 1024)) if k is None else k  # the authors' share of the heads
        return intervene_on_heads(lm, positive, negative, k=k, alpha=alpha, **rest)[0]


class FunctionVector(Preset):
    name = "function_vector"
    title = "Function vectors"
    source = "arXiv 2310.15213"
    mechanism = "head profile by patching, the sum of what the best heads write, added"
    certainty = NOTES
    values = {"heads": "10 (GPT-J), 20 (Llama-2-7B)", "prompts": "100 of ten examples", "layer": "a third of the way"}
    needs = {
        "prompts": Need(what="in-context prompts of the task", how="a list of texts"),
        "heads": Need(
            what="[(layer, head), ...]", how="patch_heads(lm, mean_heads(lm, prompts), shuffled, answers).top(10)"
        ),
    }
    makes = "a steering vector, to be added at the last token of the prompt"

    def make(self, lm: LanguageModel, *, prompts: Sequence[str], heads: Any, layer: float = 1 / 3) -> SteeringVector:
        return function_vector(lm, prompts, heads, hook=at(lm, layer))
