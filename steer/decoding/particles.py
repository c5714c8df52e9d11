"""Particles of a language model: prompts in, a weighted set of continuations of each out (`decoder.py` says how)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from steersman.config import check_types, merged
from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.generate import stop_ids as ids_of
from steersman.lm.tokens import Prompt, as_prompts
from steersman.steer.decoding.decoder import check_guide, decode
from steersman.steer.decoding.masks import FunctionMask, Mask, RegexMask
from steersman.steer.decoding.mix import Mix
from steersman.steer.decoding.population import ParticleSet, Prefix, Writer
from steersman.steer.decoding.potentials import Potential, Reward
from steersman.steer.decoding.proposals import Critic, Proposal
from steersman.steer.decoding.resampling import Resampler, as_resampler
from steersman.steer.decoding.sources import Context, LookaheadSource, SessionSource, Source


@dataclass(frozen=True, kw_only=True)
class ParticleConfig:
    """How `particles` decodes."""

    n: int = 8
    """Particles of each prompt."""
    max_new_tokens: int = 40
    """Tokens that a particle may write, an end token included."""
    every: int = 1
    """Tokens between two looks at the potentials, each of which may resample."""
    resampler: str | Resampler = "multinomial"
    """A resampler's name, with its defaults, or one made with others: `WithoutReplacement(copies=4)`."""
    temperature: float = 1.0
    """The proposal's; 0 takes the likeliest token (with corrected=False)."""
    top_k: int | None = None
    """The proposal's: only this many of the likeliest tokens."""
    top_p: float | None = None
    """The proposal's: only the smallest set of the likeliest tokens with this probability."""
    corrected: bool = True
    """Whether the weight takes up p / q, so that the target is of the model itself; False makes the tempered
    distribution the base of the target."""
    seed: int | Sequence[int] = 0
    """A prompt's random numbers: of one number the i-th prompt takes seed + i, of several its own."""
    bos: bool = True
    """Whether the family's beginning-of-sequence token stands before each prompt."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("n", "max_new_tokens", "every"):
            whole_number(getattr(self, name), name, at_least=1)


def particles(
    lm: LanguageModel,
    prompts: str | Sequence[Prompt] | Tensor,
    *,
    mask: str | Mask | Callable[[Prefix], Any] | None = None,
    potential: Potential | Sequence[Potential] = (),
    critic: Critic | None = None,
    guide: Context | Mix | Source | None = None,
    config: ParticleConfig | None = None,
    **settings: Any,
) -> list[ParticleSet]:
    """Continue each prompt by N weighted particles: one `ParticleSet` for each prompt.

    `mask` is a regular expression that the generated text has to match as a whole (`RegexMask`), a `Mask`, or a
    function of the generated tokens that returns which may follow ([V] bool, or ids). `potential` is what multiplies a
    text's probability: one, or several. `critic` twists the proposal. `guide` proposes tokens in place of the model,
    whose own distribution stays the target: a function that returns a steering context, such as
    `lambda: st.vector(v, scale=4)`, a `Mix`, or any `Source`. Steering contexts that are open around the call steer
    the target.
    Settings as in `ParticleConfig`, by keyword or in `config`.

    Raises SteersmanError for what does not fit, before anything is run, and when every particle of a prompt is dead,
    naming the token and the constraint.

        [out] = particles(lm, "Once upon a time", mask=r" there was an? [a-z ]+\\.", n=8)
        out.completions[out.best("prior")], out.log_z
    """
    config = merged(ParticleConfig, config, settings)
    potentials = [potential] if isinstance(potential, Potential) else list(potential)
    resampler = as_resampler(config.resampler)
    stops = ids_of(lm.model.generation_config.eos_token_id) if lm.can_generate else []
    proposal = Proposal(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        corrected=config.corrected,
        mask=_as_mask(lm, mask),
        critic=critic,
    )
    check_guide(proposal, guide)
    for one in potentials:
        if not isinstance(one, Potential):
            raise SteersmanError(f"a potential is an object such as Reward(fn), got {type(one).__name__}")
        one.check(lm)
    given = as_prompts(prompts)
    batch = lm.encode(given, bos=config.bos, padding_side="left")
    seeds = _seeds(config.seed, len(given))
    lm.check_room(batch.input_ids.shape[1], config.max_new_tokens)
    hooks = [one.hook for one in potentials if one.hook is not None]
    if critic is not None:
        critic.check(lm)
    if critic is not None and critic.hook is not None:
        k = min(critic.top or lm.hook_width("logits"), lm.hook_width("logits"))
        hooks = [lm.resolve_hook(critic.hook), *hooks]
        source: Source = LookaheadSource(lm, batch, config.n, k, hooks=hooks)
    else:
        source = SessionSource(lm, batch, config.n, hooks=hooks)
    with ExitStack() as stack:
        if isinstance(guide, Mix):
            opened = guide.opened(lm, batch, config.n, max_new_tokens=config.max_new_tokens, bos=config.bos)
            guide = stack.enter_context(opened)
        elif callable(guide):
            guide = SessionSource(lm, batch, config.n, context=guide)
        return decode(
            source,
            writer_of(lm, [row[kept].tolist() for row, kept in zip(batch.input_ids, batch.attention_mask.bool())]),
            config.n,
            max_new_tokens=config.max_new_tokens,
            proposal=proposal,
            potentials=potentials,
            resampler=resampler,
            every=config.every,
            stop_ids=stops,
            seeds=seeds,
            guide=guide,
        )


def best_of_n(
    lm: LanguageModel,
    prompts: str | Sequence[Prompt] | Tensor,
    reward: Callable[[list[Any]], Any],
    n: int = 8,
    *,
    mask: str | Mask | Callable[[Prefix], Any] | None = None,
    config: ParticleConfig | None = None,
    **settings: Any,
) -> list[ParticleSet]:
    """n independent texts of each prompt, scored at their end by `reward` of the completions: n reward calls.

    `best()` of a set is the winner. The baseline for whatever asks a reward more often: give it as many calls.
    """
    settings = {"corrected": False, **settings, "n": n, "resampler": "never"}
    full = merged(ParticleConfig, config, settings)
    full = replace(full, every=full.max_new_tokens)
    return particles(lm, prompts, mask=mask, potential=Reward(reward, kind="final"), config=full)


def writer_of(lm: LanguageModel, prompt_ids: Sequence[Sequence[int]]) -> Writer:
    """What writes out a language model's tokens, just as they are: no spaces are tidied up."""

    def text(ids: Sequence[int]) -> str:
        return lm.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return Writer(prompt_ids=prompt_ids, decode=text)


def _as_mask(lm: LanguageModel, given: Any) -> Mask | None:
    if given is None or isinstance(given, Mask):
        return given
    if isinstance(given, str):
        return RegexMask(lm, given)
    if callable(given):
        return FunctionMask(given, lm.hook_width("logits"))
    raise SteersmanError(f"a mask is a regular expression, a Mask or a function, got {type(given).__name__}")


def _seeds(given: int | Sequence[int], prompts: int) -> list[int]:
    if isinstance(given, int):
        return [given + i for i in range(prompts)]
    if len(given) != prompts:
        raise SteersmanError(f"{len(given)} seeds for {prompts} prompts: give one number, or one per prompt")
    return [int(seed) for seed in given]
