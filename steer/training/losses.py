"""What an edit is trained for: five losses, each a mean over items (texts, pairs, states) that the loop batches.

| loss | item | value of an item |
|---|---|---|
| `Likelihood` | a completion | -log p of its tokens, or -log(1 - p) of those to suppress, mean over tokens |
| `Imitation` | an answer | squared distance to the states of the PROMPTED model on that answer, summed over layers |
| `Separation` | a pair of texts | class separation in the SAE's features + likelihood + L1 |
| `ProbeLoss` | a state | log-loss of a linear probe; no model runs |
| `Preference` | a pair of answers | -log sigmoid of how much more one answer gained than the other, both ways round |

The loss of an edit that changes nothing is that of the unsteered model, for each of them (log 2 for the last two).

Shape letters: n items of a batch, N items, S tokens, D width, d chosen features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.lm.hooks import HookName
from steersman.sae import SAE
from steersman.steer.edits import Edit, PerRow
from steersman.steer.methods.examples import Example, Examples, ExamplesLike, as_examples
from steersman.steer.methods.reading import Reader
from steersman.steer.scope import Scope
from steersman.steer.steering import Steering
from steersman.steer.training.targets import Target, completion, log_likelihoods, paired_targets

SHARPNESS = 4.0  # of the logistic margin: a loss of 4 at the mean of the negatives, of 0.02 at that of the positives

Build = Callable[[Mapping[str, Tensor]], Mapping[str, Edit]]
"""From the parameters to {hook point: edit}; called anew for every pass, so that gradients flow to the parameters."""


class Trial:
    """The edit as it stands at one step of its training, or, `off`, the model without it."""

    def __init__(
        self, lm: LanguageModel, parameters: Mapping[str, Tensor], build: Build, scope: Scope, *, off: bool = False
    ) -> None:
        self.lm, self.build, self.scope, self.off = lm, build, scope, off
        self.parameters = {name: torch.zeros_like(p) for name, p in parameters.items()} if off else dict(parameters)
        self.edits: dict[str, Edit] = {}

    def steer(self, scale: PerRow = 1.0) -> AbstractContextManager[Any]:
        """The context of passes with the edit, `scale` times as strong, a number or one per row."""
        if self.off:
            return nullcontext()
        built = {self.lm.resolve_hook(hook): edit for hook, edit in self.build(self.parameters).items()}
        whole = isinstance(scale, float) and scale == 1
        self.edits = built if whole else {hook: edit.scaled(scale) for hook, edit in built.items()}
        return Steering(self.lm, self.edits, self.scope)


class Loss(ABC):
    """A mean over items."""

    @abstractmethod
    def prepare(self, lm: LanguageModel) -> int:
        """Tokenise and compute what does not depend on the edit, once; returns the number of items.

        Raises SteersmanError for items that cannot be used.
        """

    @abstractmethod
    def of(self, trial: Trial, items: Sequence[int]) -> Tensor:
        """[n]: the loss of each item; their mean over all items is what is minimised."""


class Likelihood(Loss):
    """-log p(token | steered) over the tokens of each completion (of the whole text, where an example has no prompt);
    of `negative` examples suppress times -log(1 - p).

    Each side's mean counts, however many examples it has. Sources: arXiv 2205.05124, 2502.18862 (suppression).
    """

    def __init__(self, positive: ExamplesLike, negative: ExamplesLike = (), *, suppress: float = 1.0) -> None:
        self.positive = as_examples(positive, "positive")
        self.negative = as_examples(negative, "negative") if suppress else []
        self.suppress = suppress

    def prepare(self, lm: LanguageModel) -> int:
        if not self.positive:
            raise SteersmanError("there are no positive examples")
        sides = (("positive", self.positive), ("negative", self.negative))
        self.targets = [completion(lm, e, f"{side} example {i}") for side, part in sides for i, e in enumerate(part)]
        total = len(self.targets)
        share = [total / len(self.positive)] * len(self.positive)
        share += [self.suppress * total / len(self.negative)] * len(self.negative) if self.negative else []
        self.share = torch.tensor(share, device=lm.device)
        return total

    def of(self, trial: Trial, items: Sequence[int]) -> Tensor:
        with trial.steer():
            logp, chosen = log_likelihoods(trial.lm, [self.targets[i] for i in items])
        index = torch.tensor(items, device=logp.device)
        negative = (index >= len(self.positive))[:, None]
        value = torch.where(negative, torch.log1p(-logp.exp().clamp(max=1 - 1e-6)), logp)
        return -((value * chosen).sum(1) / chosen.sum(1).clamp(min=1)) * self.share[index]


@dataclass(frozen=True, kw_only=True)
class Imitated:
    """An answer and the two prompts before it."""

    prompt: Any
    """What the steered model is given: a text, token ids or a conversation."""
    teacher: Any
    """What the model to be imitated is given, such as the same with an instruction."""
    answer: str
    """What both go on with, word for word."""
    strength: float = 1.0
    """The strength of the edit at which it should be like the teacher, such as a judge's mark for the answer."""


class Imitation(Loss):
    """sum over `hooks` of |h_steered - h_prompted|^2 on the answer's tokens, mean over them (`per_unit`: and over D).

    The teacher is the model itself after `Imitated.teacher`; the same answer stands at other positions there, and is
    aligned by its tokens. `teaching` opens what the teacher is steered by besides, to put one way of steering into the
    form of another. Source: arXiv 2605.03907. It can teach no more than the prompt does.
    """

    def __init__(
        self,
        items: Sequence[Imitated],
        hooks: Sequence[HookName],
        *,
        per_unit: bool = False,
        teaching: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.items, self.hooks, self.per_unit, self.teaching = list(items), list(hooks), per_unit, teaching

    def prepare(self, lm: LanguageModel) -> int:
        if not self.items:
            raise SteersmanError("there are no answers to imitate")
        if not self.hooks:
            raise SteersmanError("name the hook points at which the prompted model is imitated")
        self.points = lm.resolve_hooks(self.hooks)
        pairs = [paired_targets(lm, e.prompt, e.teacher, e.answer, f"answer {i}") for i, e in enumerate(self.items)]
        self.student, self.teacher = [a for a, _ in pairs], [b for _, b in pairs]
        return len(pairs)

    def _strengths(self, items: Sequence[int]) -> PerRow:
        given = [self.items[i].strength for i in items]
        return 1.0 if all(s == 1 for s in given) else given

    def of(self, trial: Trial, items: Sequence[int]) -> Tensor:
        student, teacher = [self.student[i] for i in items], [self.teacher[i] for i in items]
        with torch.no_grad():
            wanted, _ = _answer_states(trial.lm, teacher, self.points, self.teaching())
        states, rows = _answer_states(trial.lm, student, self.points, trial.steer(self._strengths(items)))
        total = torch.zeros(len(rows), device=rows.device)
        for hook, h in states.items():
            square = (h.float() - wanted[hook].float()).square()
            total = total + (square.mean(-1) if self.per_unit else square.sum(-1))
        count = torch.bincount(rows, minlength=len(items))
        return torch.zeros(len(items), device=rows.device).index_add(0, rows, total) / count


def _answer_states(
    lm: LanguageModel, targets: Sequence[Target], hooks: Sequence[str], steering: AbstractContextManager[Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """What the hook points hold on the answers' tokens, [tokens, D], and which text each token is of [tokens]."""
    batch = lm.encode([t.ids for t in targets])
    seen: dict[str, Tensor] = {}

    def look(hook: str) -> Callable[[Tensor, ForwardPass], Tensor]:
        def note(h: Tensor, _fwd: ForwardPass) -> Tensor:
            seen[hook] = h
            return h

        return note

    starts = [t.start for t in targets]
    with ExitStack() as stack:
        stack.enter_context(steering)  # first, so that what it changes is what is seen
        for hook in hooks:
            stack.enter_context(lm.edit(hook, look(hook)))
        lm.logits(batch.input_ids, batch.attention_mask, prompt_length=starts, grad=True)
    column = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    answer = (column >= torch.tensor(starts, device=column.device)[:, None]) & batch.attention_mask.bool()
    return {hook: h[answer.to(h.device)] for hook, h in seen.items()}, answer.nonzero()[:, 0]


class Separation(Loss):
    """distance(z + v) + likelihood * NLL(positive text | steered) + l1 |v|_1, v over chosen features of an SAE.

    z [d] is the mean over the tokens of a NEGATIVE text of the chosen features, mu+ and mu- their means over the texts
    of each side; v is the parameter `v` [d]. `distance`:

    - `margin` (the default): log(1 + exp(-4 m)), m = (|z' - mu-|^2 - |z' - mu+|^2) / |mu+ - mu-|^2, which is -1 at mu-
      and 1 at mu+. It falls to 0 once z' is clearly on the positive side, so that L1 can clear the features that are
      not needed.
    - `linear`, the paper's: |z' - mu+|^2 - |z' - mu-|^2. It is LINEAR in v, with slope -2 (mu+ - mu-), and unbounded
      below. Adam then moves every feature whose slope exceeds the L1 weight by the learning rate at each step, whatever
      its size: 100 steps of 0.05 add 5.000 sign(mu+ - mu-), and that plus the NLL's pull is all that training does.

    Source: arXiv 2505.16188.
    """

    def __init__(
        self,
        positive: ExamplesLike,
        negative: ExamplesLike,
        *,
        sae: SAE,
        hook: HookName,
        features: Sequence[int],
        distance: Literal["margin", "linear"] = "margin",
        likelihood: float = 0.5,
        l1: float = 0.01,
        batch_size: int = 16,
    ) -> None:
        if distance not in ("margin", "linear"):
            raise SteersmanError(f"unknown distance {distance!r}: use margin or linear")
        self.positive, self.negative = as_examples(positive, "positive"), as_examples(negative, "negative")
        self.sae, self.hook, self.features = sae, hook, [int(j) for j in features]
        self.distance, self.likelihood, self.l1, self.batch_size = distance, likelihood, l1, batch_size

    def prepare(self, lm: LanguageModel) -> int:
        Examples(positive=self.positive, negative=self.negative).check_pairs("separation")
        for j in self.features:
            self.sae.check_feature(j)
        z = feature_means(lm, self.sae, lm.resolve_hook(self.hook), (self.positive, self.negative), self.batch_size)
        plus, self.z = (part[:, self.features].to(lm.device) for part in z)
        self.means = plus.mean(0), self.z.mean(0)
        self.apart = (self.means[0] - self.means[1]).square().sum()
        if not float(self.apart) > 0:
            raise SteersmanError("the chosen features have the same means on both sides: nothing separates them")
        self.targets = [completion(lm, e, f"positive example {i}") for i, e in enumerate(self.positive)]
        return len(self.z)

    def of(self, trial: Trial, items: Sequence[int]) -> Tensor:
        v = trial.parameters["v"]
        plus, minus = ((self.z[items] + v - mean).square().sum(1) for mean in self.means)
        if self.distance == "linear":
            value = plus - minus
        else:
            value = softplus(SHARPNESS * (plus - minus) / self.apart)
        if self.likelihood:
            with trial.steer():
                logp, chosen = log_likelihoods(trial.lm, [self.targets[i] for i in items])
            value = value - self.likelihood * (logp * chosen).sum(1) / chosen.sum(1).clamp(min=1)
        return value + self.l1 * v.abs().sum()


def feature_means(
    lm: LanguageModel, sae: SAE, hook: str, sides: Sequence[Sequence[Example]], batch_size: int = 16
) -> list[Tensor]:
    """Of each side [texts, L]: the mean over a text's tokens (BOS left out) of every feature."""
    reader = Reader(lm, [hook], positions="all", batch_size=batch_size)
    found = []
    for side in sides:
        total, count = torch.zeros(len(side), sae.cfg.d_sae), torch.zeros(len(side), 1)
        for batch in reader.samples(Examples(positive=list(side), negative=[]), "sides"):
            part = batch.at(hook)
            code = sae.encode(part.x.to(sae.W_dec.device)).detach().float().cpu()
            total.index_add_(0, part.unit, code)
            count.index_add_(0, part.unit, torch.ones(len(code), 1))
        found.append(total / count)
    return found


class ProbeLoss(Loss):
    """Log-loss of sigmoid(x . read + bias) for labels; the parameters are `read` [D] and `bias` [1]."""

    def __init__(self, states: Tensor, labels: Tensor) -> None:
        if states.ndim != 2 or len(states) != len(labels) or not len(states):
            raise SteersmanError(f"states [N, D] need as many labels, got {list(states.shape)} and {len(labels)}")
        self.states, self.labels = states.float(), labels.float()

    def prepare(self, lm: LanguageModel) -> int:
        self.states, self.labels = self.states.to(lm.device), self.labels.to(lm.device)
        return len(self.states)

    def of(self, trial: Trial, items: Sequence[int]) -> Tensor:
        score = self.states[items] @ trial.parameters["read"] + trial.parameters["bias"]
        return binary_cross_entropy_with_logits(score, self.labels[items], reduction="none")


class Preference(Loss):
    """-log sigmoid(s beta [log p(a+ | s v) / p(a+) - log p(a- | s v) / p(a-)]), mean over s = 1 and -1.

    a+ and a- are two answers to one prompt, p their probability as a whole (summed over tokens), s v the edit at scale
    s: what adds the behaviour must take it away when it is subtracted. Source: arXiv 2406.00045 (BiPO), whose code
    draws s per batch; the mean over both is its expectation.
    """

    def __init__(self, positive: ExamplesLike, negative: ExamplesLike, *, beta: float = 0.1) -> None:
        if not beta > 0:
            raise SteersmanError(f"beta must be above 0, got {beta}")
        self.positive, self.negative = as_examples(positive, "positive"), as_examples(negative, "negative")
        self.beta = beta

    def prepare(self, lm: LanguageModel) -> int:
        both = Examples(positive=self.positive, negative=self.negative)
        both.check_pairs("preference")
        both.check_answers("preference")
        sides = (("positive", self.positive), ("negative", self.negative))
        self.targets = [completion(lm, e, f"{side} example {i}") for side, part in sides for i, e in enumerate(part)]
        self.count = len(self.positive)
        base = []
        with torch.no_grad():
            for start in range(0, len(self.targets), 16):
                logp, chosen = log_likelihoods(lm, self.targets[start : start + 16])
                base.append((logp * chosen).sum(1))
        self.base = torch.cat(base)
        return self.count

    def of(self, trial: Trial, items: Sequence[int]) -> Tensor:
        both = [*items, *(self.count + i for i in items)]
        total: Any = 0.0
        for sign in (1.0, -1.0):
            with trial.steer(sign):
                logp, chosen = log_likelihoods(trial.lm, [self.targets[i] for i in both])
            gained = (logp * chosen).sum(1) - self.base[both]
            plus, minus = gained.split(len(items))
            total = total - logsigmoid(sign * self.beta * (plus - minus))
        return total / 2
