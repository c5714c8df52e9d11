"""Presets that steer by features of SAEs: they differ in how features are chosen and how strong they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from steersman.lm import LanguageModel
from steersman.steer.analysis.annotations import annotation_table
from steersman.steer.edits import EditSet
from steersman.steer.presets.base import CODE, NOTES, SAE_NEED, SAES_NEED, Need, Preset, kept, saes_of, sides_of
from steersman.steer.scores.api import score_features
from steersman.steer.scores.flow import feature_flow
from steersman.steer.scores.output_tokens import token_change, vocab_projection
from steersman.steer.scores.select import select
from steersman.steer.steerer import Steerer


class LFSteering(Preset):
    name = "lf_steering"
    title = "LF-Steering, for consistent answers"
    source = "arXiv 2501.11036"
    mechanism = "feature scores (contrast), features added"
    certainty = NOTES + "; the form of the edit from memory"
    values = {"layers": "17 to 32 of a 7B, the one with the best probe"}
    needs = {
        "sae": SAE_NEED,
        "examples": Need(
            what="(consistent, inconsistent) answers", how="paraphrases of one question, answered and compared"
        ),
    }
    traps = ("a constant answer is consistent too: report accuracy and the entropy of answers beside it",)
    not_covered = "the choice of the layer by a probe: see `vector sweep`"

    def make(self, lm: LanguageModel, *, sae: Any, examples: Any, n: int = 16, scale: float = 1.0) -> EditSet:
        positive, negative = sides_of(examples)
        saes = saes_of(sae)
        table = score_features(lm, saes, "contrast", positive=positive, negative=negative)
        chosen = select(table, "contrast", n, sign="both").scaled(scale)
        return kept(lm, chosen.edits(saes), self, features=_told(chosen))


class SCAR(Preset):
    name = "scar"
    title = "SCAR: a supervised latent"
    source = "arXiv 2411.07122, ml-research/SCAR b02b932"
    mechanism = "supervised latent in SAE training, then feature edit, mode scale"
    certainty = CODE
    values = {"site": "MLP output of block 25 (Llama-3-8B)", "d_sae": 24576, "k": 2048, "a": "-100 to 100"}
    needs = {
        "sae": Need(
            what="an SAE with a supervised latent",
            how="train_sae(..., architecture='supervised_topk') on a store cached with label_column",
        )
    }
    traps = (
        "label -1 (unlabelled) became 0 there, which means negative: here the loss leaves such tokens out",
        "the published edit replaces the state by its reconstruction, so a = 1 is no no-op: here the error term stays",
        "a top-k SAE may drop the latent before steering sees it: here it is kept out of the competition",
    )

    def make(self, lm: LanguageModel, *, sae: Any, a: float = 0.0, feature: int = 0) -> EditSet:
        (one,) = saes_of(sae)
        return kept(lm, Steerer(lm).features(one, {feature: a}, mode="scale").edits, self, feature=feature)


class FeatureFlowPreset(Preset):
    name = "feature_flow"
    title = "Feature flow across layers"
    source = "arXiv 2502.03032"
    mechanism = "cosines between decoders, one feature's relatives rescaled at all their layers"
    certainty = NOTES
    values = {"saes": "resid, attention and MLP outputs of all layers (Gemma Scope 2B)", "r": 0.0}
    needs = {
        "saes": SAES_NEED,
        "feature": Need(what="(hook point, feature id) to follow", how="such as ('blocks.12.hook_resid_post', 1234)"),
    }
    traps = (
        "a cosine is no co-activation: give lm and texts to feature_flow for the rate beside it",
        "edits at consecutive layers compound: a later feature already sees the earlier edit",
    )

    def make(self, lm: LanguageModel, *, saes: Any, feature: tuple[str, int], r: float = 0.0) -> EditSet:
        held = saes_of(saes)
        hook, j = feature
        chosen = feature_flow(held).feature_set(lm.resolve_hook(hook), int(j), r)
        return kept(lm, chosen.edits(held), self, features=_told(chosen))


class OutputCentric(Preset):
    name = "output_centric"
    title = "Output-centric descriptions of features"
    source = "arXiv 2501.08319, yoavgur/Feature-Descriptions eb6ed5f"
    mechanism = "tokens that a feature writes: by the lens, and by clamping it"
    certainty = CODE
    values = {"tokens": "top and bottom 50 of the lens, top 10 of the change", "clamp": "+10 and -10", "texts": 32}
    needs = {"sae": SAE_NEED, "features": Need(what="feature ids", how="a list")}
    makes = "{feature: its tokens by the lens and, with texts, by the change of the logits}"
    traps = (
        "their search of the strength is made without the error term and generation with it: here the term stays",
        "raised and lowered tokens are swapped by name in the published code",
    )
    not_covered = "the describer and the judge of both metrics, which are language models of their own"

    def make(
        self, lm: LanguageModel, *, sae: Any, features: Sequence[int], texts: Sequence[str] = ()
    ) -> dict[int, list[Any]]:
        (one,) = saes_of(sae)
        found: dict[int, list[Any]] = {int(j): [] for j in features}
        for tokens in (
            vocab_projection(lm, one, list(found)),
            token_change(lm, one, list(found), texts) if texts else (),
        ):
            for j, told in zip(found, tokens):
                found[j].append(told)
        return found


class Personality(Preset):
    name = "personality"
    title = "Personality by SAE features"
    source = "arXiv 2410.10863, kaustpradalab/LLM-Persona-Steering"
    mechanism = "features added, hand-picked"
    certainty = CODE
    values = {"strength": 200.0, "tokens": "all of the prompt but its last"}
    needs = {"sae": SAE_NEED, "features": Need(what="feature ids", how="found by their labels")}
    traps = (
        "their hook returns early for passes of one token, so with a cache neither the prompt's last token nor any "
        "generated one is steered: here all tokens are, and scope '0:-1' is theirs",
        "200 is in raw units: use units='max_act' to compare features",
        "compare with a random feature at equal norm",
    )

    def make(
        self,
        lm: LanguageModel,
        *,
        sae: Any,
        features: Sequence[int] | Mapping[int, float],
        strength: float = 200.0,
        units: str = "raw",
    ) -> EditSet:
        (one,) = saes_of(sae)
        given = dict(features) if isinstance(features, Mapping) else dict.fromkeys(features, strength)
        edits = Steerer(lm).features(one, given, units=units).edits
        return kept(lm, edits, self)


class ProteinFeatures(Preset):
    name = "protein_features"
    title = "Features of a protein model by annotation"
    source = "arXiv 2502.09135, edithvillegas/plm-sae"
    mechanism = "feature x annotation table, features of an annotation"
    certainty = CODE + " for the statistics, notes for the generation"
    values = {"thresholds": (0.01, 0.1, 1.0), "relevant": 0.8, "layer": "3 of ESM-2 8M", "min_tokens": 100}
    needs = {
        "sae": SAE_NEED,
        "annotated": Need(
            what="sequences with annotated tokens", how="Annotated.of_spans(lm, text, [(start, end, name)], family=...)"
        ),
    }
    makes = "the table of precision and recall by annotation"
    traps = (
        "tokens of one sequence are not independent: halves are of whole sequences, of families where they are said",
        "thresholds and features are searched together: they are chosen on one half and reported on the other",
    )
    not_covered = "guided generation by masked filling, and what folding says of its designs"

    def make(self, lm: LanguageModel, *, sae: Any, annotated: Any, **settings: Any) -> Any:
        (one,) = saes_of(sae)
        return annotation_table(lm, one, annotated, **settings)


class OutputScorePreset(Preset):
    name = "output_score"
    title = "Output score: features that steer"
    source = "arXiv 2505.20063"
    mechanism = "feature scores (output), the best features added"
    certainty = CODE
    values = {"factor": 10.0, "prompt": "From my experience,", "tokens": 20}
    needs = {"sae": SAE_NEED}
    traps = (
        "the largest value over a batch at its last column depends on the padding: here every row's own last token",
        "one prompt alone: here the mean over several neutral ones",
        "the score depends on the factor, whose unit is said",
    )

    def make(
        self, lm: LanguageModel, *, sae: Any, n: int = 1, candidates: Sequence[int] = (), strength: float = 4.0,
        units: str = "max_act",
    ) -> EditSet:  # fmt: skip
        saes = saes_of(sae)
        table = score_features(lm, saes, "output", feature=tuple(candidates), units=units)
        chosen = select(table, "output", n, strength=strength, units=units)
        return kept(lm, chosen.edits(saes), self, features=_told(chosen))


class CorrSteer(Preset):
    name = "corrsteer"
    title = "CorrSteer"
    source = "arXiv 2508.12535, seonglae/CorrSteer 65ca523"
    mechanism = "feature scores (correlation with a reward), features added at the last token of each step"
    certainty = CODE
    values = {"samples": 4000, "site": "resid_pre, the last token of each step", "variants": "S, A, P"}
    needs = {
        "saes": Need(what="an SAE, or SAEs of several layers", how="SAE.load(...)"),
        "rewarded": Need(
            what="the model's answers with a reward of 0 or 1",
            how="rewarded_answers(lm, prompts, reward)",
        ),
    }  # fmt: skip
    traps = (
        "strengths average MAX-pooled values and are then added at every step: scale them by calibrate",
        "of thousands of features the best correlates by chance: choices are marked against the null of the best",
        "a model's success goes with the topic: hold out topics",
    )

    def make(self, lm: LanguageModel, *, saes: Any, rewarded: Any, variant: str = "A", scale: float = 1.0) -> EditSet:
        held = saes_of(saes)
        tables = score_features(lm, held, "correlation", rewarded=rewarded)
        chosen = select(tables, "correlation", per_hook=variant.upper() != "S").scaled(scale)
        return kept(
            lm, chosen.edits(held), self, scope="last_prompt+generation", variant=variant, features=_told(chosen)
        )


def _told(chosen: Any) -> dict[str, dict[str, float]]:
    return {hook: {str(j): s for j, s in chosen[hook].items()} for hook in chosen}
