"""What one, two and five features tell about the 61 concepts of the bundled model's stories, beside raw activations,
random features and an SAE that learned nothing; and how far groups of concepts are split and absorbed.

    python scripts/bench/probing.py --sae quickstart/sae

The labels are exact: the grammar says of which concept each token is. Three questions are asked of the same stories:

`token`     is this token a word of the concept?
`text`      does this story mention it? (the largest activation over the tokens, which is what a reader of texts has)
`groups`    of the 14 groups of concepts (animal: pets, birds, ...), token by token, with splitting and absorption;
            which concept an absorbing feature stands for is known, too
"""

import json
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import tyro

from steersman import SAE, LanguageModel
from steersman.demo import CONCEPTS, MODEL_PATH, Story, stories
from steersman.demo.concept_features import auroc, encode_stories
from steersman.steer import ProbedFeatures, probe_features

SEED = 7
"""Stories that neither the model nor an SAE was trained on."""


@dataclass(frozen=True, kw_only=True)
class Config:
    sae: str
    """Folder of an SAE of the bundled model."""
    stories: int = 400
    """Stories, a quarter of which are held out."""
    ask: tuple[str, ...] = ("token", "text", "groups")
    """What to ask."""
    draws: int = 200
    """Draws for the intervals."""
    seed: int = 0
    """Added to the seed of the stories; and the seed of the split."""
    worst: int = 8
    """Labels shown: those that one feature tells worst."""
    out: str | None = None
    """Also write everything to this JSON file."""


def ask(lm: LanguageModel, sae: SAE, told: list[Story], question: str, config: Config) -> ProbedFeatures:
    """The probes for one question."""
    texts = [story.text for story in told]
    if question == "groups":
        labels = [[(a, b, CONCEPTS[name].group) for a, b, name in story.spans] for story in told]
        return probe_features(
            lm, sae, texts, labels, absorption=True, draws=config.draws, seed=config.seed, random_sae=False
        )
    labels = [list(story.spans) for story in told]
    level, pool = ("token", "last") if question == "token" else ("text", "max")
    return probe_features(lm, sae, texts, labels, level=level, pool=pool, draws=config.draws, seed=config.seed)


def main(config: Config) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    lm, sae = LanguageModel.load(MODEL_PATH), SAE.load(config.sae)
    told = list(islice(stories(SEED + config.seed), config.stories))
    record = {}
    for question in config.ask:
        started = time.process_time()
        found = ask(lm, sae, told, question, config)
        record[question] = found.to_json()
        print(f"\n{question}: {config.stories} stories, {time.process_time() - started:.0f} s of one core")
        for line in found.to_text().split("\n\n")[0].splitlines():
            print(f"  {line}")
        ones = sorted((p for p in found if (p.of, p.k) == ("sae", 1)), key=lambda p: p.auroc.mean)
        if question != "groups":
            told_well = sum(p.auroc.mean >= 0.97 for p in ones)
            print(f"  one feature has AUROC 0.97 for {told_well} of {len(ones)}; worst:")
            for probe in ones[: config.worst]:
                beside = {p.k: p.auroc.mean for p in found if p.label == probe.label and p.of == "sae"}
                figures = ", ".join(f"{value:.3f} with {k}" for k, value in beside.items())
                print(f"    {probe.label:<16} {figures}")
            continue
        print("\n".join(f"  {line}" for line in found.to_text().split("\n\n")[-1].splitlines()))
        codes, labels = encode_stories(lm, sae, told[: config.stories // 4])
        names = list(CONCEPTS)
        for one in found.absorption or []:
            for absorber in one.absorbers[:2]:
                scores = auroc(codes[:, [absorber.feature]], labels)[0]
                best = int(scores.nan_to_num().argmax())
                print(
                    f"  {one.label}: {absorber.feature} fires in place of its own on {absorber.n} tokens, and stands "
                    f"for {names[best]} ({CONCEPTS[names[best]].group}, AUROC {float(scores[best]):.3f})"
                )
    if config.out is not None:
        Path(config.out).write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
