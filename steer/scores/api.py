"""`score_features`: the one way to a table of feature scores."""

from collections.abc import Sequence
from typing import Any, overload

from steersman.config import merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.sae import SAE
from steersman.steer.methods.examples import ExamplesLike
from steersman.steer.scores.base import Evidence, ScoreConfig, check_given
from steersman.steer.scores.reading import Labelled, labelled_sides
from steersman.steer.scores.table import FeatureScores


@overload
def score_features(lm: LanguageModel, sae: SAE, scores: str | Sequence[str], **given: Any) -> FeatureScores: ...
@overload
def score_features(
    lm: LanguageModel, sae: Sequence[SAE], scores: str | Sequence[str], **given: Any
) -> list[FeatureScores]: ...
def score_features(
    lm: LanguageModel,
    sae: SAE | Sequence[SAE],
    scores: str | Sequence[str],
    *,
    positive: ExamplesLike | None = None,
    negative: ExamplesLike | None = None,
    rewarded: Sequence[Labelled] | None = None,
    texts: Sequence[str] | None = None,
    config: ScoreConfig | None = None,
    **settings: Any,
) -> FeatureScores | list[FeatureScores]:
    """Score every feature of an SAE, or of several at their hook points, from one reading of the texts.

    Args:
        lm: the model.
        sae: the SAE, or a list of SAEs at different hook points; a list gives a list of tables.
        scores: names of `SCORES`: output, input, correlation, f_statistic, contrast, flow.
        positive, negative: texts or (prompt, answer) pairs of two classes, for correlation, f_statistic and contrast.
        rewarded: in their place, answers with a reward (see `rewarded_answers`).
        texts: texts to read the features on, for input, and for the co-activation of flow.
        config: the settings; `**settings` are fields of it, over those of `config`.

    Raises SteersmanError, before anything is run, for an unknown score, one that lacks what it needs, and an SAE of
    another model, hook point or width.
    """
    config = merged(ScoreConfig, config, settings)
    saes = [sae] if isinstance(sae, SAE) else list(sae)
    hooks = [check_sae_fits(lm, one) for one in saes]
    if not saes or len(set(hooks)) != len(hooks):
        raise SteersmanError(f"give one SAE or several at different hook points, got {', '.join(hooks) or 'none'}")
    labelled = _labelled(lm, positive, negative, rewarded)
    given = {"labelled": labelled is not None, "texts": texts is not None, "saes": len(saes) > 1}
    chosen = check_given([scores] if isinstance(scores, str) else scores, given)
    evidence = Evidence(lm, saes, hooks, config, labelled, texts)
    for score in chosen:
        score.check(evidence)
    tables = [
        FeatureScores.of(
            {score.name: score.measure(evidence, at) for score in chosen},
            model_name=lm.name, hook_name=hooks[at], sae=one,
        )
        for at, one in enumerate(saes)
    ]  # fmt: skip
    return tables[0] if isinstance(sae, SAE) else tables


def _labelled(
    lm: LanguageModel,
    positive: ExamplesLike | None,
    negative: ExamplesLike | None,
    rewarded: Sequence[Labelled] | None,
) -> Sequence[Labelled] | None:
    if rewarded is not None:
        if positive is not None or negative is not None:
            raise SteersmanError("give either rewarded answers, or positive and negative texts, not both")
        return list(rewarded)
    if (positive is None) != (negative is None):
        raise SteersmanError("two classes are compared: give both positive and negative texts")
    return None if positive is None or negative is None else labelled_sides(lm, positive, negative)
