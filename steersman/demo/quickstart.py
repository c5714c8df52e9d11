"""`steersman quickstart`: the whole job on the bundled model (or any other) in one command, with a report to look at.

Cache activations, train an SAE, measure it, see its features, steer by a few of them. On the bundled model the
grammar's exact labels say which feature stands for which concept; on another model the tokens that a feature promotes
take the place of a concept's words.
"""

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from steersman.demo import CONCEPTS, MODEL_PATH
from steersman.demo.concept_features import ConceptFeature, match_concepts
from steersman.demo.grammar import stories, texts
from steersman.demo.report import write_report
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer import Steerer
from steersman.steer.compare import token_nll
from steersman.train import ActivationStore, TrainConfig, cache_activations, train_sae
from steersman.train.evaluate import Evaluation, evaluate_sae
from steersman.train.feature_report import Feature, describe_features, features_to_json, summarize_store
from steersman.train.text import open_text
from steersman.train.trainer import pick_device

log = logging.getLogger(__name__)

HELDOUT_SEED = 1
"""Stories of this seed are never trained on: the model saw others, and the store holds those of seed 0."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """See features, steer by them and read a report: on the bundled model, or on --model with --text."""

    out: str = "quickstart"
    """Folder for the store, the SAE and report.html. Run again, it goes on where it stopped."""
    model: str | None = None
    """Folder or hub id of a model; the bundled one if not given."""
    text: str | None = None
    """File, folder or dataset id of the text; stories of the grammar if not given."""
    hook: str | None = None
    """Hook point; the output of the middle block if not given."""
    tokens: int = 400_000
    """Tokens to cache and train on."""
    d_sae: int = 512
    """Number of features."""
    k: int = 16
    """Active features a token."""
    targets: int = 4
    """Features to steer by."""
    samples: int = 16
    """Texts generated at each strength."""
    max_new_tokens: int = 48
    """Tokens generated in each text."""
    seed: int = 0
    """Seed of the text, the training and the generation."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something to steer towards: a feature and the words by which to see that it worked."""

    name: str
    """Name of the concept, or the first tokens that the feature promotes."""
    feature: int
    """Feature id."""
    words: tuple[str, ...]
    """The words that should become more frequent."""


@dataclass(frozen=True, kw_only=True)
class Dose:
    """What one strength does, over all samples."""

    strength: float
    """In multiples of the feature's largest activation in training; 0 is unsteered."""
    rate: float
    """Words of the target per 100 generated words."""
    nll: float
    """Nats per generated token of the text under the unsteered model."""
    text: str
    """The first sample."""


@dataclass(frozen=True, kw_only=True)
class SteeredTarget:
    """A target with its dose-response curve."""

    target: Target
    """What was steered towards."""
    doses: list[Dose]
    """By rising strength; the first is unsteered."""

    @property
    def best(self) -> Dose:
        """The strength that raises the words most while costing at most 1.5 nats per token, if any does."""
        affordable = [dose for dose in self.doses[1:] if dose.nll <= self.doses[0].nll + 1.5]
        return max(affordable or self.doses[1:2], key=lambda dose: dose.rate)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything the report shows."""

    model_name: str
    hook_name: str
    run: Path
    evaluation: Evaluation
    concepts: list[ConceptFeature]
    features: list[Feature]
    steered: list[SteeredTarget]
    seconds: float


STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
STARTS = ("Once upon a time", "One day", "There once was", "This is the story of")


def run_quickstart(config: QuickstartConfig) -> None:
    """`steersman quickstart`."""
    results = quickstart(config)
    print(summary(results))
    print(f"\nreport: {Path(config.out) / 'report.html'}   ({results.seconds:.0f} s)")


def quickstart(config: QuickstartConfig) -> Results:
    """Run every step and write `report.html`, `results.json` and `features.json` to `config.out`."""
    start = time.monotonic()
    bundled = config.model is None
    if not bundled and config.text is None:
        raise SteersmanError("--model needs --text: the text to read it on")
    device = pick_device(config.device)
    out = Path(config.out)

    log.info("[1/6] loading the model and caching activations")
    lm = LanguageModel.load(config.model or str(MODEL_PATH), device=device)
    hook = lm.resolve_hook(config.hook or f"blocks.{(lm.n_layers - 1) // 2}.hook_resid_post")
    source: Any = config.text if config.text is not None else texts(config.tokens // 60 + 50, seed=config.seed)
    store = cache_activations(lm, source, hook=hook, out=str(out / "acts"), tokens=config.tokens)

    log.info("[2/6] training an SAE with %d features", config.d_sae)
    settings = TrainConfig(d_sae=config.d_sae, k=config.k, seed=config.seed, device=config.device)
    sae = train_sae(store, settings, out / "sae")

    log.info("[3/6] measuring it")
    evaluation = evaluate_sae(sae, store, lm, _heldout_texts(store, source, bundled and config.text is None))

    log.info("[4/6] reading its features")
    summary = summarize_store(sae, store)
    features = describe_features(sae, store, lm, summary, list(range(sae.cfg.d_sae)))
    features_to_json(features, out / "features.json")

    log.info("[5/6] naming features")
    concepts = match_concepts(lm, sae, list(islice(stories(HELDOUT_SEED), 400))) if config.text is None else []
    targets = _concept_targets(concepts, config.targets) if concepts else _promoted_targets(features, config.targets)

    log.info("[6/6] steering by %d of them", len(targets))
    steered = [steer_towards(lm, sae, target, config) for target in targets]
    results = Results(
        model_name=lm.name,
        hook_name=hook,
        run=out / "sae",
        evaluation=evaluation,
        concepts=concepts,
        features=features,
        steered=steered,
        seconds=time.monotonic() - start,
    )
    write_report(results, out / "report.html")
    figures = {"evaluation": evaluation.to_json(), "concepts": [asdict(c) for c in concepts]}
    figures |= {"steered": [asdict(s) for s in steered], "seconds": results.seconds}
    (out / "results.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return results


def _heldout_texts(store: ActivationStore, source: Any, made: bool, n: int = 100) -> list[str]:
    """Texts that were not trained on: fresh stories, or the store's held-out documents."""
    if made:
        return texts(n, seed=HELDOUT_SEED)
    first, _ = store.split_rows("heldout")
    return list(islice(open_text(source).documents(int(store.tokens(first, first + 1).doc_ids[0])), n))


def _concept_targets(concepts: Sequence[ConceptFeature], n: int) -> list[Target]:
    """The concepts with the clearest features, one of each group of the grammar (names of people left out)."""
    chosen: dict[str, Target] = {}
    for match in concepts:
        group = CONCEPTS[match.concept].group
        if group != "name" and group not in chosen and len(chosen) < n:
            chosen[group] = Target(name=match.concept, feature=match.feature, words=CONCEPTS[match.concept].words)
    return list(chosen.values())


def _promoted_targets(features: Sequence[Feature], n: int) -> list[Target]:
    """Features that are neither rare nor dense and promote whole words, the ones with the largest activations."""
    targets = []
    for feature in sorted(features, key=lambda feature: -feature.max_act):
        words = tuple(dict.fromkeys(w for t in feature.promotes if (w := t.strip().lower()).isalpha() and len(w) > 1))
        if 5e-4 <= feature.density <= 0.05 and len(words) >= 3 and len(targets) < n:
            targets.append(Target(name=" ".join(words[:3]), feature=feature.id, words=words))
    return targets


def steer_towards(lm: LanguageModel, sae: SAE, target: Target, config: QuickstartConfig) -> SteeredTarget:
    """The dose-response curve of a target: every strength and sample is a row of one batch."""
    starts = [STARTS[i % len(STARTS)] for i in range(config.samples)]
    prompts = [start for _ in STRENGTHS for start in starts]
    rows = [{target.feature: strength} for strength in STRENGTHS for _ in starts]
    with Steerer(lm).features(sae, rows, mode="add", units="max_act", scope="generation"):
        made = lm.generate(prompts, max_new_tokens=config.max_new_tokens, do_sample=True, seed=config.seed)
    nll = token_nll(lm.logits(made.tokens, made.attention_mask), made.tokens)
    generated = made.attention_mask.bool()[:, 1:].clone()
    generated[:, : made.prompt_columns - 1] = False
    doses = []
    for i, strength in enumerate(STRENGTHS):
        part = slice(i * len(starts), (i + 1) * len(starts))
        doses.append(
            Dose(
                strength=strength,
                rate=word_rate(made.completions[part], target.words),
                nll=float(nll[part][generated[part]].mean()),
                text=made.texts[part][0],
            )
        )
    return SteeredTarget(target=target, doses=doses)


def word_rate(completions: Sequence[str], words: Sequence[str]) -> float:
    """Words of `words` per 100 words of `completions`.

    >>> word_rate(["The fog came. Fog!", "Mist and fog everywhere"], ("fog", "mist"))
    50.0
    """
    found = re.findall(r"\w+", " ".join(completions).lower())
    wanted = {word.lower() for word in words}
    return 100 * sum(word in wanted for word in found) / max(1, len(found))


def summary(results: Results) -> str:
    """The results for a terminal."""
    lines = ["", results.evaluation.to_text(), ""]
    if results.concepts:
        clear = sum(match.auroc >= 0.95 for match in results.concepts)
        lines.append(f"{clear} of {len(results.concepts)} concepts have a feature with an AUROC of at least 0.95")
        lines += [f"  {m.concept:<16} feature {m.feature:<5} AUROC {m.auroc:.3f}" for m in results.concepts[:12]]
    for steered in results.steered:
        plain, best = steered.doses[0], steered.best
        lines.append("")
        lines.append(f"{steered.target.name}: feature {steered.target.feature} at {best.strength:g} x its maximum")
        lines.append(f"  its words: {plain.rate:.1f} -> {best.rate:.1f} per 100 words")
        lines.append(f"  nats per token under the unsteered model: {plain.nll:.2f} -> {best.nll:.2f}")
        lines.append(f"  unsteered  {plain.text}")
        lines.append(f"  steered    {best.text}")
    return "\n".join(lines)
