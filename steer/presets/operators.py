"""Presets that read the state and act where and as far as it says: conditions, caps, thresholds, affine maps."""

from collections.abc import Mapping
from typing import Any

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.analysis.thresholds import FoundCondition, ProbedSides, probe_sides
from steersman.steer.edits import Edit, EditSet
from steersman.steer.edits.conditions import Condition
from steersman.steer.edits.gates import Gate
from steersman.steer.edits.reads import Projection, TanhSimilarity
from steersman.steer.methods.affine import fit_affine
from steersman.steer.presets.base import CODE, NOTES, PAIRS, VECTOR, Need, Preset, at, kept, sides_of, vector_of
from steersman.steer.steerer import Steerer


class CAST(Preset):
    name = "cast"
    title = "Conditional activation steering"
    source = "arXiv 2409.05907, IBM/activation-steering 52be602"
    mechanism = "added vector behind a gate per row that is read in the prompt"
    certainty = CODE
    values = {
        "condition": "cosine of the mean prompt state with tanh(P h), P the projector on c; threshold in steps of .01",
        "search": "layer x threshold x direction by F1",
        "vectors": "PCA of states centred by pair, read at the output of the layer",
    }
    needs = {
        "condition": Need(
            what="what tells the prompts to be steered, or its direction with threshold=",
            how="find_condition(lm, prompts_to_steer, other_prompts)",
        ),
        "vector": VECTOR,
    }
    traps = (
        "the published similarity is even in c: a state along -c opens the gate as one along +c does. The fixed "
        "form (default) reads the projection; as_published=True reads the similarity, with its own threshold",
        "vectors read at the output of a layer were added at its input: here hook points are named and checked",
        "only row 0 of a batch decided, padding counted in the mean: here every row decides for itself",
        "comparator 'smaller' means that the threshold is smaller: here above=True says so",
    )

    def make(
        self,
        lm: LanguageModel,
        *,
        condition: Any,
        vector: Any,
        threshold: float | None = None,
        above: bool = True,
        pool: str = "mean",
        prompt: str = "later_layers",
        as_published: bool = False,
        scale: float = 1.0,
    ) -> EditSet:
        if isinstance(condition, FoundCondition) and not as_published:
            gate: Gate = condition.gate(prompt)  # pyright: ignore[reportArgumentType]
        elif threshold is None:
            raise SteersmanError(
                "preset 'cast' needs threshold, where the gate opens, for a condition that is a direction alone: give "
                "find_condition(...) as condition, or a threshold in units of h . c / |c| (of the similarity, with "
                "as_published)"
            )
        else:
            c = vector_of(condition.vector if isinstance(condition, FoundCondition) else condition)
            read = TanhSimilarity(c) if as_published else Projection(c)
            gate = Condition(c.hook_name, read, threshold, above=above, pool=pool, prompt=prompt)  # pyright: ignore[reportArgumentType]
        edits = Steerer(lm).vector(vector_of(vector), scale=scale, gate=gate).edits
        return kept(lm, edits, self, as_published=as_published)


class Capping(Preset):
    name = "capping"
    title = "Assistant axis, projection capping"
    source = "arXiv 2601.10387, safety-research/assistant-axis a989619"
    mechanism = "direction edit, rule floor or cap, a limit for each layer"
    certainty = CODE
    values = {
        "layers": "46 to 53 of 64 (Qwen3-32B)",
        "percentile": 25,
        "axis": "mean(default answers) - mean(role answers), means over response tokens; 275 roles x 5 prompts x 240 "
        "questions",
    }
    needs = {
        "axis": Need(
            what="the axis, one direction a layer",
            how="SteeringVector.contrast(lm, default_answers, role_answers, hook=[...], positions='answer')",
        ),
        "limits": Need(
            what="{hook point: limit of h . v / |v|}, or a number",
            how="percentile_limits(lm, texts, axis, 25): measured layer by layer on the texts of the roles",
        ),
    }
    traps = (
        "the stored axis has its sign turned round, so that 'cap' is a floor on the side of the axis: here rule says "
        "which, along the axis as it is given",
        "the ablation option adds a multiple of the raw vector, and 1.0 is a change: use rule project_out for that",
        "neighbouring layers act on one another's output, so limits must be measured layer by layer",
    )
    not_covered = "the judge that marks which answers are in their role"

    def make(
        self, lm: LanguageModel, *, axis: Any, limits: Any, rule: str = "floor", include_bos: bool = False
    ) -> EditSet:
        edits = Steerer(lm).direction(read=vector_of(axis), rule=rule, value=limits).edits
        return kept(lm, edits, self, include_bos=include_bos, rule=rule)


class _Probed(Preset):
    """What StTP, StMP and their baseline share."""

    source = "arXiv 2604.08169, a replication's README"
    certainty = NOTES
    values = {
        "models": "Llama-3.3-70B, Qwen3-32B",
        "search": "layer x strength, a up to 36",
        "scope": "prompt included",
    }
    needs = {"examples": PAIRS}
    traps = (
        "response-only steering has about half the effect: the scope is every token",
        "the probe is fitted on means of responses and applied to tokens, which scatter more: the share of positive "
        "tokens below the middle is in the metadata (tokens_below)",
        "a probe on standardised states must be folded back into the states' units: it is",
    )

    def make(
        self, lm: LanguageModel, *, examples: Any, a: float = 1.0, layer: float = 0.5, positions: str = "mean",
        l2: float = 0.01,
    ) -> EditSet:  # fmt: skip
        found = examples
        if not isinstance(found, ProbedSides):
            positive, negative = sides_of(examples)
            found = probe_sides(lm, positive, negative, hook=at(lm, layer), positions=positions, l2=l2)
        return kept(lm, self.edits(lm, found, a), self, tokens_below=found.tokens_below)

    def edits(self, lm: LanguageModel, found: ProbedSides, a: float) -> Mapping[str, Edit]:
        """The edit of strength a, at its hook point."""
        raise NotImplementedError  # each of the three defines it


class SwFC(_Probed):
    name = "swfc"
    title = "Steering with fixed coefficient (the baseline of StTP and StMP)"
    mechanism = "direction edit, rule add"

    def edits(self, lm: LanguageModel, found: ProbedSides, a: float) -> Mapping[str, Edit]:
        value = a * (found.mean - found.negative_mean)
        return Steerer(lm).direction(read=found.direction, rule="add", value=value).edits


class StTP(_Probed):
    name = "sttp"
    title = "Steering to target projection"
    mechanism = "direction edit, rule set_if_below"
    traps = (*_Probed.traps, "the edit jumps at the middle: a token just below it goes all the way to the target")

    def edits(self, lm: LanguageModel, found: ProbedSides, a: float) -> Mapping[str, Edit]:
        return {found.direction.hook_name: found.lifting(a)}


class StMP(_Probed):
    name = "stmp"
    title = "Steering to mirrored projection"
    mechanism = "direction edit, rule mirror"

    def edits(self, lm: LanguageModel, found: ProbedSides, a: float) -> Mapping[str, Edit]:
        return {found.direction.hook_name: found.mirroring(a)}


class _Affine(Preset):
    """What the affine maps share."""

    source = "arXiv 2402.09631, shauli-ravfogel/affine-steering 4a0bd46"
    mechanism = "affine edit"
    certainty = CODE
    values = {"site": "the last state before the output layer", "states": "last token, 512 tokens, classes balanced"}
    needs = {
        "examples": Need(
            what="(target, source) texts: what states should become, and what they are",
            how="two lists of texts, or a JSONL file of positive (target) and negative (source) ones",
        )
    }
    traps = (
        "1e-7 was added to EVERY entry of the covariance, which leaves it singular: here shrinkage towards its mean "
        "eigenvalue, and fewer samples than dimensions without it are refused",
        "only states of the source class should be moved: gate the edit by a probe, or steer prompts of that class",
    )
    method = ""
    shrinkage = 0.1

    def make(
        self,
        lm: LanguageModel,
        *,
        examples: Any,
        layer: float = 1.0,
        positions: str = "last",
        shrinkage: float | None = None,
    ) -> EditSet:
        target, source = sides_of(examples)
        amount = self.shrinkage if shrinkage is None else shrinkage
        return fit_affine(
            lm, source, target, hook=at(lm, layer), method=self.method, positions=positions, shrinkage=amount
        )


class MeanMatching(_Affine):
    name = "mean_matching"
    title = "Affine steering: mean matching"
    method = "mean"
    shrinkage = 0.0


class MiMiC(_Affine):
    name = "mimic"
    title = "Affine steering: MiMiC (means and covariances)"
    method = "mimic"


class LEACE(_Affine):
    name = "leace"
    title = "LEACE and LEACE with a shift"
    source = "arXiv 2306.03819 and 2402.09631, shauli-ravfogel/affine-steering 4a0bd46"
    method = "leace_shift"
