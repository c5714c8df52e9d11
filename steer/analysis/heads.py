"""Which attention heads matter: one table for every way to ask, with its null and a half that it was not ranked on.

| question | what is measured for each head | made by |
|---|---|---|
| where is it written? | accuracy of a probe on the head's output (inference-time intervention) | `probe_heads` |
| what carries it? | rise of p(answer) with its output patched in (function vectors, Soteria) | `patch_heads` |
| what changes it? | rise of a score when the head alone is edited (PASTA's profile) | `profile_heads` |

The largest of hundreds of figures is large by chance. So heads are ranked on one half of the examples and the other
half says what is left of it; and `null` is what the LARGEST figure exceeds in one of twenty cases when there is nothing
to find: with the labels shuffled, or the sign of each example's change drawn.

Shape letters: N examples, L layers, H query heads, d width of a head.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel, TokenBatch
from steersman.lm.session import Session
from steersman.progress import progress
from steersman.steer.dose import steered
from steersman.steer.edits import Edit
from steersman.steer.edits.heads import HeadEdit, head_shape, z_hook
from steersman.steer.methods.diagnostics import half_of
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.methods.logistic import fit_logistic
from steersman.steer.methods.moments import RunningMean, SampleFile
from steersman.steer.methods.reading import Reader
from steersman.steer.scope import ScopeLike

Head = tuple[int, int]
"""(layer, head)."""
MakeEdit = Callable[[int, int], Mapping[str, Edit] | AbstractContextManager[Any]]
"""From layer and head to what steers that head alone: {hook point: edit}, or an opened-to-be context."""
CHANCE = 0.95
"""The part of the shuffled tables whose largest figure stays below `null`."""
MIN_EXAMPLES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadProfile:
    """A figure for every head, [L, H], from the half of the examples that ranks and from the other."""

    measure: str
    """What the figures are."""
    layers: tuple[int, ...]
    """The layer of each row."""
    effect: Tensor
    """[L, H] float64, on the half that ranks."""
    heldout: Tensor
    """[L, H] float64, on the other half."""
    null: float
    """What the largest effect exceeds by chance in one of twenty cases."""
    chance: float
    """The figure of a head that does nothing."""
    n: int
    """Examples, of both halves."""

    def ranked(self) -> list[Head]:
        """All heads, the largest effect first; equal ones in the order of the model."""
        order = self.effect.flatten().argsort(descending=True, stable=True).tolist()
        H = self.effect.shape[1]
        return [(self.layers[i // H], i % H) for i in order]

    def top(self, k: int) -> list[Head]:
        """The k first heads. Raises SteersmanError for more than there are."""
        if not 1 <= k <= self.effect.numel():
            raise SteersmanError(f"k must be between 1 and the {self.effect.numel()} heads of the profile, got {k}")
        return self.ranked()[:k]

    def significant(self) -> list[Head]:
        """The heads whose effect is above `null`, in order."""
        return [head for head in self.ranked() if self.of(head)[0] > self.null]

    def of(self, head: Head) -> tuple[float, float]:
        """(effect, held-out effect) of one head."""
        row = self.layers.index(head[0])
        return float(self.effect[row, head[1]]), float(self.heldout[row, head[1]])

    def to_text(self, k: int = 10) -> str:
        """The k first heads as a table."""
        lines = [f"{self.measure}; {self.n} examples; by chance the largest is below {self.null:.4g}"]
        for layer, head in self.top(min(k, self.effect.numel())):
            effect, heldout = self.of((layer, head))
            lines.append(f"  layer {layer:>3} head {head:>3}  {effect:+.4f}  held out {heldout:+.4f}")
        return "\n".join(lines)


def shared_heads(profiles: Iterable[HeadProfile], k: int, at_least: int | None = None) -> list[Head]:
    """The heads among the `k` first of at least so many profiles (of all, where not said), in the order of the model.

    PASTA intersects over tasks; Soteria takes what at least two languages share.
    """
    tops = [set(profile.top(k)) for profile in profiles]
    if not tops:
        raise SteersmanError("no profile was given: there are no heads to share")
    need = len(tops) if at_least is None else at_least
    return sorted(head for head in set().union(*tops) if sum(head in top for top in tops) >= need)


def profile_heads(
    lm: LanguageModel,
    make_edit: MakeEdit,
    score: Callable[[], Tensor],
    *,
    layers: Sequence[int] | None = None,
    scope: ScopeLike = "all",
    include_bos: bool = False,
    shuffles: int = 1000,
    seed: int = 0,
    measure: str = "rise of the score",
) -> HeadProfile:
    """The rise of a score when each head alone is steered: L H passes of `score`, and one without.

    Args:
        lm: the model.
        make_edit: from (layer, head) to {hook point: edit}, opened in `scope`, or to a context manager.
        score: runs the model and gives one number [N] per example, higher for more of what is wanted.
        layers: which; by default all that have heads.
        scope: tokens that are steered, and `include_bos`, as for `Steerer.edit`.
        shuffles: draws of the null, from `seed`.
        measure: what the figures are called.

    Raises SteersmanError for fewer than four examples and scores that are not finite.
    """
    rows = _layers(lm, layers)
    H = head_shape(lm, z_hook(rows[0]))[0]
    return _profile(lm, make_edit, score, rows, H, scope, include_bos, shuffles, seed, measure)


def profile_layers(
    lm: LanguageModel,
    make_edit: Callable[[int], Mapping[str, Edit] | AbstractContextManager[Any]],
    score: Callable[[], Tensor],
    *,
    scope: ScopeLike = "all",
    include_bos: bool = False,
    shuffles: int = 1000,
    seed: int = 0,
    measure: str = "rise of the score with a layer's heads",
) -> HeadProfile:
    """As `profile_heads`, with one figure for each layer (as its head 0): what `make_edit(layer)` does to the score."""
    rows = list(range(lm.n_layers))
    return _profile(lm, lambda layer, _: make_edit(layer), score, rows, 1, scope, include_bos, shuffles, seed, measure)


def _profile(
    lm: LanguageModel,
    make_edit: MakeEdit,
    score: Callable[[], Tensor],
    rows: list[int],
    H: int,
    scope: ScopeLike,
    include_bos: bool,
    shuffles: int,
    seed: int,
    measure: str,
) -> HeadProfile:
    base = _scores(score)
    changes = torch.zeros(len(rows), H, len(base), dtype=torch.float64)
    with progress(desc="heads", total=len(rows) * H, leave=False) as bar:
        for row, layer in enumerate(rows):
            for head in range(H):
                made = make_edit(layer, head)
                if isinstance(made, Mapping):
                    made = steered(made, lm, scope=scope, include_bos=include_bos)
                with made:
                    changes[row, head] = _scores(score, len(base)) - base
                bar.update()
    ranking = half_of(torch.arange(len(base))) == 0
    first = changes[..., ranking]
    signs = torch.rand(int(ranking.sum()), shuffles, generator=torch.Generator().manual_seed(seed)) < 0.5
    drawn = first @ (2.0 * signs.double() - 1) / first.shape[-1]
    return HeadProfile(
        measure=measure,
        layers=tuple(rows),
        effect=first.mean(-1),
        heldout=changes[..., ~ranking].mean(-1),
        null=_largest(drawn),
        chance=0.0,
        n=len(base),
    )


def _layers(lm: LanguageModel, layers: Sequence[int] | None) -> list[int]:
    names = set(lm.hook_names())
    rows = [i for i in range(lm.n_layers) if z_hook(i) in names] if layers is None else list(layers)
    if not rows:
        raise SteersmanError(f"{lm.name} has no layer whose heads are apart at a hook_z")
    return rows


def _scores(score: Callable[[], Tensor], n: int | None = None) -> Tensor:
    found = torch.as_tensor(score()).detach().cpu().double()
    if found.ndim != 1 or len(found) < MIN_EXAMPLES or (n is not None and len(found) != n):
        raise SteersmanError(
            f"a score gives one number per example, for at least {MIN_EXAMPLES} and always the same examples; got "
            f"shape {list(found.shape)}"
        )
    if not bool(found.isfinite().all()):
        raise SteersmanError("the score of some examples is NaN or infinite")
    return found


def _largest(drawn: Tensor) -> float:
    """The quantile over draws of the largest figure, from figures [L, H, draws]."""
    return float(drawn.flatten(0, 1).amax(0).quantile(CHANCE))


class HeadStates:
    """Outputs of every head on examples of two sides: a temporary file for each layer, nothing in memory."""

    def __init__(
        self,
        lm: LanguageModel,
        positive: ExamplesLike,
        negative: ExamplesLike,
        *,
        layers: Sequence[int] | None = None,
        positions: str = "last",
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        self.layers = _layers(lm, layers)
        self.n_heads, self.width = head_shape(lm, z_hook(self.layers[0]))
        self._files = {layer: SampleFile() for layer in self.layers}
        units = []
        hooks = [z_hook(layer) for layer in self.layers]
        reader = Reader(lm, hooks, positions=positions, batch_size=batch_size, max_length=max_length)
        examples = Examples(positive=as_examples(positive, "positive"), negative=as_examples(negative, "negative"))
        if min(len(examples.positive), len(examples.negative)) < MIN_EXAMPLES:
            raise SteersmanError(f"a profile of heads needs at least {MIN_EXAMPLES} examples of each side")
        for batch in reader.samples(examples, "sides"):
            units.append(batch.unit)
            for layer, hook in zip(self.layers, hooks):
                self._files[layer].add(batch.states[hook], batch.positive)
        self.unit = torch.cat(units)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """(states [N, H, d] fp32, sides [N] bool) of one layer."""
        parts = list(self._files[layer].chunks())
        states = torch.cat([x for x, _ in parts]).unflatten(1, (self.n_heads, self.width))
        return states, torch.cat([side for _, side in parts])


def probe_heads(states: HeadStates, *, l2: float = 0.01, shuffles: int = 1000, seed: int = 0) -> HeadProfile:
    """How well a logistic probe on each head's output tells the sides: accuracy, both sides weighing the same.

    Heads are ranked by probes fitted on each quarter of the examples and tried on another, the held-out figures are
    those of probes of the ranking half on the other half. An example of each side with the same number stays on the
    same side of every split, so that pairs are not torn.
    """
    first = half_of(states.unit) == 0
    quarter = half_of(states.unit[first].unique(return_inverse=True)[1])
    guesses, heldout = [], []
    side = torch.zeros(0, dtype=torch.bool)
    for layer in progress(states.layers, desc="probing heads", leave=False):
        x, side = states.of(layer)
        guess = torch.zeros(int(first.sum()), states.n_heads)
        for mine in (quarter == 0, quarter == 1):
            guess[~mine] = _fitted(x[first][mine], side[first][mine], x[first][~mine], l2)
        guesses.append(guess.T)
        heldout.append(_accuracy(_fitted(x[first], side[first], x[~first], l2).T, side[~first, None])[:, 0])
    known = side[first]
    draws = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([known[torch.randperm(len(known), generator=draws)] for _ in range(shuffles)], 1)
    table = torch.stack(guesses)
    return HeadProfile(
        measure="accuracy of a probe on the head's output",
        layers=tuple(states.layers),
        effect=_accuracy(table, known[:, None])[..., 0],
        heldout=torch.stack(heldout),
        null=_largest(_accuracy(table, shuffled)),
        chance=0.5,
        n=len(side),
    )


def _fitted(x: Tensor, side: Tensor, other: Tensor, l2: float) -> Tensor:
    """[n, H] of 0 and 1: what probes on x say of other states."""
    return (fit_logistic(lambda: [(x, side)], l2=l2).logits(other) > 0).float()


def _accuracy(guess: Tensor, side: Tensor) -> Tensor:
    """Mean of the accuracies on both sides: guesses [..., n] of 0 and 1, sides [n, m] -> [..., m] float64."""
    yes, no = side.double(), (~side).double()
    right = guess.double() @ (yes / yes.sum(0)) + (1 - guess.double()) @ (no / no.sum(0))
    return right / 2


def mean_heads(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
) -> dict[int, Tensor]:
    """Layer -> [H, d] fp32: each head's mean output at the last token of the prompts."""
    rows = _layers(lm, layers)
    shape = head_shape(lm, z_hook(rows[0]))
    reader = Reader(lm, [z_hook(row) for row in rows], positions="last", batch_size=batch_size)
    means = {row: RunningMean() for row in rows}
    for batch in reader.samples(Examples(positive=as_examples(prompts, "positive"), negative=[]), "sides"):
        for row in rows:
            means[row].add(batch.states[z_hook(row)])
    return {row: mean.mean.float().unflatten(0, shape) for row, mean in means.items()}


def answer_probability(
    lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str], *, batch_size: int = 16
) -> Callable[[], Tensor]:
    """A score: the probability [N] of each answer's first token behind its prompt. The model must be a decoder."""
    batches, first = _asked(lm, prompts, answers, batch_size)

    def score() -> Tensor:
        return _of_first([Session(lm, batch).logits for batch in batches], first)

    return score


def _asked(
    lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str], batch_size: int
) -> tuple[list[TokenBatch], Tensor]:
    """The prompts in batches, and the first token [N] of each answer."""
    if len(prompts) != len(answers):
        raise SteersmanError(f"there are {len(prompts)} prompts and {len(answers)} answers: one for each is needed")
    starts = range(0, len(prompts), batch_size)
    batches = [lm.encode(list(prompts[i : i + batch_size]), padding_side="left") for i in starts]
    return batches, torch.tensor([lm.token_ids(answer)[0] for answer in answers])


def _of_first(logits: list[Tensor], first: Tensor) -> Tensor:
    return torch.cat([part.softmax(-1).cpu() for part in logits]).gather(1, first[:, None])[:, 0]


def patch_heads(
    lm: LanguageModel,
    means: Mapping[int, Tensor],
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 16,
    shuffles: int = 1000,
    seed: int = 0,
) -> HeadProfile:
    """The indirect effect of each head: the rise of p(answer) when the head's output at the last token is replaced by
    its mean (`mean_heads`) over prompts that show the task.

    `prompts` are some from which the task cannot be told: in-context examples with shuffled labels (25 of ten examples
    each in the source). Source: arXiv 2310.15213 (function vectors), equation 5; Soteria (2502.11244) profiles heads
    per language in this way.
    """
    batches, first = _asked(lm, prompts, answers, batch_size)
    if any(int(batch.lengths.min()) < 2 for batch in batches):
        raise SteersmanError("a prompt to patch heads into needs at least two tokens")
    # What stands before the last token is never patched: it is read once, and each head costs one token a prompt.
    before = [
        Session(lm, replace(batch, input_ids=batch.input_ids[:, :-1], attention_mask=batch.attention_mask[:, :-1]))
        for batch in batches
    ]
    last = [batch.input_ids[:, -1] for batch in batches]
    return profile_heads(
        lm,
        lambda layer, head: {
            z_hook(layer): HeadEdit.of(lm, z_hook(layer), {head: means[layer][head].to(lm.device)}, keep=0.0)
        },
        lambda: _of_first([stream.fork().feed(token) for stream, token in zip(before, last)], first),
        layers=sorted(means),
        scope="generation",
        shuffles=shuffles,
        seed=seed,
        measure="rise of p(answer) with the head's output patched in",
    )
