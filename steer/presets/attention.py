"""Presets that edit attention and its heads."""

from collections.abc import Sequence
from typing import Any

from steersman.lm import LanguageModel
from steersman.steer.analysis.spans import heavy_edits, heavy_tokens, key_sentences
from steersman.steer.edits import EditSet
from steersman.steer.edits.highlight import highlight_edits
from steersman.steer.methods.head_vectors import function_vector, intervene_on_heads
from steersman.steer.presets.base import CODE, NOTES, PAIRS, REIMPLEMENTED, Need, Preset, at, kept, sides_of
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


PROMPTS = Need(what="the prompts that are highlighted in, one or a list", how="as they will be given to the model")
HEADS_TRAPS = (
    "an implementation of attention that takes no bias ignores it: such a model is refused",
    "heads are query heads, also where several share their keys",
)


class PASTA(Preset):
    name = "pasta"
    title = "Post-hoc attention steering"
    source = "arXiv 2311.02262, QingruZhang/PASTA 56a9138"
    mechanism = "attention bias on what lies outside the highlighted spans, in chosen heads"
    certainty = CODE
    values = {
        "alpha": 0.01,
        "heads": "300 to 500 (LLaMA-7B), 75 to 350 (GPT-J), profiled on 1,000 examples a task",
    }
    needs = {
        "prompts": PROMPTS,
        "spans": Need(what="what is highlighted in each prompt", how="substrings, or (start, stop) of characters"),
    }
    traps = (
        *HEADS_TRAPS,
        "with several spans the published code adds log alpha once for each: here once, outside their union",
        "an attention sink at the BOS is suppressed too: spare_bos=True exempts it",
    )

    def make(
        self, lm: LanguageModel, *, prompts: Any, spans: Any, heads: Any = None, alpha: float = 0.01,
        spare_bos: bool = False,
    ) -> EditSet:  # fmt: skip
        return kept(lm, highlight_edits(lm, prompts, spans, heads=heads, alpha=alpha, spare_bos=spare_bos), self)


class AutoPASTA(Preset):
    name = "auto_pasta"
    title = "AutoPASTA"
    source = "arXiv 2409.10790"
    mechanism = "the sentence that the model itself quotes is highlighted by an attention bias"
    certainty = REIMPLEMENTED
    values = {"alpha": 0.01, "tokens of the quotation": 128, "layers": 6, "heads": "top 4 to 8 a layer, or 16 to 64"}
    needs = {
        "prompts": PROMPTS,
        "contexts": Need(what="the context in each prompt", how="a list of texts"),
        "questions": Need(what="the question of each", how="a list of texts"),
    }
    traps = (
        *HEADS_TRAPS,
        "a wrong quotation is highlighted with full force there: here nothing is, below `threshold`",
    )
    not_covered = "the embedding model that compares sentences (give embed=, else words are compared)"

    def make(
        self, lm: LanguageModel, *, prompts: Sequence[Any], contexts: Sequence[str], questions: Sequence[str],
        heads: Any = None, alpha: float = 0.01, embed: Any = None, threshold: float = 0.5, max_new_tokens: int = 128,
    ) -> EditSet:  # fmt: skip
        found = key_sentences(lm, contexts, questions, embed=embed, threshold=threshold, max_new_tokens=max_new_tokens)
        edits = highlight_edits(lm, list(prompts), [one.spans for one in found], heads=heads, alpha=alpha)
        return kept(lm, edits, self, quoted=[one.sentence if one.matched else None for one in found])


class LLMSteer(Preset):
    name = "llm_steer"
    title = "LLMSteer"
    source = "arXiv 2411.13009"
    mechanism = "attention bias on the tokens that two readings of the context attend to most"
    certainty = NOTES
    values = {"passes": 2, "factor": "above 1"}
    needs = {
        "prompts": PROMPTS,
        "contexts": Need(what="the context in each prompt", how="a list of texts"),
    }
    traps = (
        *HEADS_TRAPS,
        "sums over queries favour early tokens, which more queries see: here means",
        "whether weights are normalised again is not stated there: here they are",
    )
    not_covered = "keeping the steered cache of a context for later questions"

    def make(
        self, lm: LanguageModel, *, prompts: Sequence[Any], contexts: Sequence[str], factor: float = 2.0,
        k: int | None = None, heads: Any = None,
    ) -> EditSet:  # fmt: skip
        heavy = [heavy_tokens(lm, context, k=k) for context in contexts]
        return kept(lm, heavy_edits(lm, list(prompts), heavy, factor=factor, heads=heads), self)
