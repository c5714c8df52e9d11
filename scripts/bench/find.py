"""How often the first feature that `find_features` names stands for what the examples share, on the bundled model.

For each concept of the story grammar: texts that mention it and as many that do not, drawn from stories of one seed;
`find_features` on them; and then, on stories of another seed, the AUROC with which the first feature's activation tells
the concept's words from all other tokens. The labels of the grammar choose the examples, as a person would, and judge
the feature; they take no part in finding it.

    python scripts/bench/find.py --sae quickstart/sae

`sentence` examples are single sentences, `story` examples whole stories, each with several other concepts in it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
import tyro

from steersman import SAE, LanguageModel
from steersman.demo import CONCEPTS, MODEL_PATH, Story, stories
from steersman.demo.concept_features import auroc, encode_stories
from steersman.steer import find_features

EXAMPLES_SEED, HELDOUT_SEED = 1007, 7
"""Stories that examples are drawn from, and those on which a found feature is judged: neither trained on."""


def sentences(story: Story) -> Iterator[tuple[str, set[str]]]:
    """The sentences of a story, each with the concepts it mentions."""
    start = 0
    for sentence in story.text.split(". "):
        sentence = sentence.removesuffix(".") + "."
        stop = start + len(sentence)
        yield sentence, {name for first, last, name in story.spans if start <= first and last <= stop}
        start = stop + 1


@dataclass(frozen=True, kw_only=True)
class Config:
    sae: str
    """Folder of an SAE of the bundled model."""
    examples: int = 20
    """Texts of each side."""
    draws: int = 3
    """Sets of examples drawn for each concept."""
    kind: Literal["sentence", "story"] = "sentence"
    """What an example is."""
    stories: int = 400
    """Stories that judge."""
    seed: int = 0
    """Added to the seeds of the stories: other examples, other judges."""
    least: float = 0.95
    """AUROC from which a feature matches a concept."""


def main(args: Config) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    lm, sae = LanguageModel.load(MODEL_PATH), SAE.load(args.sae)
    codes, labels = encode_stories(lm, sae, list(islice(stories(HELDOUT_SEED + args.seed), args.stories)))
    known = auroc(codes, labels).nan_to_num(nan=0.0)
    names = list(CONCEPTS)
    own = torch.nn.functional.one_hot(known.argmax(1), len(names)).bool() & (known >= args.least)
    print(
        f"{int((known.amax(0) >= args.least).sum())} of {len(names)} concepts have a feature of AUROC {args.least:g}, "
        f"{int(own.any(0).sum())} one that tells no other concept better"
    )
    pool = [
        text
        for story in islice(stories(EXAMPLES_SEED + args.seed), 1500)
        for text in ([(story.text, {n for *_, n in story.spans})] if args.kind == "story" else sentences(story))
    ]
    total = torch.zeros(3)
    missed: dict[str, list[str]] = {}
    for draw in range(args.draws):
        hits = torch.zeros(3)
        for column, name in enumerate(names):
            rng = random.Random(f"{name} {draw}")
            sides = [[text for text, said in pool if (name in said) is wanted] for wanted in (True, False)]
            positive, negative = (rng.sample(side, args.examples) for side in sides)
            found = [one.feature for one in find_features(lm, sae, positive, negative, top=3, output=False)]
            scores = known[found, column]
            hits += torch.tensor(
                [scores[0] >= args.least, scores.max() >= args.least, bool(own[found[0], column])], dtype=torch.float
            )
            if scores[0] < args.least:
                other = names[int(known[found[0]].argmax())]
                missed.setdefault(name, []).append(f"{found[0]} {float(scores[0]):.2f} ({other})")
        total += hits
        print(f"draw {draw}: {told(hits)}", flush=True)
    print(f"{args.kind}, {args.examples} + {args.examples} examples, mean of {args.draws}: {told(total / args.draws)}")
    for name, features in sorted(missed.items(), key=lambda entry: -len(entry[1])):
        print(
            f"  missed {name:<16} {'; '.join(features)}   best there is {float(known[:, names.index(name)].max()):.3f}"
        )


def told(hits: torch.Tensor) -> str:
    """The counts of concepts in words."""
    first, three, best = hits.tolist()
    return f"the first feature matches {first:.4g}, one of the first three {three:.4g}; it tells none better {best:.4g}"


if __name__ == "__main__":
    main(tyro.cli(Config))
