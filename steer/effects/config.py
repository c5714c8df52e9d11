"""What decides the numbers of an effect measurement: `EffectsConfig`, shared with `steersman effects`."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from steersman.config import check_types, identity, setting, typed
from steersman.conversations import ChatOptions
from steersman.errors import SteersmanError
from steersman.lm.sampling import Sampling

DEFAULT_PROMPTS = (
    "I", "We", "The", "She", "It", "There", "When", "They", "In", "After", "You", "One", "My", "Some",
)  # fmt: skip
"""Short openings that leave the text free to go anywhere; one token each in most vocabularies, so one batch."""

DEFAULT_TARGETS = {"loss": 0.5, "kl": 0.5, "norm": 0.5}
"""Scale rule -> its target where none is given: nats per token, nats per token, fraction of the median norm."""


@dataclass(frozen=True, kw_only=True)
class EffectsConfig(ChatOptions):
    """How the effects of steering vectors on an SAE's features are measured."""

    out: str | None = setting(None, identity=False)
    """Folder for the effects. Run again, it resumes where it stopped; None keeps everything in memory."""
    vectors: Literal["gradients", "decoder", "pairs", "random"] = "gradients"
    """What to measure with: gradients of the likelihood of unsteered texts, each of which tells of every direction; or
    texts steered by rows of the decoder (the SAE-TS paper), pairs of rows with random weights, or random directions."""
    n_vectors: int | None = None
    """How many (texts, for `gradients`, which take no account of rollouts, scales and held-out texts); None takes every
    row for `decoder`, and eight for each dimension of the residual stream otherwise."""
    hook: str | None = None
    """Hook point to steer at; that of the SAE if not given."""
    scale_rule: Literal["loss", "kl", "norm", "fixed"] = "loss"
    """How each vector's scale is found: the smallest at which the loss on held-out text rises by the target, or
    KL(steered || base) there reaches it (nats per token); or the target as a fraction of the median norm, or as it
    is."""
    scale_target: float | None = None
    """Target of the rule: 0.5 nats (loss, kl) or half the median norm if not given; `fixed` has no default."""
    scale_tolerance: float = 0.05
    """How near to its target, as a fraction of it, a scale found by measuring must come."""
    scale_limit: float = 8.0
    """Largest scale that is tried, in units of the median norm; what needs more is marked as not reached."""
    heldout_texts: int = 16
    """Texts that the rules `loss` and `kl` measure on."""
    heldout_tokens: int = 32
    """Tokens of each of those texts, at most."""
    rollouts: int = 128
    """Texts sampled for each vector, spread evenly over the prompts."""
    new_tokens: int = 24
    """Tokens of each sampled text."""
    base_rollouts: int | None = None
    """Unsteered texts that all vectors are compared with; ten times `rollouts` if not given."""
    prompts: tuple[str, ...] = ()  # not the default ones: a flag that may be repeated adds to its default
    """Openings of the sampled texts; fourteen short ones if none is given."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int | None = 50
    """Sample from this many of the likeliest tokens; None from all."""
    top_p: float | None = 0.9
    """Then from the smallest set of them with this probability; None from all."""
    scope: Literal["all", "generation"] = "all"
    """Tokens that are steered: all, or only those after the prompt. BOS never is, unless `include_bos`."""
    include_bos: bool = False
    """Steer the beginning-of-sequence token too."""
    positions: Literal["generated", "text", "all"] = "generated"
    """Positions that features are averaged over: generated ones, those of the prompt too, or BOS as well. End tokens
    never are."""
    seed: int = 0
    """Seed of the vectors and of all sampling."""
    shard_vectors: int = 64
    """Vectors of a shard. An interruption loses the unfinished shard."""
    batch_rows: int = setting(1024, identity=False)
    """Texts that are sampled together. It decides speed and memory; of the results, only how they are rounded."""
    timeout_seconds: float = setting(3600.0, identity=False)
    """With several processes (torchrun): how long one waits for the others, more than a shard or the baseline takes."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("heldout_texts", "heldout_tokens", "rollouts", "new_tokens", "shard_vectors", "batch_rows"):
            if getattr(self, name) < 1:
                raise SteersmanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rollouts < 2 or (self.base_rollouts is not None and self.base_rollouts < 2):
            raise SteersmanError("standard errors need at least 2 rollouts of each vector and 2 unsteered ones")
        if self.n_vectors is not None and self.n_vectors < 1:
            raise SteersmanError(f"n_vectors must be at least 1, got {self.n_vectors}")
        if self.scale_rule == "fixed" and self.scale_target is None:
            raise SteersmanError("scale_rule 'fixed' needs scale_target: the scale of every (unit) vector")
        if not self.target > 0 or not 0 < self.scale_tolerance < 1 or not self.scale_limit > 0:
            raise SteersmanError("scale_target and scale_limit must be above 0, scale_tolerance between 0 and 1")
        _ = self.sampling  # raises on settings it cannot have

    @property
    def target(self) -> float:
        """The scale rule's target."""
        return DEFAULT_TARGETS[self.scale_rule] if self.scale_target is None else self.scale_target

    @property
    def openings(self) -> tuple[str, ...]:
        """The prompts."""
        return self.prompts or DEFAULT_PROMPTS

    @property
    def n_base(self) -> int:
        """Number of unsteered rollouts."""
        return 10 * self.rollouts if self.base_rollouts is None else self.base_rollouts

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def needs_texts(self) -> bool:
        """Whether the scale rule measures on held-out texts."""
        return self.scale_rule in ("loss", "kl")

    @property
    def by_gradients(self) -> bool:
        """Whether texts are not steered, and the gradients of their likelihood taken."""
        return self.vectors == "gradients"

    def with_vectors(self, given: bool) -> Self:
        """Itself; where vectors are `given`, or an SAE of whose rows they are made, they are steered with: decoder rows
        take the place of gradients, which need no vectors."""
        return replace(self, vectors="decoder") if given and self.by_gradients else self

    def identity(self) -> dict[str, Any]:
        """The settings that decide the numbers, defaults resolved, as JSON can hold them."""
        resolved = {"scale_target": self.target, "base_rollouts": self.n_base, "prompts": list(self.openings)}
        found = identity(self) | resolved
        if not self.chat and self.system is None:
            del found["chat"], found["system"]  # as in the settings of earlier versions
        return found

    @classmethod
    def from_identity(cls, identity: dict[str, Any], **changes: Any) -> "EffectsConfig":
        """The configuration that `identity` describes, with `changes`. Raises SteersmanError for one that cannot be."""
        identity = {name: value for name, value in identity.items() if name != "chat_template"}
        return cls(**{**typed(identity, cls, "the settings that these effects were measured with"), **changes})
