"""Every vector of a concept or goal, each made once in WORK/vectors: a feature's decoder row, contrasts, trained ones.

All are made from a topic's training texts at the layer that is steered. Those that need no gradient come from one
reading of these texts (tokens of the answer, or of the whole text where it answers nothing):

| method | what it is |
|---|---|
| `feature` | the decoder row of the feature whose largest activation in a text tells the sides apart best (AUROC) |
| `feature_output` | of the best such features the one of the highest output score (arXiv 2505.20063) |
| `diffmean`, `probe` | over tokens (arXiv 2501.17148) |
| `caa` | difference of the means over texts (arXiv 2312.06681; here the sides answer different prompts) |
| `pca` | first component of the differences of paired texts' means (arXiv 2310.01405) |
| `pca_tokens` | first component of all tokens about their mean, as AxBench has it |
| `reft_r1`, `ssv` | trained on few short texts (arXiv 2501.17148) |
| `random` | a random direction of diffmean's length |
"""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steersman import SAE, SteeringVector
from steersman.files import write_whole
from steersman.ranking import auroc
from steersman.steer import ContrastConfig, common_prefix, contrast, score_features
from steersman.steer.methods import METHODS as CONTRASTS
from steersman.steer.methods import StreamedMethod
from study.common import Study
from study.material import Concept, Example, Goal, Material

FROM_STATES = ("feature", "feature_output", "diffmean", "caa", "pca", "pca_tokens", "probe", "random")
TRAINED = ("reft_r1", "ssv")
METHODS = (*FROM_STATES, *TRAINED)
CANDIDATES = 8
"""Features among which the output score chooses."""

Topic = Concept | Goal
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of a topic's texts is read."""

    positives: int = 48
    """Texts of the positive side, evenly spaced."""
    negatives: int = 96
    """Of the negative side."""
    tokens: int = 48
    """Tokens of a text, of its prompt the last third at most."""
    trained: int = 8
    """Texts of each side that `reft_r1` and `ssv` (of the positive side alone) are trained on."""
    trained_tokens: int = 24
    """Tokens of each of those."""
    epochs: int = 2
    """Passes over them."""
    batch: int = 2
    """Texts of a step."""
    reft_r1_rate: float = 0.01
    """Learning rate, AxBench's."""
    ssv_rate: float = 0.3
    """Learning rate: on so few texts AxBench's 0.01 leaves the vector a hundredth as long as the states."""


def sizes(study: Study) -> Sizes:
    """The sizes of a study."""
    return Sizes(positives=8, negatives=16, trained=4, trained_tokens=16) if study.config.small else Sizes()


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Texts of both sides."""

    positive: list[Example]
    negative: list[Example]


def training(topic: Topic) -> Sides:
    """What vectors are made from; of a goal every other prompt."""
    return _half(topic, 0) if isinstance(topic, Goal) else Sides(positive=topic.positive, negative=topic.negative)


def held_out(topic: Topic) -> Sides:
    """What is measured on, which no vector was made from; of a goal the other half of its prompts."""
    if isinstance(topic, Goal):
        return _half(topic, 1)
    return Sides(positive=topic.eval_positive, negative=topic.eval_negative)


def of_others(material: Material, topic: Topic, sides: Callable[[Topic], Sides], n: int) -> list[Example]:
    """n texts of other topics of its kind, in turn: texts of the kind that the topic's are of, without what they are
    about. `sides` is `training` or `held_out`."""
    others = spread(material.others(topic), n)
    found = [spread(sides(other).positive, math.ceil(n / len(others))) for other in others]
    return [example for turn in zip_longest(*found) for example in turn if example is not None][:n]


def _half(goal: Goal, start: int) -> Sides:
    sides = ([Example(prompt="", text=text) for text in side[start::2]] for side in (goal.positive, goal.negative))
    positive, negative = sides
    return Sides(positive=positive, negative=negative)


def vector(study: Study, topic: Topic, method: str) -> SteeringVector:
    """The vector of a topic by a method of `METHODS`, as it was made; made now where it is not there."""
    path = place(study, topic) / f"{method}.safetensors"
    if not path.exists():
        if method in TRAINED:
            _trained(study, topic, method).save(path)
        else:
            for name, made in _from_states(study, topic).items():
                made.save(place(study, topic) / f"{name}.safetensors")
    return SteeringVector.load(path)


def best_features(study: Study, topic: Topic) -> list[int]:
    """The features that tell the training texts apart best, the best first."""
    return [int(feature) for feature in vector(study, topic, "feature").metadata["best"]]


def place(study: Study, topic: Topic) -> Path:
    """The folder of a topic's vectors."""
    group = topic.group if isinstance(topic, Concept) else "goal"
    short = re.sub(r"\W+", "-", topic.name)[:40].strip("-")
    return study.config.work / "vectors" / f"{group}-{short}-{zlib.crc32(topic.name.encode()):08x}"


# Reading


@dataclass(frozen=True, kw_only=True, eq=False)
class States:
    """The states of some texts at the layer that is steered, the tokens of their answers, BOS left out."""

    x: Tensor
    """[N, D] fp32."""
    text: Tensor
    """[N]: the number of the text that each token is of."""
    n: int
    """Texts."""

    def means(self) -> Tensor:
        """[n, D]: the mean of each text."""
        total = torch.zeros(self.n, self.x.shape[1]).index_add_(0, self.text, self.x)
        return total / torch.bincount(self.text, minlength=self.n)[:, None]

    def largest(self, values: Tensor) -> Tensor:
        """[n, L]: the largest over each text's tokens of values [N, L]."""
        found = torch.full((self.n, values.shape[1]), float("-inf"))
        return found.scatter_reduce_(0, self.text[:, None].expand_as(values), values, "amax")

    def largest_features(self, sae: SAE) -> Tensor:
        """[n, d_sae]: each feature's largest activation in each text."""
        found = torch.full((self.n, sae.cfg.d_sae), float("-inf"))
        for x, text in zip(self.x.split(1024), self.text.split(1024)):
            code = sae.encode(x.to(sae.device)).detach().float().cpu()
            found.scatter_reduce_(0, text[:, None].expand_as(code), code, "amax")
        return found


def cut(study: Study, example: Example, tokens: int) -> tuple[str, str]:
    """(prompt, answer) of about so many tokens together, cut between words: of the prompt the end, a third of them at
    most, of the answer the beginning. A prompt and an answer that no space parts stand on lines of their own."""
    words = re.findall(r"\S+\s*", example.prompt)[::-1]
    prompt = "".join(_within(study, words, tokens // 3)[::-1]) if example.prompt else ""
    left = tokens - len(study.lm.token_ids(prompt)) if prompt else tokens
    answer = "".join(_within(study, re.findall(r"\s*\S+", example.text), left)) or example.text
    return (prompt if not prompt or answer[:1].isspace() else prompt.rstrip() + "\n"), answer


def _within(study: Study, words: Sequence[str], tokens: int) -> list[str]:
    """The first words that have so many tokens together, one at least."""
    kept, used = list(words[:1]), 0
    for i, word in enumerate(words):
        used += max(1, len(study.lm.token_ids(word)))
        if used > tokens and i:
            break
        kept = list(words[: i + 1])
    return kept


def spread(items: Sequence[Item], n: int) -> list[Item]:
    """n of the items, evenly spaced."""
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else list(items)


@torch.no_grad()
def read(study: Study, examples: Sequence[Example], tokens: int, batch_size: int = 16) -> States:
    """The states of examples that are cut to `tokens` tokens."""
    lm, hook = study.lm, study.hook()
    rows: list[Tensor] = []
    owners: list[int] = []
    for start in range(0, len(examples), batch_size):
        pairs = [cut(study, example, tokens) for example in examples[start : start + batch_size]]
        batch = lm.encode([prompt + answer for prompt, answer in pairs], max_length=tokens + 1)
        h = lm.capture(batch, hooks=[hook])[hook].float().cpu()
        for i, (prompt, _) in enumerate(pairs):
            length, first = int(batch.lengths[i]), int(lm.bos_token_id is not None)
            if prompt:
                first = max(first, common_prefix(batch.input_ids[i].tolist(), lm.token_ids(prompt, bos=True)))
            first = min(first, length - 1)
            rows.append(h[i, first:length])
            owners += [start + i] * (length - first)
    return States(x=torch.cat(rows), text=torch.tensor(owners), n=len(examples))


# Making


def _sides(study: Study, topic: Topic) -> tuple[States, States]:
    """The states of both sides. Negatives that the concepts of a group share are read once, into a file."""
    size, texts = sizes(study), training(topic)
    positive = read(study, spread(texts.positive, size.positives), size.tokens)
    negatives = spread(texts.negative, size.negatives)
    if isinstance(topic, Goal):
        return positive, read(study, negatives, size.tokens)
    told = zlib.crc32("\n".join(e.prompt + e.text for e in negatives).encode())
    path = study.config.work / "vectors" / f"negatives-{topic.group}-{told:08x}.safetensors"
    if not path.exists():
        found = read(study, negatives, size.tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda whole: save_file({"x": found.x, "text": found.text}, whole))
    kept = load_file(path)
    return positive, States(x=kept["x"], text=kept["text"], n=len(negatives))


def _from_states(study: Study, topic: Topic) -> dict[str, SteeringVector]:
    """All vectors that need no gradient."""
    plus, minus = _sides(study, topic)
    tokens = torch.cat([plus.x, minus.x]), torch.tensor([True] * len(plus.x) + [False] * len(minus.x))
    pairs = min(plus.n, minus.n)
    means = torch.stack([plus.means()[:pairs], minus.means()[:pairs]], 1).flatten(0, 1)  # each positive, its negative
    of_pairs = means, torch.tensor([True, False] * pairs)
    of_texts = torch.cat([plus.means(), minus.means()]), torch.tensor([True] * plus.n + [False] * minus.n)
    given = {
        "diffmean": tokens, "probe": tokens, "caa": of_texts, "pca": of_pairs, "pca_tokens": tokens,
    }  # fmt: skip
    made = {name: _contrast(study, name, *samples) for name, samples in given.items()}
    seed = zlib.crc32(f"{study.config.seed} {topic.name}".encode())
    return made | {"random": made["diffmean"].random_like(seed)} | _features(study, plus, minus)


def _contrast(study: Study, name: str, x: Tensor, positive: Tensor) -> SteeringVector:
    """A vector by a method of `contrast`, from states x [N, D] that are at hand."""
    method, centre = ("pca", "corpus") if name == "pca_tokens" else (name, None)
    kind = CONTRASTS[method]
    assert issubclass(kind, StreamedMethod)
    estimator = kind.estimator(ContrastConfig(method=method, centre=centre))
    estimator.update(x, positive)
    return SteeringVector.of(
        estimator.direction(), hook_name=study.hook(), model_name=study.lm.name, method=name,
        metadata={"source": kind.source, "n": len(x)},
    )  # fmt: skip


def _features(study: Study, plus: States, minus: States) -> dict[str, SteeringVector]:
    """The feature of the best AUROC, and the one of the highest output score among the best."""
    sae = study.sae()
    largest = torch.cat([plus.largest_features(sae), minus.largest_features(sae)])
    told = auroc(largest, torch.tensor([True] * plus.n + [False] * minus.n)[:, None])[:, 0]
    # of features that tell the sides apart equally well (few prompts leave many) the one that fires most of its range
    stats = sae.feature_stats
    assert stats is not None  # as of every SAE that was trained here
    alive = stats.max_act > 0
    fired = (largest[: plus.n].mean(0) - largest[plus.n :].mean(0)) / stats.max_act.clamp_min(1e-6)
    order = sorted(alive.nonzero()[:, 0].tolist(), key=lambda j: (-round(float(told[j]), 6), -float(fired[j])))
    best = order[:CANDIDATES]
    scores = score_features(study.lm, sae, "output", feature=tuple(best), null_directions=0)["output"].values
    by_output = max(best, key=lambda j: float(scores[j]))
    notes = {
        "best": best, "auroc": [round(float(told[j]), 4) for j in best],
        "output_score": [round(float(scores[j]), 5) for j in best],
    }  # fmt: skip
    return {
        name: _noted(SteeringVector.of_feature(sae, j, hook_name=study.hook()), name, notes)
        for name, j in (("feature", best[0]), ("feature_output", by_output))
    }


def _noted(v: SteeringVector, method: str, notes: dict[str, Any]) -> SteeringVector:
    return replace(v, method=method, metadata=v.metadata | notes)


def _trained(study: Study, topic: Topic, method: str) -> SteeringVector:
    """A vector that is trained on the likelihood of texts; ReFT-r1 also on making the other side's unlikely."""
    size, texts = sizes(study), training(topic)
    positive, negative = (
        [cut(study, example, size.trained_tokens) for example in spread(side, size.trained)]
        for side in (texts.positive, texts.negative)
    )
    as_given = [[pair if pair[0] else pair[1] for pair in side] for side in (positive, negative)]
    rate = size.reft_r1_rate if method == "reft_r1" else size.ssv_rate
    return contrast(
        study.lm, as_given[0], as_given[1] if method == "reft_r1" else (), hook=study.hook(), method=method, lr=rate,
        epochs=size.epochs, train_batch=size.batch, seed=study.config.seed, diagnostics=False,
    )  # fmt: skip
