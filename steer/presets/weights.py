"""Presets that change weights while a context is open."""

from collections.abc import Sequence
from typing import Any

from steersman.lm import LanguageModel
from steersman.steer.presets.base import CODE, Need, Preset
from steersman.steer.weights.delta import Reweighted, WeightDelta, head_columns

TUNED = Need(
    what="the fine-tuned model whose change is taken away", how="LanguageModel.load(...): use a benign one, and do not "
    "train a harmful one for it",
)  # fmt: skip


class SafetyArithmetic(Preset):
    name = "safety_arithmetic"
    title = "Safety Arithmetic, the parameter half"
    source = "arXiv 2406.11801, declare-lab 404fbd5"
    mechanism = "weight-delta context: the largest tenth of a task vector, subtracted"
    certainty = CODE
    values = {"fraction": 0.1, "lam": "3 in the notebook"}
    needs = {
        "tuned": TUNED,
        "base": Need(what="the model that it was tuned from", how="LanguageModel.load(...)"),
    }
    makes = "a context in which the weights are changed; every byte is restored when it closes"
    traps = (
        "subtracting back does not give the weights that were there: the bytes are kept",
        "electing signs over one vector does nothing: left out",
    )
    not_covered = "the harmful fine-tune it was published with"

    def make(self, lm: LanguageModel, *, tuned: Any, base: Any, lam: float = 3.0, fraction: float = 0.1) -> Reweighted:
        return WeightDelta.between(tuned, base).top(fraction).applied(lm, -lam)


class Soteria(Preset):
    name = "soteria"
    title = "Soteria: functional heads of languages"
    source = "arXiv 2502.11244, NeuralSentinel/Soteria b1c63d6"
    mechanism = "head profile by patching, weight-delta context on their columns of the output projection"
    certainty = CODE
    values = {"trials": 25, "shots": 10, "shared": "heads of two languages or more"}
    needs = {
        "tuned": TUNED,
        "base": Need(what="the model that it was tuned from", how="LanguageModel.load(...)"),
        "heads": Need(
            what="[(layer, head), ...]", how="shared_heads([patch_heads(...) for each language], k, at_least=2)"
        ),
    }
    makes = "a context in which the weights are changed; every byte is restored when it closes"
    traps = (
        "a head's size of 128 is hard-coded there: here it follows from the model, also where heads share keys",
        "lam is a whole number there: here any number",
    )
    not_covered = "the harmful fine-tune it was published with"

    def make(
        self, lm: LanguageModel, *, tuned: Any, base: Any, heads: Sequence[tuple[int, int]], lam: float = 1.0
    ) -> Reweighted:
        return WeightDelta.between(tuned, base, only=head_columns(lm, heads)).applied(lm, -lam)
