"""Text generated while steering, and its measures one prompt at a time.

Per prompt, over its samples: `kl` and `kl_p95` (KL(steered || base) per generated token), `nll` (of the text under the
unsteered model, prompt masked), `repetition` (fraction of 4-grams seen before), `distinct_1`, `distinct_2`, `word_rate`
(target words per 100), `has_word` (fraction of texts with one), `judge`, and with an SAE the effect of SAE-TS (arXiv
2411.02193): activations of the generated tokens in the UNSTEERED model, averaged over positions, less those of
unsteered text: `target_rise`, `side_effects` (summed |change| of the others), `specificity` (target / |effect|).

B rows, S tokens, L latents.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.conversations import Document, with_prefix
from steersman.lm import Generation, LanguageModel
from steersman.sae import SAE
from steersman.steer.evaluation.config import EvaluationConfig
from steersman.steer.measures import distinct, generated_tokens, repetition_rate, token_kl, token_nll

Judge = Callable[[str, str], float]
"""(text, criterion) -> a mark from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What steering should bring about."""

    words: tuple[str, ...] = ()
    """Words that should become more frequent."""
    sae: SAE | None = None
    """SAE by which effects are measured."""
    features: tuple[int, ...] = ()
    """Its features that should rise."""
    judge: Judge | None = None
    """Marks a completion from 0 to 1."""
    criterion: str = ""
    """What the judge is asked to look for."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Continuations of all prompts under one way of steering."""

    values: dict[str, np.ndarray]
    """Measure -> one value per prompt; NaN where there is nothing to measure."""
    texts: list[str]
    """The completions, prompt by prompt."""
    activations: np.ndarray | None
    """[prompts, L] mean feature activations of the generated tokens in the unsteered model."""


Arm = Callable[[int], AbstractContextManager[Any]]
"""Opens the steering of `n` rows."""


def unsteered(_rows: int) -> AbstractContextManager[Any]:
    """The arm that changes nothing."""
    return nullcontext()


@torch.no_grad()
def roll_out(
    lm: LanguageModel,
    prompts: Sequence[Document],
    arm: Arm,
    targets: Targets,
    config: EvaluationConfig,
    *,
    prefix: str = "",
    baseline: np.ndarray | None = None,
) -> Rollouts:
    """Continue every prompt `samples` times and measure. `prefix` stands before each prompt while generating only: what
    it makes the model write is measured as if the prompt stood alone. `baseline` are the unsteered activations."""
    rows = [i for i in range(len(prompts)) for _ in range(config.samples)]
    found: dict[str, list[float]] = {}
    texts: list[str] = []
    activations: list[Tensor] = []
    settings: dict[str, Any] = {"max_new_tokens": config.max_new_tokens}
    if config.temperature > 0:
        settings |= {"temperature": config.temperature, "top_p": config.top_p, "do_sample": True}
    for start in range(0, len(rows), config.batch_size):
        part = rows[start : start + config.batch_size]
        if config.temperature > 0:
            settings["seed"] = config.seed + start
        with arm(len(part)):
            made = lm.generate([with_prefix(prefix, prompts[i]) if prefix else prompts[i] for i in part], **settings)
            forced = lm.logits(made.batch, prompt_length=made.prompt_length)
        plain = _without_prefix(lm, made, [prompts[i] for i in part]) if prefix else made
        base = lm.logits(plain.tokens, plain.attention_mask)
        new = made.new_tokens.shape[1]
        chosen = generated_tokens(plain)[:, -new:]
        kl = token_kl(forced[:, -new - 1 : -1], base[:, -new - 1 : -1])
        nll = token_nll(base, plain.tokens)[:, -new:]
        for row in range(len(part)):
            real = chosen[row]
            ids = made.new_tokens[row][made.new_mask[row].bool()].tolist()
            text = made.completions[row]
            words = re.findall(r"\w+", text.lower())
            wanted = {word.lower() for word in targets.words}
            hits = sum(word in wanted for word in words)
            measured = {
                "kl": float(kl[row][real].mean()),
                "kl_p95": float(kl[row][real].quantile(0.95)),
                "nll": float(nll[row][real].mean()),
                "repetition": repetition_rate(ids),
                "distinct_1": distinct(ids, 1),
                "distinct_2": distinct(ids, 2),
            }
            if targets.words:
                measured |= {"word_rate": 100 * hits / max(1, len(words)), "has_word": float(hits > 0)}
            if targets.judge is not None:
                measured["judge"] = float(targets.judge(plain.prompts[row] + text, targets.criterion))
            for name, value in measured.items():
                found.setdefault(name, []).append(value)
        texts += made.completions
        if targets.sae is not None:
            activations.append(_mean_activations(lm, targets.sae, plain))
    values = {name: _per_prompt(np.array(column), len(prompts)) for name, column in found.items()}
    mean = None
    if activations:
        mean = torch.cat(activations).reshape(len(prompts), config.samples, -1).mean(1).numpy()
        if baseline is not None:
            values |= effect_measures(mean - baseline, targets.features)
    return Rollouts(values=values, texts=texts, activations=mean)


def effect_measures(effect: np.ndarray, features: Sequence[int]) -> dict[str, np.ndarray]:
    """`side_effects`, and with target features `target_rise` and `specificity`, from effects [prompts, L]."""
    others = np.ones(effect.shape[1], dtype=bool)
    others[list(features)] = False
    found = {"side_effects": np.abs(effect[:, others]).sum(1)}
    if features:
        target = effect[:, list(features)].sum(1)
        norm = np.linalg.norm(effect, axis=1)
        found["target_rise"] = target
        found["specificity"] = np.divide(target, norm, out=np.full_like(target, np.nan), where=norm > 0)
    return found


def _per_prompt(column: np.ndarray, n_prompts: int) -> np.ndarray:
    return column.reshape(n_prompts, -1).mean(1)


def _without_prefix(lm: LanguageModel, made: Generation, prompts: Sequence[Document]) -> Generation:
    """What was generated, after the prompts alone."""
    batch = lm.encode(prompts, padding_side="left")
    shown = [prompt if isinstance(prompt, str) else lm.written(prompt) for prompt in prompts]
    return Generation(
        prompts=shown,
        completions=made.completions,
        texts=[p + c for p, c in zip(shown, made.completions)],
        tokens=torch.cat([batch.input_ids, made.new_tokens], 1),
        attention_mask=torch.cat([batch.attention_mask, made.new_mask], 1),
        prompt_length=batch.lengths,
        prompt_columns=batch.input_ids.shape[1],
        spans=batch.spans,
    )


def _mean_activations(lm: LanguageModel, sae: SAE, made: Generation) -> Tensor:
    """[B, L] fp32 on the CPU: mean activation over each row's generated tokens, in the unsteered model."""
    h = lm.capture(made.tokens, made.attention_mask, hooks=[sae.cfg.hook_name])[sae.cfg.hook_name]
    rows = []
    for row in range(len(h)):
        real = made.attention_mask[row].bool().clone()
        real[: made.prompt_columns] = False
        x = h[row][real].float().to(sae.W_dec.device)
        rows.append(sae.encode(x).float().mean(0).cpu() if len(x) else torch.zeros(sae.cfg.d_sae))
    return torch.stack(rows)
