"""Texts with a label, and the features of SAEs on their tokens, one text at a time.

Tokens of one text are not independent: a text is one sample, its tokens pooled by their largest or mean activation.

Shape letters: n texts of a batch, S tokens, D width, L features, N samples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.doors import number
from steersman.errors import SteersmanError
from steersman.lm import Generation, LanguageModel
from steersman.reading import shown
from steersman.sae import SAE
from steersman.steer.methods.examples import Example, ExamplesLike, as_examples, jsonl_records
from steersman.steer.methods.reading import prompt_tokens
from steersman.steer.scores.statistics import LabelSums

Pool = Literal["max", "mean"]
"""How the activations of a text's tokens become one number."""
POOLS: tuple[Pool, ...] = ("max", "mean")
_TOKENS = 256  # encoded at once


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One text as token ids, and which of them count."""

    tokens: tuple[int, ...]
    """Token ids, the BOS included."""
    first: int
    """Index of the first token that counts: the first of the answer, or the first after the BOS."""


@dataclass(frozen=True, kw_only=True)
class Labelled(Counted):
    """One text, and its label."""

    label: float
    """1 and 0 for two classes, or a reward."""


def labelled_sides(lm: LanguageModel, positive: ExamplesLike, negative: ExamplesLike) -> list[Labelled]:
    """Positive texts labelled 1, negative ones 0. Of (prompt, answer) pairs the tokens of the answer count, of texts
    all but the BOS."""
    return [
        _labelled(lm, example, label, f"{side} example {i}")
        for side, given, label in (("positive", positive, 1.0), ("negative", negative, 0.0))
        for i, example in enumerate(as_examples(given, side))
    ]


def counted(lm: LanguageModel, example: Example, where: str) -> Counted:
    """The tokens of an example: of a prompt and its answer those of the answer count, of a text all but the BOS.

    Raises SteersmanError, which names `where` it is, for one without a token that counts.
    """
    tokens = lm.token_ids(example.text, bos=True)
    first = prompt_tokens(lm, example, where) if example.prompt else int(lm.bos_token_id is not None)
    if first >= len(tokens):
        raise SteersmanError(f"{where} has no token that counts")
    return Counted(tokens=tuple(tokens), first=first)


def _labelled(lm: LanguageModel, example: Example, label: float, where: str) -> Labelled:
    text = counted(lm, example, where)
    return Labelled(tokens=text.tokens, first=text.first, label=label)


def rewarded_generation(text: Generation, rewards: Sequence[float] | Tensor) -> list[Labelled]:
    """What a model generated, one sample a row, with the reward of each: of the tokens those generated count.

    Rows without a generated token are left out. Raises SteersmanError for another number of rewards than rows.
    """
    given = [number(reward, f"reward {i}") for i, reward in enumerate(torch.as_tensor(rewards).double().tolist())]
    if len(given) != len(text.tokens):
        raise SteersmanError(f"there are {len(text.tokens)} generated rows and {len(given)} rewards")
    found = []
    for row, mask, first, reward in zip(text.tokens, text.attention_mask.bool(), text.prompt_length.tolist(), given):
        tokens = tuple(row[mask].tolist())
        if len(tokens) > first:
            found.append(Labelled(tokens=tokens, first=int(first), label=reward))
    return found


def rewarded_answers(
    lm: LanguageModel,
    prompts: Sequence[str],
    reward: Callable[[str, str], float],
    *,
    samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    **options: Any,
) -> list[Labelled]:
    """The model's own answers to `prompts`, with `reward(prompt, answer)` of each (0 or 1 for `correlation`).

    `samples` answers a prompt, sampled from `seed` where there are several; `options` as for `lm.generate`.
    """
    if samples > 1:
        options = {"do_sample": True, **options}
    found = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        sampling = {"seed": seed + start} if options.get("do_sample") else {}
        text = lm.generate(part, num_return_sequences=samples, **{**sampling, **options})
        rewards = [reward(prompt, answer) for prompt, answer in zip(text.prompts, text.completions)]
        found += rewarded_generation(text, rewards)
    return found


def read_rewarded(lm: LanguageModel, path: str | Path) -> list[Labelled]:
    """Answers with rewards from a JSONL file, `{"prompt": ..., "answer": ..., "reward": 1}` a line.

    Raises SteersmanError that names the file and the line.
    """
    found = []
    for line, record in jsonl_records(Path(path)):
        where = f"{path}: line {line}"
        if not {"prompt", "answer", "reward"} <= set(record):
            raise SteersmanError(f"{where} has {shown(sorted(record))}; it needs prompt, answer and reward")
        (example,) = as_examples([(record["prompt"], record["answer"])], f"{where},")
        found.append(_labelled(lm, example, number(record["reward"], f"{where}: the reward"), where))
    return found


@torch.no_grad()
def states_of(
    lm: LanguageModel,
    hooks: Sequence[str],
    texts: Sequence[Counted],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
) -> Iterator[tuple[int, list[Tensor]]]:
    """For each text its number and, for each hook point, the states [tokens that count, D] fp32 on the model's device.

    Raises SteersmanError for a state that is not finite, and for a text that the cut leaves no token of.
    """
    limit = max_length or lm.context_length
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        batch = lm.encode([list(text.tokens) for text in part], max_length=limit)
        states = lm.capture(batch.input_ids, batch.attention_mask, hooks=list(dict.fromkeys(hooks)))
        for row, text in enumerate(part):
            last = int(batch.lengths[row])
            if last <= text.first:
                raise SteersmanError(f"text {start + row} has no token left that counts: it is cut to {last} tokens")
            found = [states[hook][row, text.first : last].float() for hook in hooks]
            for hook, h in zip(hooks, found):
                if not bool(h.isfinite().all()):
                    raise SteersmanError(f"{lm.name} gives NaN or infinite states at {hook} on text {start + row}")
            yield start + row, found


def codes_of(
    lm: LanguageModel,
    saes: Sequence[SAE],
    hooks: Sequence[str],
    texts: Sequence[Counted],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
) -> Iterator[tuple[int, list[Tensor]]]:
    """For each text its number and, for each SAE, the codes [tokens that count, L] fp32 of its tokens.

    Raises SteersmanError as `states_of` does.
    """
    for i, states in states_of(lm, hooks, texts, batch_size=batch_size, max_length=max_length):
        yield (
            i,
            [
                torch.cat([sae.encode(chunk) for chunk in h.to(sae.device).split(_TOKENS)])
                for sae, h in zip(saes, states)
            ],
        )


def pooled_sums(
    lm: LanguageModel,
    saes: Sequence[SAE],
    hooks: Sequence[str],
    texts: Sequence[Labelled],
    *,
    permutations: int,
    seed: int,
    batch_size: int = 16,
    max_length: int | None = None,
) -> dict[tuple[int, Pool], LabelSums]:
    """The sums of every SAE's pooled features over labelled texts, for both ways of pooling, from one pass."""
    labels = torch.tensor([text.label for text in texts], dtype=torch.float64)
    sums: dict[tuple[int, Pool], LabelSums] = {
        (at, pool): LabelSums(labels, n_features=sae.cfg.d_sae, permutations=permutations, seed=seed)
        for at, sae in enumerate(saes)
        for pool in POOLS
    }
    waiting: dict[tuple[int, Pool], list[Tensor]] = {key: [] for key in sums}

    def flush(end: int) -> None:  # a batch of samples is one product
        for key, rows in waiting.items():
            if rows:
                sums[key].add(torch.stack(rows), torch.arange(end - len(rows), end))
                rows.clear()

    for i, codes in codes_of(lm, saes, hooks, texts, batch_size=batch_size, max_length=max_length):
        for at, code in enumerate(codes):
            waiting[at, "max"].append(code.amax(0))
            waiting[at, "mean"].append(code.mean(0))
        if (i + 1) % batch_size == 0:
            flush(i + 1)
    flush(len(texts))
    return sums
