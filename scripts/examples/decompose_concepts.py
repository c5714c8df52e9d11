"""Contrast vectors between concepts of the bundled model, taken apart: do the features carry the right names?

For pairs of concepts of one group, the vector is the difference of mean states at their words. Its matching pursuit of
at most 16 features should hold, positive, the feature that tells the first concept's words from the rest of the group,
and negative, that of the second; and steering with the reconstruction should raise the first concept's words, and lower
the second's, as the vector does. The features are named by AUROC on stories that the vector never saw.

    python scripts/examples/decompose_concepts.py --pairs 12
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tyro

from steersman import SAE, LanguageModel, SteeringVector, TrainConfig, cache_activations, decompose, train_sae
from steersman.demo import CONCEPTS, GROUPS, MODEL_PATH, stories, texts
from steersman.demo.concept_features import ConceptFeature, auroc, encode_stories
from steersman.steer import calibrate, measure_retention


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path = Path("decompose_concepts")
    """Folder for the SAE and results.json."""
    pairs: int = 12
    """Pairs of concepts at most."""
    least: float = 0.9
    """AUROC from which a feature names a concept."""
    tokens: int = 400_000
    """Tokens to train the SAE on."""
    d_sae: int = 512
    """Features of the SAE."""
    features: int = 16
    """Features of a decomposition at most."""
    examples: int = 100
    """Texts of each side."""
    kl: float = 0.3
    """Nats per token that the vector may cost."""


def concept_texts(concept: str, n: int, seed: int) -> list[str]:
    """Stories up to and with a word of the concept, so that its state is the last one."""

    def cut() -> Iterator[str]:
        for story in stories(seed):
            ends = [end for _, end, name in story.spans if name == concept]
            if ends:
                yield story.text[: ends[0]]

    return list(islice(cut(), n))


def name_features(lm: LanguageModel, sae: SAE, n: int, seed: int) -> dict[str, ConceptFeature]:
    """The feature that tells a concept's words from those of the other concepts of its group, by AUROC: chosen on one
    half of n stories, scored on the other. (One that tells a group from all other words would name no concept.)"""
    made = list(islice(stories(seed), n))
    choosing, scoring = (encode_stories(lm, sae, half) for half in (made[: n // 2], made[n // 2 :]))
    names, found = list(CONCEPTS), {}
    for group in GROUPS:
        members = [i for i, name in enumerate(names) if CONCEPTS[name].group == group]
        scores = []
        for codes, labels in (choosing, scoring):
            inside = labels[:, members].any(dim=1)
            scores.append((auroc(codes[inside], labels[inside][:, members]).nan_to_num(0.0), labels[inside]))
        for column, i in enumerate(members):
            feature = int(scores[0][0][:, column].argmax())
            found[names[i]] = ConceptFeature(
                concept=names[i],
                feature=feature,
                auroc=float(scores[1][0][feature, column]),
                n_tokens=int(scores[1][1][:, i].sum()),
            )
    return found


def concept_pairs(named: dict[str, ConceptFeature], least: float, n: int) -> list[tuple[str, str]]:
    """Pairs of concepts of one group with a feature each that names them (AUROC at least `least`), from all groups."""
    pairs: list[tuple[str, str]] = []
    for i in range(8):
        for group in GROUPS:
            names = [c.name for c in CONCEPTS.values() if c.group == group and named[c.name].auroc >= least]
            if len(names) >= 2 * i + 2 and named[names[2 * i]].feature != named[names[2 * i + 1]].feature:
                pairs.append((names[2 * i], names[2 * i + 1]))
    return pairs[:n]


def main(args: Config) -> None:
    """Measure and print the table."""
    lm = LanguageModel.load(str(MODEL_PATH))
    out, hook = args.out, f"blocks.{lm.n_layers // 2}.hook_resid_post"
    store = cache_activations(
        lm, texts(args.tokens // 60 + 50, seed=0), hook=hook, out=str(out / "acts"), tokens=args.tokens
    )
    sae: SAE = train_sae(store, TrainConfig(d_sae=args.d_sae, k=16), out / "sae")
    named = name_features(lm, sae, 400, seed=3)
    clear = [match for match in named.values() if match.auroc >= args.least]
    print(f"{len(clear)} of {len(named)} concepts have a feature that tells them from the rest of their group")
    labels: dict[int, str] = {}
    for match in sorted(clear, key=lambda match: -match.auroc):
        labels.setdefault(match.feature, match.concept)
    unseen = texts(48, seed=11)

    rows: list[dict[str, Any]] = []
    print(
        f"{'pair':<34} {'signs':>6} {'rank':>6} {'EV':>6} {'random':>7} {'retained':>9} {'rise kept':>10} "
        f"{'equal KL':>9}"
    )
    for a, b in concept_pairs(named, args.least, args.pairs):
        plus, minus = concept_texts(a, args.examples, 7), concept_texts(b, args.examples, 8)
        v = SteeringVector.contrast(lm, plus, minus, hook=hook, method="diffmean", positions="last")
        v = calibrate(v, lm, texts=unseen, target_kl=args.kl).vector
        found = decompose(v, sae, method="omp", k=args.features, labels=labels)
        parts = found.as_features()
        order = sorted(parts, key=lambda j: -abs(parts[j]))
        own = [named[a].feature, named[b].feature]
        signs = (parts.get(own[0], 0.0) > 0) + (parts.get(own[1], 0.0) < 0)
        ranks = "/".join(str(order.index(j) + 1) if j in parts else "-" for j in own)
        kept = measure_retention(found, lm, unseen, toward=CONCEPTS[a].words, away=CONCEPTS[b].words)
        norm, kl = kept["reconstruction, equal norm"], kept["reconstruction, equal KL"]
        print(
            f"{a + ' - ' + b:<34} {signs:>4}/2 {ranks:>6} {found.explained_variance:>6.3f} "
            f"{float(found.null_curve[-1]):>7.3f} {norm.retained:>9.3f} {norm.rise_retained or 0:>10.3f} "
            f"{kl.rise_retained or 0:>9.3f}"
        )
        rows.append({"pair": [a, b], "signs": signs, "decomposition": found.to_dict(), "retention": kept.to_dict()})
        rows[-1] |= {"retained": norm.retained, "rise_retained": norm.rise_retained}
    print(
        f"mean: signs {statistics.mean(row['signs'] for row in rows):.2f}/2, retained "
        f"{statistics.mean(row['retained'] for row in rows):.3f} (least {min(row['retained'] for row in rows):.3f}), "
        f"rise kept {statistics.mean(row['rise_retained'] for row in rows):.3f} "
        f"(least {min(row['rise_retained'] for row in rows):.3f})"
    )
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
