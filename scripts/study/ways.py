"""Ways to make vectors for features from measured effects, and what the vectors do at equal KL.

Outcomes: on the grammar's concepts, the concept's words in 100 words of continuations of stories; on texts, the rise of
the log-likelihood of held-out texts with the concept less that of texts without it, in nats per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steersman import SAE, EffectMap, LanguageModel, Steerer, SteeringVector, collect_effects
from steersman.demo import CONCEPTS, stories, texts, word_rate
from steersman.demo.concept_features import match_concepts, writing_features
from steersman.steer import Effects, ridge_fit, token_nll
from steersman.train import ActivationStore
from study.common import Study


@dataclass(frozen=True, kw_only=True)
class Topics:
    """Concepts, each with the feature that is aimed at."""

    names: list[str]
    features: list[int]
    """The feature that tells each apart best when it is read (AUROC, on other texts)."""
    writing: list[int]
    """On the grammar, the feature whose decoder row raises the logits of its words most."""


def grammar_topics(lm: LanguageModel, sae: SAE, n: int) -> Topics:
    """Concepts of the grammar, names of people left out."""
    found = [m for m in match_concepts(lm, sae, list(islice(stories(3), 400))) if CONCEPTS[m.concept].group != "name"]
    found = sorted(found[:n], key=lambda m: m.concept)
    writing = [writing_features(lm, sae, CONCEPTS[m.concept].words, 1)[0] for m in found]
    return Topics(names=[m.concept for m in found], features=[m.feature for m in found], writing=writing)


def scales_at(lm: LanguageModel, sae: SAE, vectors: Tensor, kl: float, held: Sequence[str], tokens: int) -> Tensor:
    """The scales [n] of unit vectors [n, D] at a KL per token of the held-out texts; NaN where it is out of reach."""
    found = collect_effects(
        lm, sae, held, vectors=vectors, scale_rule="kl", scale_target=kl, heldout_texts=len(held), rollouts=2,
        heldout_tokens=tokens, new_tokens=1, base_rollouts=2, prompts=("The",), batch_rows=256,
    )  # fmt: skip
    return found.column("scale").masked_fill(~found.column("reached"), float("nan"))


@torch.no_grad()
def word_rates(
    lm: LanguageModel, hook: str, pushes: Tensor, topics: Sequence[str], prompts: Sequence[str], tokens: int, seed: int
) -> list[float | None]:
    """The words of each topic per 100 in continuations under its push [n, D]; None where the push is NaN."""
    found: list[float | None] = []
    for start in range(0, len(pushes), max(1, 768 // len(prompts))):
        part = pushes[start : start + max(1, 768 // len(prompts))]
        with Steerer(lm).vector(part.nan_to_num().repeat_interleave(len(prompts), 0), hook=hook):
            made = lm.generate(list(prompts) * len(part), max_new_tokens=tokens, do_sample=True, seed=seed)
        for i in range(len(part)):
            own = made.completions[i * len(prompts) : (i + 1) * len(prompts)]
            rate = word_rate(own, CONCEPTS[topics[start + i]].words)
            found.append(None if bool(part[i].isnan().any()) else rate)
    return found


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """Where outcomes on the grammar are measured: prompts and held-out stories that nothing was made from."""

    lm: LanguageModel
    sae: SAE
    topics: Topics
    prompts: int
    tokens: int
    seed: int

    def outcome(self, vectors: Tensor, kl: float) -> list[float | None]:
        """For each topic the words per 100 under its vector [n, D] at a KL."""
        unit = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)
        usable = unit.norm(dim=1) > 0.5
        unit[~usable, 0] = 1.0
        scale = scales_at(self.lm, self.sae, unit, kl, texts(16, seed=6), 48)
        scale[~usable] = float("nan")
        hook = self.sae.cfg.hook_name
        starts = [" ".join(text.split()[:8]) for text in texts(self.prompts, seed=7)]
        return word_rates(
            self.lm, hook, unit * scale[:, None], self.topics.names, starts, self.tokens, self.seed
        )  # fmt: skip


@torch.no_grad()
def preference(
    lm: LanguageModel, hook: str, push: Tensor, positive: Sequence[str], negative: Sequence[str], tokens: int
) -> float:
    """Rise of the mean log-likelihood per token of the positive texts under a push [D], less that of the negative."""
    batch = lm.encode([*positive, *negative], max_length=tokens)
    real = batch.attention_mask[:, 1:].bool()
    base = token_nll(lm.logits(batch), batch.input_ids)
    with Steerer(lm).vector(push, hook=hook):
        rise = base - token_nll(lm.logits(batch), batch.input_ids)
    each = (rise * real).sum(1) / real.sum(1)
    return float(each[: len(positive)].mean() - each[len(positive) :].mean())


# Maps


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Effects as tensors, of vectors that reached their scale."""

    x: Tensor
    """[n, D], unit."""
    y: Tensor
    """[n, L]."""
    scale: Tensor
    """[n]."""

    @classmethod
    def of(cls, effects: Effects, keep: Tensor | None = None) -> "Measured":
        """All of them, or those of the mask `keep`."""
        keep = effects.column("reached") if keep is None else keep
        shards = list(effects.iterate())
        x, y = (torch.cat([getattr(s, name) for s in shards])[keep] for name in ("vectors", "effect"))
        return cls(x=x, y=y, scale=effects.column("scale")[keep])

    def first(self, n: int) -> "Measured":
        """The first n."""
        return Measured(x=self.x[:n], y=self.y[:n], scale=self.scale[:n])

    def last(self, n: int) -> "Measured":
        """The last n."""
        return Measured(x=self.x[-n:], y=self.y[-n:], scale=self.scale[-n:])

    def raw(self) -> "Measured":
        """With what was added in place of its direction."""
        return Measured(x=self.x * self.scale[:, None] / self.scale.median(), y=self.y, scale=self.scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """y = x M + b."""

    M: Tensor
    b: Tensor

    @classmethod
    def fit(cls, data: Measured, ridge: float | None = None) -> "Linear":
        """Ridge regression, its ridge by cross-validation where none is given."""
        found = ridge_fit([(data.x, data.y)], ridge, torch.float32)
        return cls(M=found.M, b=found.b)

    def r2(self, data: Measured) -> float:
        """R2 on vectors, over all features together."""
        rest = (data.y - data.x @ self.M - self.b).square().sum()
        return float(1 - rest / (data.y - data.y.mean(0)).square().sum())

    def of_rank(self, rank: int, data: Measured) -> "Linear":
        """The reduced-rank regression: M on the first directions of what it predicts for the vectors."""
        _, _, Vh = torch.linalg.svd((data.x - data.x.mean(0)) @ self.M, full_matrices=False)
        return Linear(M=self.M @ Vh[:rank].T @ Vh[:rank], b=self.b)

    def vectors(self, features: Sequence[int], bias_weight: float = 1.0) -> Tensor:
        """[n, D]: SAE-TS for each feature."""
        columns = self.M[:, list(features)].T
        unit = columns / columns.norm(dim=1, keepdim=True).clamp_min(1e-30)
        general = self.M @ self.b
        return unit - bias_weight * general / general.norm().clamp_min(1e-30)

    def still(self, features: Sequence[int], ridge: float) -> Tensor:
        """[n, D]: the others kept still, (M M^T + mu)^-1 M t with mu in units of the mean eigenvalue."""
        gram = (self.M @ self.M.T).double()
        mu = ridge * float(gram.trace()) / len(gram) * torch.eye(len(gram), dtype=torch.float64)
        return torch.linalg.solve(gram + mu, self.M[:, list(features)].double()).T.float()


def ceiling(a: Measured, b: Measured) -> float:
    """The R2 that exact effects would have on `a`, from a second measurement `b` of the same vectors: the share of the
    variance that both measurements have in common."""
    ya, yb = a.y - a.y.mean(0), b.y - b.y.mean(0)
    return float((ya * yb).sum() / ya.square().sum())


# A feature's own texts


@torch.no_grad()
def windows_of(
    store: ActivationStore, sae: SAE, features: Sequence[int], rows: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """The first rows of a store in windows of tokens in a row: ids [W, T], and what the features average to in each,
    [W, M]."""
    hook, n = store.hook_of(sae), min(rows, store.n_rows)
    info, every = store.tokens(0, n), torch.tensor(list(features))
    parts = torch.arange(n).split(4096)
    f = torch.cat([sae.encode_features(store.activations(part, hook).float(), every) for part in parts])
    starts = torch.arange(0, n - tokens + 1, tokens)
    inside = starts[:, None] + torch.arange(tokens)
    whole = (info.positions[inside].diff(dim=1) == 1).all(1)  # of one context
    inside = inside[whole]
    return info.token_ids.long()[inside], f[inside].mean(1)


def likelihood_gradients(lm: LanguageModel, hook: str, ids: Tensor) -> Tensor:
    """d log p / dv [n, D] of texts [n, T], v added to the states of each of their tokens but a BOS that is put before
    them."""
    bos = [] if lm.bos_token_id is None else [lm.bos_token_id]
    found = []
    for part in ids.split(16):
        whole = torch.cat([torch.tensor(bos, dtype=torch.long).expand(len(part), -1), part], 1)
        v = torch.zeros(len(part), lm.hook_width(hook), requires_grad=True)
        with torch.enable_grad(), Steerer(lm).vector(v, hook=hook):
            nll = token_nll(lm.logits(whole, grad=True), whole)
            found.append(torch.autograd.grad(-nll.sum(), v)[0])
    return torch.cat(found)


class OwnSizes(NamedTuple):
    """How much is read for a vector from a feature's own texts."""

    texts: int
    """Windows of each side."""
    tokens: int
    """Tokens of a window."""
    rows: int
    """Rows of the store among which the windows are."""


def own_sizes(study: Study) -> OwnSizes:
    """The sizes of a study."""
    return OwnSizes(8, 12, 4000) if study.config.small else OwnSizes(64, 24, 120_000)


class OwnTexts:
    """A unit vector for each of some features from the texts of the store in which it fires most, made once in
    WORK/own.

    E[(f - mean) d log p / dv] as of `collect_effects`, over windows of the store in place of what the model writes: of
    those in which the feature averages highest, each as much as it averages to there, against others. The metadata has
    the `signal`, the length of the mean in standard errors.
    """

    def __init__(self, study: Study, features: Sequence[int]) -> None:
        self.study, self.features, self.sizes = study, list(dict.fromkeys(features)), own_sizes(study)

    @cached_property
    def windows(self) -> tuple[Tensor, Tensor]:
        """See `windows_of`."""
        return windows_of(self.study.store(), self.study.sae(), self.features, self.sizes.rows, self.sizes.tokens)

    @cached_property
    def others(self) -> Tensor:
        """The gradients of any windows."""
        ids, _ = self.windows
        g = torch.Generator().manual_seed(self.study.config.seed)
        return likelihood_gradients(
            self.study.lm, self.study.hook(), ids[torch.randperm(len(ids), generator=g)[: self.sizes.texts]]
        )

    def vector(self, feature: int) -> SteeringVector:
        """The vector of one of the features."""
        path = self.study.config.work / "own" / f"feature-{feature}.safetensors"
        if not path.exists():
            (ids, means), hook = self.windows, self.study.hook()
            best = means[:, self.features.index(feature)].topk(min(self.sizes.texts, len(ids)))
            weight = best.values / best.values.sum().clamp_min(1e-30)
            grads = likelihood_gradients(self.study.lm, hook, ids[best.indices])
            mean = weight @ grads
            spread = (weight.square() @ (grads - mean).square()).sum() + self.others.var(0).sum() / len(self.others)
            v = mean - self.others.mean(0)
            metadata = {"feature": feature, "signal": float(v.norm() / spread.sqrt())}
            made = SteeringVector.of(v, hook_name=hook, method="own_texts", metadata=metadata)
            (made / made.norm()).save(path)
        return SteeringVector.load(path)


def solved(effect_map: EffectMap, features: Sequence[int], **settings: Any) -> Tensor:
    """[n, D]: `EffectMap.solve` for each feature, zeros where the map knows nothing of it."""
    known = effect_map.M[:, list(features)].norm(dim=0) > 0
    rows = [
        effect_map.solve(int(j), min_signal=0.0, **settings).vector if ok else torch.zeros(effect_map.d_in)
        for j, ok in zip(features, known)
    ]
    return torch.stack(rows)
