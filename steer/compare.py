"""Steered against unsteered text, and what the steering cost: the function behind `steersman steer`.

KL and log-likelihood are taken over the generated tokens of the steered text, teacher-forced through both models with
the prompt masked, in fp32: KL(steered || base) says how far the steered distribution was pushed at each token, the
negative log-likelihood under the unsteered model how strange the text is. Low loss with high repetition is
degeneration, so the repetition rate and the fraction of distinct bigrams stand beside it.
"""

import json
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor

from steersman.config import check_types
from steersman.conversations import ChatOptions, Document
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.html import card
from steersman.lm import Generation, LanguageModel
from steersman.sae import SAE
from steersman.steer.dose import steered
from steersman.steer.edit_report import EditReport
from steersman.steer.edits import EditSet
from steersman.steer.feature_values import parse_features
from steersman.steer.measures import distinct, generated_tokens, repetition_rate, token_kl, token_nll
from steersman.steer.recipe import Recipe
from steersman.steer.steerer import Steerer
from steersman.steer.vectors.vector import SteeringVector
from steersman.visible import visible

DEFAULT_PROMPTS = ("Once upon a time",)  # not the field's default: a flag that may be repeated adds to its default


@renamed_fields(model="", sae="", device="", kernels="", dtype="")
@dataclass(frozen=True, kw_only=True)
class SteerConfig(ChatOptions):
    """How to steer, and on which prompts to look at it."""

    feature: tuple[str, ...] = ()
    """Features with their strengths, as `id=strength` (or `id` for strength 1); several are edited at once."""
    prompt: tuple[str, ...] = ()
    """Prompts to continue, in one batch; without any, "Once upon a time"."""
    mode: str = "add"
    """Edit mode of the features: add, clamp, floor, scale or project_out."""
    units: str = "raw"
    """Unit of the features' strengths: raw activations, max_act (multiples of the largest activation in training) or
    norm_frac (of the median norm). The modes scale and project_out take a plain factor and need raw."""
    scope: str = "all"
    """Tokens to steer: all, prompt, generation, last_prompt, a window such as 2:10, tokens:15,27, of a chat assistant,
    user, system, thinking, last_user, turn:N or role:NAME, or several joined by +."""
    include_bos: bool = False
    """Steer the beginning-of-sequence token too where it falls into the scope."""
    hook: str | None = None
    """Hook point, for an SAE that records none."""
    max_new_tokens: int = 40
    """Tokens to generate per prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float | None = None
    """Nucleus sampling: keep the smallest set of tokens with this probability. Needs a temperature above 0."""
    seed: int = 0
    """Seed of the sampling, the same for both texts."""
    compare: bool = True
    """Also generate without steering."""
    batch_size: int = 16
    """Prompts that are continued together where many are written to a file of lines."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.batch_size < 1:
            raise SteersmanError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """One prompt continued with and without steering."""

    prompt: str
    """The prompt; a conversation as the model read it."""
    steered: str
    """The steered continuation."""
    unsteered: str | None
    """The unsteered continuation, or None when it was not asked for."""
    kl_mean: float | None
    """Mean over the steered text's generated tokens of KL(steered || base), in nats; None where none was generated."""
    kl_p95: float | None
    """95th percentile of the same."""
    nll: float | None
    """Mean negative log-likelihood per generated token of the steered text under the unsteered model, in nats."""
    unsteered_nll: float | None
    """The same for the unsteered text."""
    repetition: float
    """Fraction of the steered text's generated tokens that repeat a 4-gram ending seen before in it."""
    distinct_2: float
    """Distinct bigrams over bigrams in the steered text's generated tokens."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcome of `steer_and_compare`."""

    pairs: list[TextPair]
    """One entry per prompt."""
    edit: EditReport | None
    """Achieved activations and collateral of the features over the steered tokens; None without features, and when the
    scope met no token."""
    n_steered: int
    """Tokens that were steered, over the finished texts."""
    kl_mean: float | None
    """Mean KL(steered || base) over all generated tokens, in nats; None where none was generated."""
    kl_p95: float | None
    """95th percentile over all generated tokens."""

    def __repr__(self) -> str:
        kl = "no text" if self.kl_mean is None else f"KL per token {self.kl_mean:.3g}"
        return f"Comparison({len(self.pairs)} prompts, {self.n_steered} tokens steered, {kl})"

    def _repr_html_(self) -> str:
        rows = [[pair.prompt, pair.unsteered, pair.steered] for pair in self.pairs]
        return card(repr(self), tables=[(["prompt", "unsteered", "steered"], rows)])

    def to_text(self, width: int = 110) -> str:
        """Texts side by side, with the measures beneath them."""
        lines = []
        for pair in self.pairs:
            lines += [f"prompt: {visible(pair.prompt)}", ""]
            lines += _columns(pair.unsteered, pair.steered, width)
            base = "" if pair.unsteered_nll is None else f" (unsteered text {pair.unsteered_nll:.2f})"
            lines += [
                "",
                f"KL per token {_number(pair.kl_mean, 3)}, p95 {_number(pair.kl_p95, 3)}   "
                f"NLL unsteered model {_number(pair.nll, 2)}{base}   "
                f"repetition {pair.repetition:.2f}   distinct-2 {pair.distinct_2:.2f}",
                "",
            ]
        if not self.n_steered:
            lines.append("no token was steered: the scope met none")
        elif self.edit is not None:
            lines.append(str(self.edit))
        if len(self.pairs) > 1:
            lines.append(f"all prompts: KL per token {_number(self.kl_mean, 3)}, p95 {_number(self.kl_p95, 3)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything as one JSON object."""
        return json.dumps(asdict(self), indent=2)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _columns(left: str | None, right: str, width: int) -> list[str]:
    right = visible(right, newline="↵ ")
    if left is None:
        return ["steered", *(textwrap.wrap(right, width) or [""])]
    half = (width - 3) // 2
    left = visible(left, newline="↵ ")
    rows = zip_longest(textwrap.wrap(left, half), textwrap.wrap(right, half), fillvalue="")
    return [f"{'unsteered':<{half}} | steered", *(f"{a:<{half}} | {b}" for a, b in rows)]


def steer_and_compare(
    lm: LanguageModel,
    sae: SAE | None,
    config: SteerConfig,
    vectors: Sequence[tuple[SteeringVector | EditSet, float]] = (),
    recipe: Recipe | None = None,
    prompts: Sequence[Document] | None = None,
) -> Comparison:
    """Continue prompts steered (and, with `compare`, unsteered) and measure the difference.

    The prompts are those of `config`, unless given, and are continued in one batch. Steered by the features of
    `config`, for which an SAE is needed, by `vectors`, each times its scale, and by the edits of a recipe, in this
    order, together. An `EditSet` stands for a vector.

    Raises SteersmanError for every mistake that `Steerer.features` and `Steerer.vector` know, and where there is
    nothing to steer by, before anything is generated.
    """
    settings: dict[str, Any] = {"max_new_tokens": config.max_new_tokens}
    if config.temperature > 0:
        settings |= {"temperature": config.temperature, "top_p": config.top_p, "do_sample": True, "seed": config.seed}
    elif config.temperature < 0 or config.top_p is not None:
        raise SteersmanError("top_p needs a temperature above 0, and a temperature is never negative")
    steerings = _steerings(lm, sae, config, vectors, recipe)
    given = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt or DEFAULT_PROMPTS)
    prompts = config.apply(given) if prompts is None else list(prompts)
    plain = lm.generate(prompts, **settings) if config.compare else None
    with ExitStack() as stack:
        for steering in steerings:
            stack.enter_context(steering)
        text = lm.generate(prompts, **settings)
    with ExitStack() as stack:  # entered anew: the report is over each token of the finished texts once
        for steering in steerings:
            stack.enter_context(steering)
        forced = lm.logits(text.batch, prompt_length=text.prompt_length)
    n_steered = max(steering.trace.count for steering in steerings)
    edit = steerings[0].report() if config.feature and steerings[0].trace.count else None
    base = lm.logits(text.tokens, text.attention_mask)
    chosen = generated_tokens(text)
    kl, nll = token_kl(forced, base)[:, :-1], token_nll(base, text.tokens)
    plain_nll = None
    if plain is not None:
        plain_nll = token_nll(lm.logits(plain.tokens, plain.attention_mask), plain.tokens)
    pairs = []
    for i, prompt in enumerate(text.prompts):
        tokens = text.new_tokens[i][text.new_mask[i].bool()].tolist()
        pairs.append(
            TextPair(
                prompt=prompt,
                steered=text.completions[i],
                unsteered=None if plain is None else plain.completions[i],
                kl_mean=_mean(kl[i][chosen[i]]),
                kl_p95=_p95(kl[i][chosen[i]]),
                nll=_mean(nll[i][chosen[i]]),
                unsteered_nll=None if plain is None or plain_nll is None else _row_mean(plain_nll, plain, i),
                repetition=repetition_rate(tokens),
                distinct_2=distinct(tokens),
            )
        )
    every = kl[chosen]
    return Comparison(pairs=pairs, edit=edit, n_steered=n_steered, kl_mean=_mean(every), kl_p95=_p95(every))


def _steerings(
    lm: LanguageModel,
    sae: SAE | None,
    config: SteerConfig,
    vectors: Sequence[tuple[SteeringVector | EditSet, float]],
    recipe: Recipe | None,
) -> list[Any]:
    """The contexts to open, that of the features first."""
    if not config.feature and not vectors and recipe is None:
        raise SteersmanError("nothing to steer by: give --feature id=strength, --vector or --recipe")
    where: dict[str, Any] = {"scope": config.scope, "include_bos": config.include_bos}
    opened: list[Any] = []
    if config.feature:
        if sae is None:
            raise SteersmanError("features are those of an SAE: give --sae, the SAE")
        features, how = parse_features(config.feature), {"mode": config.mode, "units": config.units}
        opened.append(Steerer(lm).features(sae, features, hook=config.hook, measure=True, **how, **where))
    opened += [steered(vector, lm, scale=scale, **where) for vector, scale in vectors]
    return opened if recipe is None else opened + recipe.apply(lm).steerings


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def _p95(values: Tensor) -> float | None:
    return float(values.quantile(0.95)) if values.numel() else None


def _row_mean(nll: Tensor, text: Generation, row: int) -> float | None:
    return _mean(nll[row][generated_tokens(text)[row]])
