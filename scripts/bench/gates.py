"""Gates on the bundled model, whose every token is labelled: does an edit touch the tokens of a concept and no others?

For each concept, the SAE feature and the threshold that tell its words best, by F1 on one half of the stories, make the
gate of an edit, a `TokenGate`. On the other half the stories are read with the edit open, and the tokens whose state
changed are held against the grammar's labels: precision is the share of the changed tokens that are the concept's,
recall the share of the concept's tokens that were changed, and of its words (one of several tokens is known at its last
alone). A row gate (`Condition`) on the prompt's largest activation is measured alike, by stories that mention the
concept or do not.

    python scripts/bench/gates.py --work bench-gates
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro

from steersman import SAE, LanguageModel, Steerer, TrainConfig, cache_activations, train_sae
from steersman.demo import CONCEPTS, MODEL_PATH, stories, texts
from steersman.demo.concept_features import auroc, encode_stories
from steersman.steer import Condition, Feature, TokenGate

HOOK = "blocks.2.hook_resid_post"
LATER = "blocks.3.hook_resid_post"
READ = 3  # seed of stories that neither the model nor the SAE was trained on


@dataclass(frozen=True, kw_only=True)
class Config:
    work: Path = Path("bench-gates")
    """Folder for the store and the SAE."""
    stories: int = 400
    """Stories to choose the features and thresholds on, and as many to measure on."""
    concepts: int = 16
    """Concepts: those whose feature tells them best on the half that chooses."""
    tokens: int = 400_000
    """Tokens that the SAE is trained on."""
    d_sae: int = 512
    """Its features."""
    k: int = 16
    """Active ones a token."""


def best_threshold(values: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """The threshold with the best F1 of `values` [T] above it against `labels` [T] bool, and that F1."""
    order = values.argsort(descending=True)
    ranked, hits = values[order], labels[order].double().cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(values) + 1) + labels.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = -1  # no threshold parts equal values
    on = int((ranked > 0).sum())
    if on == 0:
        return 0.0, 0.0
    best = int(f1[:on].argmax())
    below = float(ranked[best + 1]) if best + 1 < len(ranked) else 0.0
    return (float(ranked[best]) + below) / 2, float(f1[best])


def best_gates(codes: torch.Tensor, labels: torch.Tensor) -> list[tuple[float, str, int, float]]:
    """(F1, concept, feature, threshold) of every concept, best first. The features of largest AUROC are tried."""
    ranking = auroc(codes, labels).nan_to_num(-1.0)  # [L, C]
    found = []
    for column, concept in enumerate(CONCEPTS):
        for feature in ranking[:, column].topk(8).indices.tolist():
            level, f1 = best_threshold(codes[:, feature], labels[:, column])
            found.append((f1, concept, feature, level))
    best = {concept: (f1, concept, feature, level) for f1, concept, feature, level in sorted(found)}
    return sorted(best.values(), reverse=True)


def scores(changed: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Precision and recall."""
    hits = float((changed & wanted).sum())
    return hits / max(1.0, float(changed.sum())), hits / max(1.0, float(wanted.sum()))


def words_changed(changed: torch.Tensor, wanted: torch.Tensor, lengths: list[int]) -> float:
    """The share of the concept's words, runs of tokens [T] of a story, of which a token was changed."""
    hits = total = 0
    for moved, word in zip(changed.split(lengths), wanted.split(lengths)):
        begins = word & ~torch.cat([word.new_zeros(1), word[:-1]])
        number = begins.long().cumsum(0)
        total += int(begins.sum())
        hits += len(set(number[moved & word].tolist()))
    return hits / max(1, total)


@torch.no_grad()
def changed_tokens(lm: LanguageModel, given: Sequence[Any], hook: str, context: Any) -> torch.Tensor:
    """Which tokens [T] of the stories, BOS left out, have another state at `hook` while `context` is open."""
    found = []
    for start in range(0, len(given), 32):
        batch = lm.encode([story.text for story in given[start : start + 32]])
        plain = lm.capture(batch.input_ids, batch.attention_mask, hooks=hook)[hook]
        with context:
            steered = lm.capture(batch.input_ids, batch.attention_mask, hooks=hook)[hook]
        moved = (steered != plain).any(-1)
        for row, story in enumerate(given[start : start + 32]):
            n = len(lm.tokenizer(story.text, add_special_tokens=False)["input_ids"])
            first = int(batch.attention_mask[row].sum()) - n
            found.append(moved[row, first : first + n].cpu())
    return torch.cat(found)


def main(args: Config) -> None:
    """Measure and print the table."""
    torch.manual_seed(0)
    lm = LanguageModel.load(str(MODEL_PATH), device="cpu")
    if (args.work / "sae").exists():
        sae = SAE.load(args.work / "sae")
    else:
        source = texts(args.tokens // 60 + 50)
        store = cache_activations(lm, source, hook=HOOK, out=args.work / "acts", tokens=args.tokens)
        sae = train_sae(store, TrainConfig(d_sae=args.d_sae, k=args.k), args.work / "sae")
    drawn = list(islice(stories(READ), 2 * args.stories))
    choosing, measuring = drawn[: args.stories], drawn[args.stories :]
    codes, labels = encode_stories(lm, sae, choosing)
    chosen = best_gates(codes, labels)[: args.concepts]
    st, v = Steerer(lm), torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    truth = encode_stories(lm, sae, measuring)[1]
    mentions = [{concept for _, _, concept in story.spans} for story in measuring]
    lengths = [len(lm.tokenizer(s.text, add_special_tokens=False)["input_ids"]) for s in measuring]
    heads = ("precision", "recall", "words", "rows: precision", "recall")
    print(f"{'concept':<16} {'feature':>7} " + " ".join(f"{head:>9}" for head in heads))
    table = []
    for _, concept, feature, level in chosen:
        column = list(CONCEPTS).index(concept)
        read = Feature(sae, feature)
        edit = st.direction(HOOK, read=v, value=4.0, gate=TokenGate(read, level))
        changed = changed_tokens(lm, measuring, HOOK, edit)
        tokens = (*scores(changed, truth[:, column]), words_changed(changed, truth[:, column], lengths))
        row_gate = Condition(HOOK, read, level, pool="max")
        moved = changed_tokens(lm, measuring, LATER, st.direction(LATER, read=v, value=4.0, gate=row_gate))
        steered = torch.tensor([bool(part.any()) for part in moved.split(lengths)])
        rows = scores(steered, torch.tensor([concept in found for found in mentions]))
        table.append((*tokens, *rows))
        figures = [f"{x:>{max(9, len(head))}.3f}" for head, x in zip(heads, table[-1])]
        print(f"{concept:<16} {feature:>7} {' '.join(figures)}", flush=True)
    print(f"{'median':<24} " + " ".join(f"{statistics.median(column):.3f}" for column in zip(*table)))
    good = sum(min(precision, recall) > 0.95 for precision, recall, *_ in table)
    by_word = sum(min(precision, words) > 0.95 for precision, _, words, *_ in table)
    print(
        f"{good} of {len(table)} gates with precision and recall above 0.95, {by_word} by words; {len(truth):,} tokens"
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
