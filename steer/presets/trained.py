"""Presets that are trained: one loop, with a loss for each."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from steersman.lm import LanguageModel
from steersman.steer.edits import EditSet
from steersman.steer.methods.contrast import contrast
from steersman.steer.presets.base import (
    CODE,
    NOTES,
    PAPER,
    REIMPLEMENTED,
    SAE_NEED,
    TEXTS_NEED,
    Need,
    Preset,
    at,
    saes_of,
    sides_of,
)
from steersman.steer.training.psr import CONFIG, prompted_answers, psr
from steersman.steer.training.sae_ssv import sae_ssv
from steersman.steer.vectors.vector import SteeringVector

ANSWERS = Need(
    what="(positive, negative) examples, each a prompt and its answer",
    how="two lists of (prompt, answer), or a JSONL file",
)


class _TrainedVector(Preset):
    """A vector by a trained method."""

    mechanism = "trained vector, added"
    makes = "a steering vector"
    needs = {"examples": ANSWERS}
    method = ""
    fraction = 0.5

    def make(self, lm: LanguageModel, *, examples: Any, layer: float | None = None, **settings: Any) -> SteeringVector:
        positive, negative = sides_of(examples)
        hook = at(lm, self.fraction if layer is None else layer)
        return contrast(lm, positive, negative, hook=hook, method=self.method, diagnostics=False, **settings)


class LatentSteering(_TrainedVector):
    name = "latent_steering"
    title = "Latent steering vectors"
    source = "arXiv 2205.05124"
    certainty = "abstract read; the formula from " + REIMPLEMENTED
    values = {"layers": "6 and 7 of 12 (GPT-2)", "optimiser": "Adam, lr 1, 500 steps", "lam": "of z_pos - z_neg"}
    needs = {"examples": Need(what="(positive, negative) texts", how="two lists of texts, or a JSONL file")}
    method = "latent"
    traps = (
        "the re-implementation normalises z and multiplies it by .1, so that its norm means nothing: not here",
        "'first token only' needs position 0 in the cache: steer every token, the BOS too",
        "a norm far above the median |h| memorises anything: it is in the notes",
    )


class TrainedStyle(_TrainedVector):
    name = "style_vectors_trained"
    title = "Style vectors, trained"
    source = "arXiv 2402.01618, DLR-SC/style-vectors-for-steering-llms"
    certainty = CODE
    values = {"optimiser": "Adam, lr .01, 400 epochs, three layers jointly", "layers": "18 to 20 of 32"}
    needs = {"examples": Need(what="(texts of the style, texts of others)", how="two lists, or a JSONL file")}
    method = "latent"
    fraction = 0.6
    traps = ("their loss feeds the model its own guesses in place of the text: here the text is forced",)


class SSVPreset(_TrainedVector):
    name = "ssv"
    title = "Supervised steering vector (AxBench)"
    source = "arXiv 2501.17148, stanfordnlp/axbench e9b8cd4"
    certainty = CODE
    values = {"lr": 0.01, "batch": 6, "epochs": 3, "layers": "10 and 20 of Gemma-2-2B", "factors": ".2 to 5"}
    method = "ssv"
    traps = (
        "strength there is factor x max_act x v with |v| in max_act too, so it grows with |v|^2: here scale 1 is the "
        "vector as it was trained",
    )


class ReFTR1Preset(_TrainedVector):
    name = "reft_r1"
    title = "ReFT-r1 (AxBench)"
    source = "arXiv 2501.17148, stanfordnlp/axbench e9b8cd4"
    certainty = CODE
    values = {
        "lr": "0.01 (2B), 0.005 (9B)", "batch": 6, "epochs": 3, "top": 8, "sparsity": 0.005, "examples": "72 + 72",
        "factors": ".2 to 5 times the largest activation", "layers": "10 and 20 of Gemma-2-2B",
    }  # fmt: skip
    method = "reft_r1"
    traps = (
        "after the last step v is not of unit length, and equal first entries are the all-ones direction: not here",
        "padding may be among the 8 largest activations: not here",
        "at test the gate is gone, in the published code and here: training and test edits differ",
    )
    not_covered = "the judge of the score; detection reads the same vector"


class BiPOPreset(_TrainedVector):
    name = "bipo"
    title = "Bi-directional preference optimisation"
    source = "arXiv 2406.00045"
    certainty = CODE
    values = {"beta": 0.1, "lr": 5e-4, "batch": 4, "epochs": "5 to 20 of 100"}
    method = "bipo"
    traps = ("the weight decay of the script never reaches its trainer: none here",)


class PSRPreset(Preset):
    name = "psr"
    title = "Prompt steering replacement"
    source = "arXiv 2605.03907"
    mechanism = "direction edit, rule probe, trained to imitate the prompted model"
    certainty = NOTES
    values = {"layers": "one (S-PSR) or all (A-PSR)", "triplets": 1000, "strength at test": "bisection to coherence 80"}
    needs = {
        "prompts": Need(what="prompts to train on", how="a list of texts"),
        "instruction": Need(what="what stands before a prompt and works", how="a text"),
    }
    traps = (
        "the teacher is the prompted model, so it can teach nothing that the prompt does not do",
        "answers are the same and prompts are not: states are aligned by answer, not by position",
        "one replicator found it below a constant vector: compare with `ssv` on the same answers",
    )
    not_covered = "the judge that filters answers and gives soft labels (Imitated.strength takes them)"

    def make(
        self, lm: LanguageModel, *, prompts: Sequence[str], instruction: str, layer: float | None = 0.5,
        loss: str = "imitation", max_new_tokens: int = 40, answers: Any = None, scope: str = "all", epochs: int = 10,
    ) -> EditSet:  # fmt: skip
        items = answers
        if items is None:
            items = prompted_answers(lm, prompts, instruction, max_new_tokens=max_new_tokens)
        hooks = [at(lm, layer)] if layer is not None else [f"blocks.{i}.hook_resid_post" for i in range(lm.n_layers)]
        choices: Any = {"loss": loss, "scope": scope, "config": replace(CONFIG, epochs=epochs)}
        return psr(lm, items, hook=hooks, **choices)


class SAESSV(Preset):
    name = "sae_ssv"
    title = "SAE-SSV"
    source = "arXiv 2505.16188"
    mechanism = "features by F and probes, a vector over them trained for separation and likelihood"
    certainty = PAPER
    values = {
        "candidates": 128, "probes": 50, "weights": "1.0 distance, .5 likelihood, .01 L1", "lr": 0.05,
        "layers": "16 (Llama-3.1-8B), 13 to 16 (Gemma-2-2B), 20 to 26 (9B)", "scale": "1 to 10",
    }  # fmt: skip
    needs = {"sae": SAE_NEED, "examples": TEXTS_NEED}
    makes = "a steering vector"
    traps = (
        "the published distance is linear in v and unbounded below: Adam then moves every coordinate by a step "
        "whatever its size, and the result is a vector of signs. The margin (default) is bounded",
        "decoding z' drops the error term: here W_dec v is added",
    )

    def make(
        self,
        lm: LanguageModel,
        *,
        sae: Any,
        examples: Any,
        distance: str = "margin",
        candidates: int = 128,
        probes: int = 50,
        likelihood: float = 0.5,
        l1: float = 0.01,
    ) -> SteeringVector:
        (one,) = saes_of(sae)
        positive, negative = sides_of(examples)
        choices: Any = {"distance": distance, "candidates": candidates, "probes": probes}
        return sae_ssv(lm, one, positive, negative, likelihood=likelihood, l1=l1, **choices)
