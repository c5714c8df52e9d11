"""Steered against unsteered text, and what the steering cost: the function behind `steersman steer`.

KL and log-likelihood are taken over the generated tokens of the steered text, teacher-forced through both models with
the prompt masked, in fp32: KL(steered || base) says how far the steered distribution was pushed at each token, the
negative log-likelihood under the unsteered model how strange the text is. Low loss with high repetition is
degeneration, so the repetition rate and the fraction of distinct bigrams stand beside it.
"""

import json
import textwrap
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor

from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.lm import Generation, LanguageModel
from steersman.sae import SAE
from steersman.steer.edit_report import EditReport
from steersman.steer.feature_values import parse_features
from steersman.steer.measures import distinct, generated_tokens, repetition_rate, token_kl, token_nll
from steersman.steer.steerer import Steerer

DEFAULT_PROMPTS = ("Once upon a time",)  # not the field's default: a flag that may be repeated adds to its default


@renamed_fields(model="", sae="", device="", kernels="", dtype="")
@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """What to do to an SAE's features, and on which prompts to look at it."""

    feature: tuple[str, ...]
    """Features with their strengths, as `id=strength` (or `id` for strength 1); several are edited at once."""
    prompt: tuple[str, ...] = ()
    """Prompts to continue, in one batch; without any, "Once upon a time"."""
    mode: str = "add"
    """Edit mode: add, clamp, floor, scale or project_out."""
    units: str = "max_act"
    """Unit of the strengths: raw, max_act (multiples of the largest activation in training) or norm_frac (of the
    median norm). The modes scale and project_out take a plain factor and need raw."""
    scope: str = "all"
    """Tokens to steer: all, prompt, generation, last_prompt, a window such as 2:10, or tokens:15,27."""
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


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """One prompt continued with and without steering."""

    prompt: str
    """The prompt."""
    steered: str
    """The steered continuation."""
    unsteered: str | None
    """The unsteered continuation, or None when it was not asked for."""
    kl_mean: float
    """Mean over the steered text's generated tokens of KL(steered || base), in nats."""
    kl_p95: float
    """95th percentile of the same."""
    nll: float
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
    """Achieved activations and collateral over the steered tokens; None when the scope met no token."""
    kl_mean: float
    """Mean KL(steered || base) over all generated tokens, in nats."""
    kl_p95: float
    """95th percentile over all generated tokens."""

    def to_text(self, width: int = 110) -> str:
        """Texts side by side, with the measures beneath them."""
        lines = []
        for pair in self.pairs:
            lines += [f"prompt: {pair.prompt}", ""]
            lines += _columns(pair.unsteered, pair.steered, width)
            base = "" if pair.unsteered_nll is None else f" (unsteered text {pair.unsteered_nll:.2f})"
            lines += [
                "",
                f"KL per token {pair.kl_mean:.3f}, p95 {pair.kl_p95:.3f}   NLL unsteered model {pair.nll:.2f}{base}   "
                f"repetition {pair.repetition:.2f}   distinct-2 {pair.distinct_2:.2f}",
                "",
            ]
        if self.edit is None:
            lines.append("no token was steered: the scope met none")
        else:
            lines.append(str(self.edit))
        if len(self.pairs) > 1:
            lines.append(f"all prompts: KL per token {self.kl_mean:.3f}, p95 {self.kl_p95:.3f}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything as one JSON object."""
        return json.dumps(asdict(self), indent=2)


def _columns(left: str | None, right: str, width: int) -> list[str]:
    if left is None:
        return ["steered", *(textwrap.wrap(right, width) or [""])]
    half = (width - 3) // 2
    rows = zip_longest(textwrap.wrap(left, half), textwrap.wrap(right, half), fillvalue="")
    return [f"{'unsteered':<{half}} | steered", *(f"{a:<{half}} | {b}" for a, b in rows)]


def steer_and_compare(lm: LanguageModel, sae: SAE, config: SteerConfig) -> Comparison:
    """Continue the prompts with the features edited (and, with `compare`, without) and measure the difference.

    Raises SteersmanError for every mistake `Steerer.features` knows, before anything is generated.
    """
    settings: dict[str, Any] = {"max_new_tokens": config.max_new_tokens}
    if config.temperature > 0:
        settings |= {"temperature": config.temperature, "top_p": config.top_p, "do_sample": True, "seed": config.seed}
    elif config.temperature < 0 or config.top_p is not None:
        raise SteersmanError("top_p needs a temperature above 0, and a temperature is never negative")
    steering = Steerer(lm).features(
        sae,
        parse_features(config.feature),
        mode=config.mode,
        units=config.units,
        scope=config.scope,
        hook=config.hook,
        include_bos=config.include_bos,
        measure=True,
    )
    prompts = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt or DEFAULT_PROMPTS)
    plain = lm.generate(prompts, **settings) if config.compare else None
    with steering:
        text = lm.generate(prompts, **settings)
    with steering:  # entered anew: the report is over each token of the finished texts once
        forced = lm.logits(text.tokens, text.attention_mask, prompt_length=text.prompt_length)
    edit = steering.report() if steering.trace.count else None
    base = lm.logits(text.tokens, text.attention_mask)
    chosen = generated_tokens(text)
    kl, nll = token_kl(forced, base)[:, :-1], token_nll(base, text.tokens)
    plain_nll = None
    if plain is not None:
        plain_nll = token_nll(lm.logits(plain.tokens, plain.attention_mask), plain.tokens)
    pairs = []
    for i, prompt in enumerate(prompts):
        tokens = text.new_tokens[i][text.new_mask[i].bool()].tolist()
        row_kl = kl[i][chosen[i]]
        pairs.append(
            TextPair(
                prompt=prompt,
                steered=text.completions[i],
                unsteered=None if plain is None else plain.completions[i],
                kl_mean=float(row_kl.mean()),
                kl_p95=float(row_kl.quantile(0.95)),
                nll=float(nll[i][chosen[i]].mean()),
                unsteered_nll=None if plain is None or plain_nll is None else _row_mean(plain_nll, plain, i),
                repetition=repetition_rate(tokens),
                distinct_2=distinct(tokens),
            )
        )
    every = kl[chosen]
    return Comparison(pairs=pairs, edit=edit, kl_mean=float(every.mean()), kl_p95=float(every.quantile(0.95)))


def _row_mean(nll: Tensor, text: Generation, row: int) -> float:
    return float(nll[row][generated_tokens(text)[row]].mean())
