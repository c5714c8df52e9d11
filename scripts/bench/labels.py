"""How well labels made of tokens name what a feature reads and what it writes, on the bundled model, whose grammar
knows the concept of every word.

A feature READS a concept whose words it tells from all others with an AUROC of at least `--auroc` on held-out stories;
it WRITES the concept that adding it (at its largest activation) makes likelier to come next by most, if that is by at
least `--rise` of probability, on average over held-out texts. A label names a concept where one of its words is a word
of the concept, or the token that only words of this concept begin with. Printed for each source of the tokens and all
together, with as many words a side: the shares of the features whose label names what they read, and what they write.

    steersman quickstart --out quickstart
    python scripts/bench/labels.py --sae quickstart/sae --store quickstart/acts
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice

import torch
import tyro

from steersman import SAE, ActivationStore, LanguageModel, Steerer, summarize_features
from steersman.demo import CONCEPT_OF_WORD, CONCEPTS, MODEL_PATH, stories, texts
from steersman.demo.concept_features import auroc, encode_stories
from steersman.steer import label_features, words_fired_on

HELD_OUT = 3
"""Seed of stories that neither the model nor a quickstart's SAE was trained on."""
NAMES = list(CONCEPTS)


@dataclass(frozen=True, kw_only=True)
class Config:
    sae: str
    """Folder of an SAE of the bundled model."""
    store: str
    """Folder of its store."""
    words: int = 3
    """Words of each side of a label."""
    texts: int = 4
    """Texts that features are clamped on."""
    auroc: float = 0.9
    """From which AUROC on a feature reads a concept."""
    rise: float = 0.02
    """From which rise in probability on it writes one."""
    stories: int = 400
    """Held-out stories."""


@torch.no_grad()
def concepts_read(lm: LanguageModel, sae: SAE, config: Config) -> dict[int, str]:
    """Feature -> the concept whose words it tells from others best."""
    codes, labels = encode_stories(lm, sae, list(islice(stories(HELD_OUT), config.stories)))
    best = auroc(codes, labels).nan_to_num(nan=0.0).max(1)
    rows = zip(best.values.tolist(), best.indices.tolist())
    return {j: NAMES[c] for j, (value, c) in enumerate(rows) if value >= config.auroc}


@torch.no_grad()
def concepts_written(lm: LanguageModel, sae: SAE, config: Config) -> dict[int, str]:
    """Feature -> the concept whose words it makes likelier by most."""
    batch = lm.encode(texts(8, seed=HELD_OUT + 1))
    real = batch.attention_mask.bool()
    first = [torch.tensor(sorted({lm.token_ids(f" {word}")[0] for word in CONCEPTS[name].words})) for name in NAMES]

    def mass() -> torch.Tensor:
        p = lm.logits(batch.input_ids, batch.attention_mask)[real].float().softmax(-1).mean(0)
        return torch.stack([p[ids].sum() for ids in first])

    base, found, st = mass(), {}, Steerer(lm)
    assert sae.feature_stats is not None
    for j in (sae.feature_stats.max_act > 0).nonzero()[:, 0].tolist():
        with st.features(sae, {j: 1.0}, mode="add", units="max_act"):
            rise = mass() - base
        if float(rise.max()) >= config.rise:
            found[j] = NAMES[int(rise.argmax())]
    return found


def concepts_named(lm: LanguageModel) -> Callable[[str], set[str]]:
    """The concepts that a label names."""
    begins: defaultdict[str, set[str]] = defaultdict(set)
    for name in NAMES:
        for word in CONCEPTS[name].words:
            begins[lm.tokenizer.decode(lm.token_ids(f" {word}")[:1]).strip()].add(name)
    exact = {word.casefold(): concept.name for word, concept in CONCEPT_OF_WORD.items()}

    def named(text: str) -> set[str]:
        words = [word.strip() for word in text.replace("->", ",").split(",")]
        whole = {exact[word.casefold()] for word in words if word.casefold() in exact}
        return whole | {name for word in words if len(begins[word]) == 1 for name in begins[word]}

    return named


def main(config: Config) -> None:
    """Print the shares, one line for each source."""
    lm, sae = LanguageModel.load(str(MODEL_PATH), device="cpu"), SAE.load(config.sae)
    report = summarize_features(sae, ActivationStore.open(config.store), lm, contexts=12)
    fires_on = words_fired_on(asdict(feature) for feature in report.features)
    reads, writes, named = concepts_read(lm, sae, config), concepts_written(lm, sae, config), concepts_named(lm)
    both = {j for j in reads if j in writes}
    print(f"{len(reads)} features read a concept, {len(writes)} write one, {len(both)} do both, ", end="")
    print(f"{sum(reads[j] == writes[j] for j in both)} of these the same")
    print(f"{'label from':<24} {'reads':>6} {'writes':>7} {'mean':>6}")
    for sources in (("contexts",), ("vocab",), ("change",), ("vocab", "change"), ("contexts", "vocab", "change")):
        labels = label_features(
            lm, sae, fires_on=fires_on, texts=texts(config.texts, seed=HELD_OUT + 2), sources=sources,
            words=config.words, null_directions=256 if len(sources) > 1 else 0,
        )  # fmt: skip
        shares = [
            sum(known[j] in named(labels.text(j)) for j in known) / max(1, len(known)) for known in (reads, writes)
        ]
        print(f"{'+'.join(sources):<24} {shares[0]:>6.2f} {shares[1]:>7.2f} {sum(shares) / 2:>6.2f}")


if __name__ == "__main__":
    main(tyro.cli(Config))
