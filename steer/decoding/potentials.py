"""Potentials: by what a particle's probability is multiplied, while it is written and at its end.

A potential says, for a partial text, the log potential A_t of the whole of it, and the decoder puts A_t - A_(t-1) into
the weight. So whatever is said on the way steers where particles go, and what is said at the end is the target:
p(text) exp(A_T) / Z. Several potentials add.

Shape letters: R rows (partial texts), D width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steersman.doors import number, whole_number
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.registry import Registry
from steersman.sae import SAE
from steersman.steer.decoding.population import Candidates, Cost

POTENTIALS: "Registry[type[Potential]]" = Registry("potential")
"""The potentials by name."""

Of = Literal["completion", "text", "ids"]
"""What a function is given: the generated text, the prompt and it, or all token ids."""


class Potential:
    """What multiplies the probability of a text. A subclass with a `name` is found under it.

    It says `value` for partial texts, or `observe` for the hidden states at a hook point of the particles' own passes;
    and how many `numbers` it remembers of each particle, which follow it through resampling.
    """

    name: ClassVar[str] = ""
    numbers: int = 0
    hook: str | None = None
    """The hook point whose states it observes; such a potential is asked after every token."""

    def __init_subclass__(cls) -> None:
        POTENTIALS.register(cls, cls)

    @property
    def what(self) -> str:
        """What messages call it."""
        return f"the potential {self.name or type(self).__name__}"

    def start(self) -> None:
        """Forget the run before."""

    def check(self, lm: LanguageModel) -> None:
        """Raise a SteersmanError where it does not fit the model, before anything is run."""

    @property
    def cost(self) -> Cost:
        """What it took since `start`."""
        return Cost(forward_passes=0, rows=0, reward_calls=0)

    def value(self, candidates: Candidates, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(A [R] float64, memory [R, numbers]) of partial texts, from the memory before them. -inf ends a particle."""
        raise NotImplementedError  # each potential defines this or `observe`

    def observe(self, states: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(A [R] float64, memory [R, numbers]) after one more token, whose states at `hook` are `states` [R, D]."""
        raise NotImplementedError


class Scorer:
    """A function of texts, called with many at once, never twice with the same one in a run."""

    def __init__(self, fn: Callable[[list[Any]], Any], of: Of, what: str) -> None:
        if of not in ("completion", "text", "ids"):
            raise SteersmanError(f"of must be 'completion', 'text' or 'ids', got {of!r}")
        self.fn, self.of, self.what = fn, of, what
        self.start()

    def start(self) -> None:
        """Forget what was asked."""
        self.known: dict[tuple[int, tuple[int, ...]], float] = {}
        self.calls = 0

    def __call__(self, candidates: Candidates) -> Tensor:
        """[R] float64. Raises SteersmanError for a function that returns NaN, +inf, or another number of values."""
        keys = list(zip(candidates.prompts, candidates.prefixes))
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self.known}
        rows = sorted(first.values())
        if rows:
            given = {"completion": "completions", "text": "texts", "ids": "ids"}[self.of]
            values = [getattr(candidates, given)[i] for i in rows]
            self.calls += len(rows)
            for i, value in zip(rows, self._checked(self.fn(values), values)):
                self.known[keys[i]] = value
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)

    def _checked(self, found: Any, given: Sequence[Any]) -> list[float]:
        try:
            out = torch.as_tensor(found, dtype=torch.float64).flatten().tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise SteersmanError(f"{self.what} must return one number for each text: {error}") from error
        if len(out) != len(given):
            raise SteersmanError(f"{self.what} returned {len(out)} numbers for {len(given)} texts")
        for value, text in zip(out, given):
            if math.isnan(value) or value == math.inf:
                raise SteersmanError(f"{self.what} returned {value} for {str(text)[:80]!r}")
        return out


Kind = Literal["diff", "max", "add", "rt", "final"]


class _Scored(Potential):
    """A potential that asks a function about texts."""

    score: Scorer

    def start(self) -> None:
        self.score.start()

    @property
    def cost(self) -> Cost:
        return Cost(forward_passes=0, rows=0, reward_calls=self.score.calls)


class Reward(_Scored):
    """The target p(text) exp(lam r(text)) for a reward r, with Feynman-Kac steering's choice of what is said on the
    way (arXiv 2501.06848, section 3.1).

    | kind | A_t before the end |
    |---|---|
    | `diff` | lam r_t: the factor of a step is exp(lam (r_t - r_(t-1))) |
    | `max` | lam sum_s max_(u <= s) r_u: the factor is exp(lam max_(u <= t) r_u) |
    | `add` | lam sum_s sum_(u <= s) r_u |
    | `rt` | lam sum_s r_s |
    | `final` | 0: r is asked at the end alone (best-of-n) |

    s and u run over the steps at which the decoder asks (every 20 tokens in the paper). At the end A_T = lam r whatever
    the kind, so the target is the same; kinds differ in which particles survive on the way. There is no r_0: Z is
    E_p[exp(lam r)]. The paper's r_t is of a diffusion model's denoised text: on an autoregressive model it is that of
    the prefix, or a `RolloutValue`'s. It returns the argmax, which is no sample of the target.
    """

    name = "reward"

    def __init__(
        self, fn: Callable[[list[Any]], Any], lam: float = 1.0, *, kind: Kind = "diff", of: Of = "completion"
    ) -> None:
        if kind not in ("diff", "max", "add", "rt", "final"):
            raise SteersmanError(f"kind must be 'diff', 'max', 'add', 'rt' or 'final', got {kind!r}")
        self.lam, self.kind = number(lam, "lam"), kind
        self.numbers = 3 if kind in ("max", "add") else 1 if kind == "rt" else 0
        self.score = Scorer(fn, of, f"the reward {getattr(fn, '__name__', type(fn).__name__)}")

    def value(self, candidates: Candidates, memory: Tensor) -> tuple[Tensor, Tensor]:
        asked = candidates.final | (self.kind != "final")
        r = torch.zeros(len(candidates), dtype=torch.float64)
        if bool(asked.any()):
            r[asked] = self.score(_some(candidates, asked))
        end = _times(self.lam, r)
        if self.kind == "final":
            return torch.where(candidates.final, end, 0.0), memory
        if self.kind == "diff":
            return end, memory
        if self.kind == "rt":
            total = memory[:, 0] + r
            return torch.where(candidates.final, end, _times(self.lam, total)), total[:, None]
        running, total, steps = memory.unbind(1)
        running = running + r if self.kind == "add" else torch.where(steps == 0, r, running.maximum(r))
        total = total + running
        return torch.where(candidates.final, end, _times(self.lam, total)), torch.stack([running, total, steps + 1], 1)


class Constraint(_Scored):
    """Keeps texts for which `fn` is true: A_t is 0 or -inf, at each step that the decoder asks (`final=True`: at the
    end alone). A constraint that no unfinished text meets ends every particle: say `final=True`."""

    name = "constraint"

    def __init__(self, fn: Callable[[Any], bool], *, of: Of = "completion", final: bool = False) -> None:
        self.label = getattr(fn, "__name__", type(fn).__name__)
        self.final = final
        self.score = Scorer(lambda texts: [float(bool(fn(text))) for text in texts], of, self.what)

    @property
    def what(self) -> str:
        return f"the constraint {self.label}"

    def value(self, candidates: Candidates, memory: Tensor) -> tuple[Tensor, Tensor]:
        asked = candidates.final if self.final else torch.ones_like(candidates.final)
        met = torch.ones(len(candidates), dtype=torch.float64)
        if bool(asked.any()):
            met[asked] = self.score(_some(candidates, asked))
        return met.log(), memory


class Twist(_Scored):
    """A guess of what is to come: log psi(text so far), taken back at the end (SMC steering programs' `twist`, arXiv
    2306.03081). It steers resampling and leaves the target as it is."""

    name = "twist"

    def __init__(self, fn: Callable[[list[Any]], Any], *, of: Of = "completion") -> None:
        self.score = Scorer(fn, of, f"the twist {getattr(fn, '__name__', type(fn).__name__)}")

    def value(self, candidates: Candidates, memory: Tensor) -> tuple[Tensor, Tensor]:
        out, open_ = torch.zeros(len(candidates), dtype=torch.float64), ~candidates.final
        if bool(open_.any()):
            out[open_] = self.score(_some(candidates, open_))
        return out, memory


class RolloutValue(Potential):
    """A_t = log mean_m exp(lam r(rollout m)) over `rollouts` continuations of `tokens` tokens from the partial text:
    a Monte-Carlo estimate of the exact critic log E[exp(lam r) | text so far]; at the end lam r itself.

    Costs rollouts x tokens rows for each text that is asked for (ask every so many tokens). Steering contexts that are
    open steer the rollouts too.
    """

    name = "rollout_value"

    def __init__(
        self,
        lm: LanguageModel,
        fn: Callable[[list[Any]], Any],
        lam: float = 1.0,
        *,
        rollouts: int = 4,
        tokens: int = 20,
        temperature: float = 1.0,
        seed: int = 0,
        of: Of = "completion",
    ) -> None:
        self.lm, self.lam, self.temperature, self.seed = lm, number(lam, "lam"), temperature, seed
        self.rollouts = whole_number(rollouts, "rollouts", at_least=1)
        self.tokens = whole_number(tokens, "tokens", at_least=1)
        self.score = Scorer(fn, of, f"the reward {getattr(fn, '__name__', type(fn).__name__)}")
        self.start()

    def start(self) -> None:
        self.score.start()
        self.known: dict[tuple[int, tuple[int, ...]], float] = {}
        self.passes = self.rows = 0

    @property
    def cost(self) -> Cost:
        return Cost(forward_passes=self.passes, rows=self.rows, reward_calls=self.score.calls)

    def value(self, candidates: Candidates, memory: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(len(candidates), dtype=torch.float64)
        final = candidates.final
        if bool(final.any()):
            out[final] = _times(self.lam, self.score(_some(candidates, final)))
        if bool((~final).any()):
            out[~final] = self._rolled(_some(candidates, ~final))
        return out, memory

    def _rolled(self, candidates: Candidates) -> Tensor:
        keys = list(zip(candidates.prompts, candidates.prefixes))
        new = [i for i, key in enumerate(keys) if key not in self.known and keys.index(key) == i]
        if new:
            m = self.rollouts
            made = self.lm.generate(
                [candidates.ids[i] for i in new],
                max_new_tokens=self.tokens,
                num_return_sequences=m,
                do_sample=True,
                temperature=self.temperature,
                seed=self.seed + self.passes,
            )
            self.passes += made.new_tokens.shape[1]
            self.rows += int(made.new_mask.sum())
            tails = [tuple(row[kept].tolist()) for row, kept in zip(made.new_tokens, made.new_mask.bool())]
            whole = Candidates(
                candidates.writer,
                [candidates.prompts[i] for i in new for _ in range(m)],
                [(*candidates.prefixes[new[j // m]], *tail) for j, tail in enumerate(tails)],
                torch.ones(len(tails), dtype=torch.bool),
            )
            values = _times(self.lam, self.score(whole)).view(len(new), m).logsumexp(1) - math.log(m)
            self.known |= {keys[i]: float(value) for i, value in zip(new, values)}
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)


Reduce = Literal["sum", "mean", "max", "last"]


class StatePotential(Potential):
    """A_t = scale times the sum (mean, max, or last) over the generated tokens of `fn(states [R, D]) -> [R]`, read at a
    hook point of the particles' own passes, after any edits there. The token that ends a text is not read."""

    name = "state"

    def __init__(
        self, hook: str, fn: Callable[[Tensor], Tensor], scale: float = 1.0, *, reduce: Reduce = "sum"
    ) -> None:
        if reduce not in ("sum", "mean", "max", "last"):
            raise SteersmanError(f"reduce must be 'sum', 'mean', 'max' or 'last', got {reduce!r}")
        self.hook, self.fn, self.scale, self.reduce = hook, fn, number(scale, "scale"), reduce
        self.numbers = 2  # tokens read, and what was made of them

    def check(self, lm: LanguageModel) -> None:
        assert self.hook is not None
        self.hook = lm.resolve_hook(self.hook)

    def observe(self, states: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        found = self.fn(states).double().cpu().reshape(-1)
        if not bool(torch.isfinite(found).all()):
            raise SteersmanError(f"{self.what} at {self.hook} is not finite")
        count, before = memory.unbind(1)
        if self.reduce == "max":
            kept = torch.where(count == 0, found, before.maximum(found))
        else:
            kept = found if self.reduce == "last" else before + found
        count = count + 1
        return self.scale * (kept / count if self.reduce == "mean" else kept), torch.stack([count, kept], 1)


class FeaturePotential(StatePotential):
    """`StatePotential` of one feature of an SAE: p(text) exp(scale x activation of the feature over the text) / Z."""

    name = "feature"

    def __init__(
        self, sae: SAE, feature: int, scale: float = 1.0, *, reduce: Reduce = "sum", hook: str | None = None
    ) -> None:
        sae.check_residual("a potential")
        feature = whole_number(feature, "feature", at_least=0)
        if feature >= sae.cfg.d_sae:
            raise SteersmanError(f"feature {feature} does not exist: the SAE has {sae.cfg.d_sae}")
        super().__init__(hook or sae.cfg.hook_name, lambda h: sae.encode(h)[:, feature], scale, reduce=reduce)
        self.sae, self.given_hook = sae, hook

    def check(self, lm: LanguageModel) -> None:
        self.hook = check_sae_fits(lm, self.sae, self.given_hook)


def _some(candidates: Candidates, which: Tensor) -> Candidates:
    rows = which.nonzero()[:, 0].tolist()
    return Candidates(
        candidates.writer,
        [candidates.prompts[i] for i in rows],
        [candidates.prefixes[i] for i in rows],
        candidates.final[which],
    )


def _times(lam: float, r: Tensor) -> Tensor:
    """lam r, with 0 for lam = 0 whatever r is."""
    return lam * r if lam else torch.zeros_like(r)
