"""`evaluate_steering`: what a vector does, beside what everything simpler does.

The arms of a report are always the same: `vector`; `random`, a random direction of equal norm; `diffmean`, the
difference of the means of the examples at equal norm; `prompt`, words put before each prompt; `unsteered`. An arm that
cannot be made says why in `missing`. Every measure is kept per prompt, so that its interval is over prompts. Half of
the prompts (the even ones) choose an arm's scale, the other half report what it does.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from steersman.config import merged
from steersman.conversations import Document, is_blank, is_conversation, with_prefix
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.progress import progress
from steersman.sae import SAE
from steersman.steer.dose import Dose, Dosed, steered
from steersman.steer.evaluation.config import EvaluationConfig
from steersman.steer.evaluation.forced import ContinuationLike, as_continuations, heldout_loss, margins
from steersman.steer.evaluation.report import ArmReport, Point, SteeringEvaluation, choose_scale
from steersman.steer.evaluation.rollouts import Arm, Judge, Targets, roll_out, unsteered
from steersman.steer.methods import contrast
from steersman.steer.methods.examples import ExamplesLike, as_examples
from steersman.steer.steerer import Steerer
from steersman.steer.vectors.vector import SteeringVector


def evaluate_steering(
    lm: LanguageModel,
    vector: Dosed,
    prompts: Sequence[Document],
    config: EvaluationConfig | None = None,
    *,
    words: Sequence[str] = (),
    texts: Sequence[Document] = (),
    continuations: Sequence[ContinuationLike] = (),
    positive: ExamplesLike = (),
    negative: ExamplesLike = (),
    prompt_prefix: str | None = None,
    sae: SAE | None = None,
    features: Sequence[int] = (),
    judge: Judge | None = None,
    criterion: str = "",
    **settings: Any,
) -> SteeringEvaluation:
    """Measure a vector, or another way of steering, against its baselines, with no judge unless one is given.

    Args:
        lm: the model, unsteered.
        vector: a vector, {hook point: edit}, a recipe, or a function from a scale to a context manager; scales
            multiply it.
        prompts: what is continued, texts or conversations; at least two, better twenty.
        config: scales, sampling and the rest; `**settings` are fields of it, over those of `config`.
        words: words that should become more frequent.
        texts: held-out texts for the loss while steering.
        continuations: (prompt, positive, negative) for the log-likelihood of whole continuations.
        positive, negative: examples for the `diffmean` baseline.
        prompt_prefix: what the prompting baseline puts before each prompt (in a conversation as its system message);
            by default the first positive example.
        sae, features: an SAE and the features that should rise, for target rise, side effects and specificity.
        judge, criterion: marks completions from 0 to 1.

    A scale is chosen by the first of these that is measured: judge, word rate, margin of the continuations, target
    rise; without any of them the largest scale that costs no more than `max_nll_rise`. Raises SteersmanError for empty
    prompts and texts, a vector that is zero or does not fit the model, and an SAE of another one.
    """
    config = merged(EvaluationConfig, config, settings)
    st = Steerer(lm)
    prompts, texts = check_request(vector, prompts, texts, has_sae=sae is not None, features=features)
    items = as_continuations(continuations)
    is_vector = isinstance(vector, SteeringVector)
    steered(vector, st, scope=config.scope)  # refuses what does not fit before anything is run
    if sae is not None:
        st.features(sae, dict.fromkeys(features or (0,), 0.0))  # checks model, hook point, width and ids
    targets = Targets(words=tuple(words), sae=sae, features=tuple(features), judge=judge, criterion=criterion)

    missing: dict[str, str] = {}
    arms: dict[str, Dosed] = {"vector": vector}
    if is_vector:
        arms["random"] = vector.random_like(config.seed)
    else:
        missing["random"] = missing["diffmean"] = "what is evaluated is no vector, so nothing has an equal norm"
    if is_vector and positive and negative:
        other = contrast(lm, positive, negative, hook=vector.hook_names, method="diffmean", diagnostics=False)
        arms["diffmean"] = _as_long_as(other, vector)
    elif is_vector:
        missing["diffmean"] = "no positive and negative examples were given"
    if prompt_prefix is None and positive:
        example = as_examples(positive, "positive")[0]
        prompt_prefix = (example.text if isinstance(example.text, str) else example.answer).strip() + " "
    if not prompt_prefix:
        missing["prompt"] = "no prompt prefix and no positive examples were given"

    bar = progress(total=len(arms) * len(config.steered_scales) + 1 + bool(prompt_prefix), desc="evaluating")

    def measure(arm: Arm, scale: float, prefix: str = "", baseline: np.ndarray | None = None) -> Point:
        made = roll_out(lm, prompts, arm, targets, config, prefix=prefix, baseline=baseline)
        forced: dict[str, np.ndarray] = {}
        if texts and not prefix:
            forced["heldout_loss"] = heldout_loss(lm, texts, arm, config.batch_size)
        if items:
            shown = [_after(prefix, item) for item in items] if prefix else items
            forced["margin"] = margins(lm, shown, arm, config.batch_size)
        bar.update()
        return Point(scale=scale, values=made.values, forced=forced, texts=made.texts, activations=made.activations)

    with bar:
        plain = measure(unsteered, 0.0)
        reports = {"unsteered": ArmReport(name="unsteered", points=[plain], norm=0.0)}
        for name, what in arms.items():
            points = [
                measure(_arm(st, what, scale, config.scope), scale, baseline=plain.activations)
                for scale in config.steered_scales
            ]
            points = sorted([plain, *points], key=lambda point: point.scale)
            norm = what.norm() if isinstance(what, SteeringVector) else None
            reports[name] = ArmReport(name=name, points=points, norm=norm)
        if prompt_prefix:
            point = measure(unsteered, 0.0, prompt_prefix, plain.activations)
            reports["prompt"] = ArmReport(name="prompt", points=[point], norm=0.0)
    objective = _objective(targets, bool(items))
    chosen = {name: choose_scale(arm, plain, objective, config.max_nll_rise) for name, arm in reports.items()}
    return SteeringEvaluation(
        model_name=lm.name,
        vector=_about(vector),
        prompts=[prompt if isinstance(prompt, str) else lm.written(prompt) for prompt in prompts],
        arms=reports,
        chosen=chosen,
        missing=missing,
        objective=objective,
        prompt_prefix=prompt_prefix or "",
        config=config,
    )


def check_request(
    vector: Dosed, prompts: Sequence[Document], texts: Sequence[Document], *, has_sae: bool, features: Sequence[int]
) -> tuple[list[Document], list[Document]]:
    """The prompts and texts as lists. Raises SteersmanError for what cannot be evaluated, as far as this can be known
    before a model is loaded."""
    found = _checked_texts(prompts, "prompt", least=2), _checked_texts(texts, "text") if texts else []
    if isinstance(vector, SteeringVector):
        vector.check_not_zero("its effect")
    if features and not has_sae:
        raise SteersmanError("features need the SAE they belong to: give sae=")
    return found


def _arm(st: Steerer, what: Dosed, scale: float, scope: str | None) -> Arm:
    return lambda _rows: steered(what, st, scale=scale, scope=scope)


def _about(what: Dosed) -> dict[str, Any]:
    """Provenance, hook points and norm of what is evaluated, as far as it has them."""
    if isinstance(what, SteeringVector):
        return what.provenance() | {"hook_names": what.hook_names, "norm": what.norm()}
    if isinstance(what, Dose):
        return what.about()
    kind = getattr(what, "__qualname__", type(what).__name__)
    return {"method": kind} if callable(what) else {"method": "edits", "hook_names": list(what)}


def _after(prefix: str, item: Any) -> Any:
    return type(item)(prompt=with_prefix(prefix, item.prompt), positive=item.positive, negative=item.negative)


def _as_long_as(v: SteeringVector, model: SteeringVector) -> SteeringVector:
    """v with the norm of `model` at every hook point (per position: the largest)."""
    parts = {
        hook: d * (model.directions[hook].norm(dim=-1).max() / d.norm(dim=-1).max()) for hook, d in v.directions.items()
    }
    return replace(v, directions=parts)


def _objective(targets: Targets, items: bool) -> str:
    if targets.judge is not None:
        return "judge"
    if targets.words:
        return "word_rate"
    if items:
        return "margin"
    return "target_rise" if targets.features else "scale"


def _checked_texts(given: Sequence[Document] | str, what: str, least: int = 1) -> list[Document]:
    found: list[Document] = [given] if isinstance(given, str) or is_conversation(given) else list(given)
    for i, text in enumerate(found):
        if not is_conversation(text) and (not isinstance(text, str) or is_blank(text)):
            raise SteersmanError(f"{what} {i} is empty")
    if len(found) < least:
        raise SteersmanError(f"at least {least} {what}s are needed, got {len(found)}: half of them choose the scale")
    return found
