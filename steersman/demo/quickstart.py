"""`steersman quickstart`: the whole job on the bundled model (or any other) in one command, with a report to look at.

Cache activations, train an SAE, measure it, see its features, steer by a few of them, make a vector for what one of
them does to text, take a vector apart. On the bundled model the grammar's exact labels say which feature stands for
which concept; on another model the tokens that a feature promotes take the place of a concept's words.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.demo import CONCEPTS, MODEL_PATH
from steersman.demo.concept_features import ConceptFeature, match_concepts, writing_features
from steersman.demo.grammar import stories, texts
from steersman.demo.report import write_report
from steersman.demo.results import Dose, Results, SteeredTarget
from steersman.demo.targets import Target, word_rate
from steersman.demo.vectors import take_apart, target_feature
from steersman.deprecation import renamed_fields
from steersman.device import pick_device
from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.lm import LanguageModel
from steersman.progress import progress
from steersman.sae import SAE, FeatureLabel, FeatureLabels
from steersman.sae.feature_labels import LABELS, named_feature
from steersman.steer import Steerer, label_features, words_fired_on
from steersman.steer.measures import token_nll
from steersman.text import open_text
from steersman.train import (
    ActivationStore,
    FeatureReport,
    TrainConfig,
    cache_activations,
    detail_features,
    train_sae,
)
from steersman.train.reports.evaluate import evaluate_sae
from steersman.train.reports.features import Feature
from steersman.ui.site import check_site, write_site

log = logging.getLogger(__name__)

HELDOUT_SEED = 3
"""Stories of this seed were trained on neither by the bundled model nor by the SAE."""


@renamed_fields(effect_vectors="effect_texts")
@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """See features, steer by them and read a report: on the bundled model, or on --model with --text."""

    out: str = "quickstart"
    """Folder for the store, the SAE, report.html and the site of features. Run again, it resumes where it stopped."""
    model: str | None = None
    """Folder or hub id of a model; the bundled one if not given."""
    text: str | None = None
    """File, folder or dataset id of the text; stories of the grammar if not given."""
    hook: str | None = None
    """Hook point; the output of the middle block if not given."""
    layer: int | None = None
    """Layer in place of --hook: the state after it, counted from 0; -1 is the last."""
    tokens: int = 400_000
    """Tokens to cache and train on."""
    d_sae: int = 512
    """Number of features."""
    k: int = 16
    """Active features a token."""
    targets: int = 4
    """Features to steer by: the ones that did most, of those tried on texts of their own."""
    effect_texts: int = 2048
    """Texts whose gradients SAE-TS takes its map from; 0 leaves it out. More than the model is wide."""
    samples: int = 16
    """Texts generated at each strength."""
    max_new_tokens: int = 48
    """Tokens generated in each text."""
    seed: int = 0
    """Seed of the text, the training and the generation."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""


STRENGTHS = (0.0, 0.4, 0.6, 0.8, 1.0, 1.3)
AFFORDABLE = 1.0
"""Nats per token that steering may cost when a strength is chosen."""
SCREENED = 8
"""Held-out texts on which features and strengths are chosen; the prompts come from others."""
CONTRASTED = 32
"""Held-out texts on which a contrast vector and its parts are compared."""
PROMPT_WORDS = 8
"""Words of the held-out texts that are given as prompts."""


SITE = "site"
"""Folder of the site of features, beside the report."""
CLEAR = 0.95
"""AUROC from which a feature is called by the concept whose words it tells from others."""


def quickstart(config: QuickstartConfig) -> Results:
    """Run every step and write `report.html`, the site of its features, `results.json` and `features.json` to
    `config.out`."""
    start = time.monotonic()
    bundled = config.model is None
    if not bundled and config.text is None:
        raise SteersmanError("--model needs --text: the text to read it on")
    device = pick_device(config.device)
    out = Path(config.out)
    check_site(out / SITE)

    log.info("[1/8] loading the model and caching activations")
    lm = LanguageModel.load(config.model or str(MODEL_PATH), device=device)
    if config.hook is not None and config.layer is not None:
        raise SteersmanError("give either --hook or --layer, not both")
    layer = lm.n_layers // 2 if config.layer is None else config.layer
    hook = lm.resolve_hook(config.hook or layer)
    source: Any = config.text if config.text is not None else texts(config.tokens // 60 + 50, seed=config.seed)
    store = cache_activations(lm, source, hook=hook, out=str(out / "acts"), tokens=config.tokens)

    log.info("[2/8] training an SAE with %d features", config.d_sae)
    settings = TrainConfig(d_sae=config.d_sae, k=config.k, seed=config.seed, device=config.device)
    sae = train_sae(store, settings, out / "sae")

    log.info("[3/8] measuring it")
    unseen = _heldout_texts(store, config)
    evaluation = evaluate_sae(sae, store, lm, unseen)

    log.info("[4/8] reading its features")
    detailed = detail_features(sae, store, lm)
    features = detailed.features
    FeatureReport(features=features, stats=detailed.stats).save(out / "features.json")

    log.info("[5/8] naming features")
    concepts = match_concepts(lm, sae, list(islice(stories(HELDOUT_SEED), 400))) if config.text is None else []
    sae.labels = _labels(lm, sae, features, concepts)
    sae.labels.save(out / "sae" / LABELS)
    if concepts:
        targets = _concept_targets(lm, sae, concepts)
    else:
        targets = _promoted_targets(features, 4 * config.targets)

    log.info("[6/8] steering by %d features", config.targets)
    prompts = [" ".join(text.split()[:PROMPT_WORDS]) for text in unseen[SCREENED : SCREENED + config.samples]]
    steered = steer_towards(lm, sae, targets, unseen[:SCREENED], prompts, config)

    log.info("[7/8] a vector for the effect of a feature (SAE-TS)")
    targeted, few = None, unseen[:SCREENED]
    if config.effect_texts:
        targeted = target_feature(
            lm,
            sae,
            targets,
            {one.target.name: one.feature for one in steered},
            few,
            prompts,
            n_texts=config.effect_texts,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )

    log.info("[8/8] taking a vector apart")
    contrast = take_apart(lm, sae, concepts, [one.target.name for one in steered], unseen[:CONTRASTED])
    results = Results(
        model_name=lm.name,
        hook_name=hook,
        run=out / "sae",
        evaluation=evaluation,
        concepts=concepts,
        features=features,
        steered=steered,
        targeted=targeted,
        contrast=contrast,
        seconds=time.monotonic() - start,
    )
    write_site(detailed, out / SITE, name=str(out / "sae"), labels=sae.labels)
    write_report(results, out / "report.html", sae.labels, site=SITE)
    write_json(out / "results.json", figures(results), indent=1, ensure_ascii=False)
    return results


def _labels(
    lm: LanguageModel, sae: SAE, features: Sequence[Feature], concepts: Sequence[ConceptFeature]
) -> FeatureLabels:
    """A label for every feature: what somebody wrote into the file, the concept of the grammar, or the tokens that it
    fires on and writes."""
    written = {feature: label for feature, label in sae.labels.items() if not label.source}
    by_tokens = label_features(lm, sae, fires_on=words_fired_on(asdict(feature) for feature in features))
    return by_tokens.merged(concept_labels(concepts)).merged(written)


def concept_labels(concepts: Sequence[ConceptFeature]) -> FeatureLabels:
    """The features that tell a concept's words clearly, called by the concept, the clearest of several."""
    clear = [match for match in concepts if match.auroc >= CLEAR]
    return FeatureLabels(
        {
            match.feature: FeatureLabel(text=match.concept, source="grammar", scores={"auroc": match.auroc})
            for match in sorted(clear, key=lambda match: match.auroc)
        }
    )


def figures(results: Results) -> dict[str, Any]:
    """The results for a program."""
    targeted, contrast = results.targeted, results.contrast
    return {
        "evaluation": results.evaluation.to_json(),
        "concepts": [asdict(concept) for concept in results.concepts],
        "steered": [asdict(steered) for steered in results.steered],
        "targeted": None if targeted is None else asdict(targeted),
        "contrast": None if contrast is None else contrast.to_dict(),
        "seconds": results.seconds,
    }


def _heldout_texts(store: ActivationStore, config: QuickstartConfig, n: int = 100) -> list[str]:
    """Texts that were not trained on: fresh stories, or the store's held-out documents."""
    if config.text is None:
        return texts(n, seed=HELDOUT_SEED)
    first, _ = store.split_rows("heldout")
    document = int(store.tokens(first, first + 1).doc_ids[0])
    return list(islice(open_text(config.text).documents(document), n))


def _concept_targets(lm: LanguageModel, sae: SAE, concepts: Sequence[ConceptFeature]) -> list[Target]:
    """The concepts with the clearest features, two of each group of the grammar (names of people left out).

    What tells a concept's words when they are read need not write them, so the features whose decoder rows promote the
    words most are candidates too.
    """
    targets: list[Target] = []
    seen: Counter[str] = Counter()
    for match in concepts:
        concept = CONCEPTS[match.concept]
        seen[concept.group] += 1
        if concept.group != "name" and seen[concept.group] <= 2:
            candidates = tuple(dict.fromkeys((match.feature, *writing_features(lm, sae, concept.words))))
            targets.append(Target(name=concept.name, words=concept.words, candidates=candidates))
    return targets


def _promoted_targets(features: Sequence[Feature], n: int) -> list[Target]:
    """Features that are neither rare nor dense and promote whole words, those that typically fire most strongly."""
    targets = []
    for feature in sorted(features, key=lambda feature: -feature.typical_act):
        words = tuple(dict.fromkeys(w for t in feature.promotes if (w := t.strip().lower()).isalpha() and len(w) > 1))
        if 5e-4 <= feature.density <= 0.05 and len(words) >= 3 and len(targets) < n:
            targets.append(Target(name=" ".join(words[:3]), words=words, candidates=(feature.id,)))
    return targets


def steer_towards(
    lm: LanguageModel,
    sae: SAE,
    targets: Sequence[Target],
    unseen: Sequence[str],
    prompts: Sequence[str],
    config: QuickstartConfig,
) -> list[SteeredTarget]:
    """Choose targets, features and strengths on the texts `unseen`; report what they do to continuations of `prompts`.

    Chosen is what raises the probability of a target's words most while costing at most `AFFORDABLE` nats per token.
    """
    choices: list[tuple[float, Target, int, float]] = []
    screen = Screen(lm, sae, unseen)
    for target in progress(targets, desc="trying features"):
        options = [option for feature in target.candidates for option in screen(feature, target.words)]
        rise, feature, strength = max(options, default=(0.0, target.candidates[0], STRENGTHS[1]))
        choices.append((rise, target, feature, strength))
    choices.sort(key=lambda choice: -choice[0])
    return [
        SteeredTarget(
            target=target,
            feature=feature,
            label=sae.labels.text(feature),
            strength=strength,
            doses=dose_response(lm, sae, feature, target.words, prompts, config),
        )
        for _, target, feature, strength in choices[: config.targets]
    ]


class Screen:
    """What features do to the words of a target, from forward passes over texts."""

    @torch.no_grad()
    def __init__(self, lm: LanguageModel, sae: SAE, texts: Sequence[str]) -> None:
        self.lm, self.sae, self.batch = lm, sae, lm.encode(texts)
        self.base = self.logits().log_softmax(-1)
        self.entropy = -(self.base.exp() * self.base).sum(-1).mean()

    def logits(self) -> Tensor:
        """[n, V] at the tokens of the texts."""
        batch = self.batch
        return self.lm.logits(batch.input_ids, batch.attention_mask)[batch.attention_mask.bool()].float()

    @torch.no_grad()
    def __call__(self, feature: int, words: Sequence[str]) -> list[tuple[float, int, float]]:
        """The affordable strengths of a feature as (rise, feature, strength).

        The rise is in the mean probability of a word of `words` as the next token. The cost is how many more nats a
        token drawn from the steered model has under the unsteered one than a token that it draws itself.
        """
        wanted = torch.tensor(sorted({self.lm.token_ids(f" {word}")[0] for word in words}), device=self.lm.device)
        mass = self.base[:, wanted].exp().sum(-1).mean()
        affordable = []
        for strength in STRENGTHS[1:]:
            with Steerer(self.lm).features(self.sae, {feature: strength}, mode="add", units="max_act"):
                probability = self.logits().softmax(-1)
            if float(-(probability * self.base).sum(-1).mean() - self.entropy) <= AFFORDABLE:
                affordable.append((float(probability[:, wanted].sum(-1).mean() - mass), feature, strength))
        return affordable


def dose_response(
    lm: LanguageModel, sae: SAE, feature: int, words: Sequence[str], prompts: Sequence[str], config: QuickstartConfig
) -> list[Dose]:
    """What each strength of a feature does to the continuations of `prompts`: all of them are rows of one batch."""
    rows = [{feature: strength} for strength in STRENGTHS for _ in prompts]
    with Steerer(lm).features(sae, rows, mode="add", units="max_act", scope="generation"):
        made = lm.generate(
            list(prompts) * len(STRENGTHS), max_new_tokens=config.max_new_tokens, do_sample=True, seed=config.seed
        )
    nll = token_nll(lm.logits(made.tokens, made.attention_mask), made.tokens)
    generated = made.attention_mask.bool()[:, 1:].clone()
    generated[:, : made.prompt_columns - 1] = False
    doses = []
    for i, strength in enumerate(STRENGTHS):
        part = slice(i * len(prompts), (i + 1) * len(prompts))
        doses.append(
            Dose(
                strength=strength,
                rate=word_rate(made.completions[part], words),
                nll=float(nll[part][generated[part]].mean()),
                texts=tuple(made.texts[part]),
            )
        )
    return doses


def summary(results: Results) -> str:
    """The results for a terminal."""
    lines = ["", results.evaluation.to_text(), ""]
    if results.concepts:
        clear = sum(match.auroc >= 0.95 for match in results.concepts)
        lines.append(f"{clear} of {len(results.concepts)} concepts have a feature with an AUROC of at least 0.95")
        lines += [f"  {m.concept:<16} feature {m.feature:<5} AUROC {m.auroc:.3f}" for m in results.concepts[:12]]
    for steered in results.steered:
        plain, best = steered.doses[0], steered.dose
        lines.append("")
        feature = named_feature(steered.feature, steered.label)
        lines.append(f"{steered.target.name}: {feature} at {best.strength:g} x its maximum")
        lines.append(f"  its words: {plain.rate:.1f} -> {best.rate:.1f} per 100 words")
        lines.append(f"  nats per token under the unsteered model: {plain.nll:.2f} -> {best.nll:.2f}")
        lines.append(f"  unsteered  {plain.texts[0]}")
        lines.append(f"  steered    {best.texts[0]}")
    lines += [part.to_text() for part in (results.targeted, results.contrast) if part is not None]
    return "\n".join(lines)
