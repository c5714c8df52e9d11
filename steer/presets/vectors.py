"""Presets that are a vector from examples and where it is added: contrasts, weights, styles, in-context vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

from steersman.lm import LanguageModel
from steersman.lm.origin import canonical_hook
from steersman.steer.analysis.concept_shift import concept_shift
from steersman.steer.analysis.layers import layer_divergences
from steersman.steer.analysis.promote import promote_report
from steersman.steer.edits import EditSet
from steersman.steer.methods.contrast import contrast
from steersman.steer.methods.style import style_vectors
from steersman.steer.presets.base import CODE, NOTES, PAIRS, Need, Preset, at, everywhere, kept, sides_of
from steersman.steer.steerer import Steerer
from steersman.steer.vectors.vector import SteeringVector


class EAST(Preset):
    name = "east"
    title = "Entropic activation steering"
    source = "arXiv 2406.00244"
    mechanism = "weighted contrast, added"
    certainty = NOTES + ", which were made from the authors' repository"
    values = {"layer": "16 of 32 (Mixtral-8x7B)", "completions": 25, "site": "last prompt token of every decision"}
    needs = {
        "decisions": Need(
            what="an agent's prompts, each with the entropy of its action as weight and its episode as group",
            how="[{'text': prompt, 'weight': action_entropy(lm, prompt, parse), 'group': episode}, ...]",
        )
    }
    makes = "a steering vector"
    traps = (
        "because states are centred by episode, one of constant entropy adds nothing: it is a covariance, no mean",
        "few completions bias the entropy down: sample 25 or more whose action can be read",
    )
    not_covered = "claims about agents beyond one decision among discrete actions"

    def make(self, lm: LanguageModel, *, decisions: Any, layer: float = 0.5) -> SteeringVector:
        return contrast(lm, decisions, hook=at(lm, layer), method="east")


class _KeepsNorm(Preset):
    """The in-context vectors' family: mean and component of paired differences, added to every MLP's output, keeping
    the norm."""

    mechanism = "in-context vector (method icv), direction edit with keep_norm at every MLP's output"
    certainty = CODE
    needs = {"examples": PAIRS}
    traps = (
        "vectors were read from block outputs and written into MLP outputs, another space: read_at_site=True (default) "
        "reads where it writes, False does as published",
        "the sign of the first component is arbitrary: here it agrees with the mean difference",
        "the component has unit length over all layers together, so the vector is in effect the mean difference",
        "the published code casts the output to half precision: here h keeps its own",
    )
    lam = 0.1
    opposed = True
    sign = 1.0
    layers: tuple[int, int] | None = None

    def make(
        self,
        lm: LanguageModel,
        *,
        examples: Any,
        lam: float | None = None,
        read_at_site: bool = True,
        layers: Sequence[int] | None = None,
        include_bos: bool = False,
    ) -> EditSet:
        positive, negative = sides_of(examples)
        where = [f"blocks.{i}.hook_mlp_out" for i in layers] if layers is not None else everywhere(lm, "hook_mlp_out")
        read = where if read_at_site else [hook.replace("hook_mlp_out", "hook_resid_post") for hook in where]
        v = contrast(lm, positive, negative, hook=read, method="icv", diagnostics=False)
        placed = dict(zip(map(canonical_hook, where), (v.directions[canonical_hook(hook)] for hook in read)))
        strength = self.sign * (self.lam if lam is None else lam)
        edits = Steerer(lm).direction(
            read=SteeringVector(directions=placed), rule="add", value=strength,
            keep_norm="opposed" if self.opposed else True,
        ).edits  # fmt: skip
        return kept(lm, edits, self, include_bos=include_bos, lam=strength)


class ICV(_KeepsNorm):
    name = "icv"
    title = "In-context vectors"
    source = "arXiv 2311.06668, shengliu66/ICV b187c63"
    values = {"lam": "0.1 in the script, 0.12 for safety, 0.10 for sentiment", "examples": "5 pairs", "tokens": "all"}


class VTIText(_KeepsNorm):
    name = "vti_text"
    title = "Visual and textual intervention, the textual half"
    source = "arXiv 2410.15778, shengliu66/VTI bb5dfee"
    values = {"lam": "0.1 x 0.8", "examples": "50 captions with and without hallucination"}
    lam = 0.08
    opposed = False
    not_covered = "the visual half: it needs a vision encoder. Pairs of texts stand in for captions"


class VISTAContext(_KeepsNorm):
    name = "vista_context"
    title = "VISTA's steering vector, on a document in place of an image"
    source = "arXiv 2502.03628, LzVv123456/VISTA dc62252"
    values = {"lam": "0.17 (CHAIR), 0.1 (MMHal), 0.01 (POPE)", "examples": "one pair per input"}
    lam = 0.17
    opposed = False
    needs = {
        "examples": Need(
            what="one pair: the prompt with its document, and without",
            how="([prompt_with_document], [prompt_without])",
        )
    }
    traps = (
        *_KeepsNorm.traps[:1],
        "with ONE pair the centred differences are 0 and have no component: the difference itself is used",
        "the vector is made per query, which costs one more reading of the prompt",
    )
    not_covered = "the image: this is its analogue for a text model, under its own name"


class SafetyVector(_KeepsNorm):
    name = "safety_vector"
    title = "Safety Arithmetic, the steering half"
    source = "arXiv 2406.11801, declare-lab 404fbd5"
    values = {"a": 0.12, "factor": 0.1, "layers": "4 to 6 of edited models, all of others"}
    needs = {
        "examples": Need(
            what="(unsafe, safe) answers, paired",
            how="two lists, or a JSONL file of pairs; what is positive is moved away from",
        )
    }
    lam = 0.012
    sign = -1.0
    traps = (*_KeepsNorm.traps, "the factor 0.1 is in the code and not in the paper's a: 0.12 there is 0.012 here")


class StyleVectors(Preset):
    name = "style_vectors"
    title = "Style vectors, from activations"
    source = "arXiv 2402.01618, DLR-SC/style-vectors-for-steering-llms"
    mechanism = "contrast of one style with all others, added"
    certainty = CODE
    values = {"layers": "18 to 20 of 32 (Alpaca-7B)", "b": "0 to 2 in 21 steps", "tokens": "last token"}
    needs = {
        "styles": Need(what="{name of a style: its texts}, two at least", how="a mapping of lists of texts"),
        "style": Need(what="the style to steer to", how="one of the names"),
    }
    makes = "a steering vector"
    traps = (
        "hidden_states[18] is the output of block 17, and it was added to another layer's MLP output: the hook point "
        "that is read is the one that is edited",
        "only texts below 50 characters were used: give any",
    )

    def make(
        self, lm: LanguageModel, *, styles: Any, style: str, layers: tuple[float, float] = (0.58, 0.65)
    ) -> SteeringVector:
        ends = [round(x * (lm.n_layers - 1)) for x in layers]
        hooks = [f"blocks.{i}.hook_resid_post" for i in range(ends[0], ends[1] + 1)]
        return style_vectors(lm, styles, hook=hooks)[style]


class CodeTypes(Preset):
    name = "code_types"
    title = "Type steering of code models"
    source = "arXiv 2404.01903, nuprl/codetrace"
    mechanism = "paired contrast at the last token, added there at neighbouring layers"
    certainty = CODE
    values = {"layers": "1 to 5 neighbouring ones", "pairs": "at most 3 a program, 25 a type"}
    needs = {
        "examples": Need(
            what="(programs predicted right, the same programs after a semantics-preserving edit, predicted wrong)",
            how="pairs, kept apart from the test by `split_groups` and thinned by `capped` of steersman.steer.methods",
        )
    }
    traps = (
        "with one of its options the published code builds the test from the examples of the vector: see check_apart",
        "its null is integers drawn between the tensor's least and largest, not matched in norm: random_like is",
    )

    def make(
        self, lm: LanguageModel, *, examples: Any, layers: tuple[float, float] = (0.4, 0.55), scale: float = 1.0
    ) -> EditSet:
        positive, negative = sides_of(examples)
        ends = [round(x * (lm.n_layers - 1)) for x in layers]
        hooks = [f"blocks.{i}.hook_resid_post" for i in range(ends[0], ends[1] + 1)]
        v = contrast(lm, positive, negative, hook=hooks, method="caa", positions="last", diagnostics=False)
        return kept(lm, Steerer(lm).vector(v, scale=scale).edits, self, scope="last_prompt")


class TA2(Preset):
    name = "ta2"
    title = "Trojan activation attack: its choice of the layer"
    source = "arXiv 2311.09433, wang2226/Trojan-Activation-Attack 239abdd"
    mechanism = "JS divergence of the layers' lenses, then a contrast vector there"
    certainty = CODE
    values = {"position": -2, "layers": "0 to 16", "strengths": "a grid"}
    needs = {"examples": PAIRS}
    makes = "a steering vector"
    traps = (
        "the published divergence takes a softmax over hidden dimensions and hands probabilities to a function that "
        "wants logarithms: it is not 0 for two equal distributions. Here it is that of the layers' lenses, 0 to ln 2",
        "an argmax over layers needs a null: each layer's divergence is taken above that of pairs of one side",
    )
    not_covered = "the grid of strengths: calibrate finds the one of a budget, and `vector sweep` compares layers"

    def make(self, lm: LanguageModel, *, examples: Any, position: int = -2) -> SteeringVector:
        positive, negative = sides_of(examples)
        index = f"index:{position}"
        best = max(layer_divergences(lm, positive, negative, positions=index), key=lambda layer: layer.excess)
        return contrast(lm, positive, negative, hook=best.hook_name, method="caa", positions=index)


class ConceptShiftPreset(Preset):
    name = "concept_shift"
    title = "Fine-tuning representation shift"
    source = "arXiv 2501.03012, mshukor/xl-vlms a599fe9"
    mechanism = "shifts of matched concepts between two models; each is a vector"
    certainty = CODE
    values = {"a": 1.0, "grouping": "k-means or semi-NMF"}
    needs = {
        "tuned": Need(what="the fine-tuned model", how="LanguageModel.load(...)"),
        "texts": Need(what="texts that both models read", how="a list"),
    }
    makes = "a ConceptShift: vector(k) is the shift of concept k, difference(i, j) leads from one to another"
    traps = (
        "the normalise option divides the whole matrix by one norm: not offered",
        "concepts must be matched one to one, else one good concept counts many times",
        "states were edited in place: here never",
    )
    not_covered = "visual grounding: pairs of text models are compared"

    def make(
        self, lm: LanguageModel, *, tuned: Any, texts: Any, layer: float = 0.9, k: int = 8, positions: str = "last",
        method: str = "kmeans",
    ) -> Any:  # fmt: skip
        return concept_shift(lm, tuned, texts, hook=at(lm, layer), k=k, positions=positions, method=method)  # pyright: ignore


class PromoteSuppress(Preset):
    name = "reliable_evaluation"
    title = "Reliable evaluation of steering: promote and suppress"
    source = "arXiv 2410.17245"
    mechanism = "report over continuations, sorted by the unsteered value"
    certainty = NOTES
    values = {"shares": (0.25, 0.5, 0.75)}
    needs = {
        "arms": Need(what="{name: a way of steering}", how="vectors, edits or recipes at the scale to be compared"),
        "items": Need(what="(prompt, positive, negative) continuations", how="a list of triples"),
    }
    makes = "a PromoteReport"
    traps = (
        "success on A/B items does not carry over to open text",
        "sums over tokens favour long continuations: means per token are compared",
    )

    def make(self, lm: LanguageModel, *, arms: Mapping[str, Any], items: Any, scope: str = "all") -> Any:
        return promote_report(lm, arms, items, scope=scope)
