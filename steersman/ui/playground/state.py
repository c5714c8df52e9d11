"""What the panel asks for, as plain data: a prompt or a chat, interventions, how to generate, and what to watch.

It comes from a browser, so every field is held to its type and its bounds, and a mistake names the field it is in.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from steersman.config import check_types, merged
from steersman.conversations import is_conversation
from steersman.doors import number, whole_number
from steersman.errors import SteersmanError
from steersman.reading import shown

PLAIN = ("scale", "project_out")
"""Modes whose strength is a plain factor, without a unit."""
MAX_NEW_TOKENS = 512
PROMPT_CHARS = 20_000
SCOPE_CHARS = 500
MESSAGES = 64
INTERVENTIONS = 16
WATCHED = 16

T = TypeVar("T")


def _check_dial(strength: float, scope: str) -> None:
    _finite(strength, "strength")
    if len(scope) > SCOPE_CHARS:
        raise SteersmanError(f"scope has {len(scope):,} characters, and at most {SCOPE_CHARS} are read here")


def _finite(value: float, what: str) -> None:
    if not math.isfinite(number(value, what)):
        raise SteersmanError(f"{what} must be a finite number, got {value}")


@dataclass(frozen=True, kw_only=True)
class FeatureDial:
    """A feature of the SAE, turned up or down."""

    id: int
    """Feature id."""
    strength: float = 1.0
    """How much, in `units`."""
    mode: str = "add"
    """One of `steersman.steer.edits.feature.MODES`."""
    units: str = "raw"
    """One of `steersman.steer.edits.feature.UNITS`."""
    scope: str = "generation"
    """Tokens to steer."""
    include_bos: bool = False
    """Steer the beginning-of-sequence token too where it falls into the scope."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_dial(self.strength, self.scope)

    @property
    def place(self) -> tuple[Any, ...]:
        """What features share that are edited together, all from the same state."""
        return self.mode, self.units, self.scope, self.include_bos


@dataclass(frozen=True, kw_only=True)
class VectorDial:
    """A steering vector, added."""

    name: str
    """What it is called here."""
    strength: float = 1.0
    """Multiple of it."""
    scope: str = "generation"
    """Tokens to steer."""
    include_bos: bool = False
    """Steer the beginning-of-sequence token too where it falls into the scope."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_dial(self.strength, self.scope)


Dial = FeatureDial | VectorDial
KINDS: dict[str, type[Dial]] = {"feature": FeatureDial, "vector": VectorDial}


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How text is generated."""

    max_new_tokens: int = 40
    """Tokens to generate at most."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float | None = None
    """Nucleus sampling: keep the smallest set of tokens with this probability. Needs a temperature above 0."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            raise SteersmanError(f"max_new_tokens must lie between 1 and {MAX_NEW_TOKENS}, got {self.max_new_tokens}")
        _finite(self.temperature, "temperature")
        if not 0 <= self.temperature <= 100:
            raise SteersmanError(f"temperature must lie between 0 (greedy) and 100, got {self.temperature}")
        if self.top_p is not None and not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise SteersmanError(f"top_p lies in (0, 1] and needs a temperature above 0, got {self.top_p}")
        if not 0 <= self.seed < 1 << 63:
            raise SteersmanError(f"seed must lie between 0 and 2^63 - 1, got {self.seed}")

    def settings(self) -> dict[str, Any]:
        """The arguments of `LanguageModel.generate`."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens}
        sampled = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {"max_new_tokens": self.max_new_tokens, **sampled}


@dataclass(frozen=True, kw_only=True)
class State:
    """All that the panel holds."""

    prompt: str | list[dict[str, str]] = ""
    """A text to continue, or the messages of a chat to reply to."""
    interventions: tuple[Dial, ...] = ()
    """What steers, in order."""
    generation: Writing = Writing()
    """How text is generated."""
    watch: tuple[int, ...] = ()
    """Features whose activation is told at every token."""

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat that is to be replied to."""
        return not isinstance(self.prompt, str)

    def varied(self, index: int, strength: float) -> "State":
        """The same with another strength of one intervention."""
        dials = list(self.interventions)
        dials[index] = dataclasses.replace(dials[index], strength=strength)
        return dataclasses.replace(self, interventions=tuple(dials))

    def record(self) -> dict[str, Any]:
        """The state as JSON holds it."""
        kinds = {kind: name for name, kind in KINDS.items()}
        return {
            ("messages" if self.is_chat else "prompt"): self.prompt,
            "interventions": [{"kind": kinds[type(d)], **dataclasses.asdict(d)} for d in self.interventions],
            "generation": dataclasses.asdict(self.generation),
            "watch": list(self.watch),
        }


def state_from(content: Any, *, units: str = "raw", where: str = "state") -> State:
    """The state that JSON holds; `units` are those of features that say none. Raises SteersmanError that names the
    field, for an unknown one too."""
    held = fields_of(content, ("prompt", "messages", "interventions", "generation", "watch"), where)
    prompt = text_or_messages(held, where)
    dials = list_of(held.get("interventions", []), f"{where}.interventions", INTERVENTIONS)
    watch = list_of(held.get("watch", []), f"{where}.watch", WATCHED)
    generation = fields_of(held.get("generation", {}), None, f"{where}.generation")
    return State(
        prompt=prompt,
        interventions=tuple(_dial(one, units, f"{where}.interventions[{i}]") for i, one in enumerate(dials)),
        generation=named(f"{where}.generation", lambda: merged(Writing, None, generation)),
        watch=tuple(whole_number(one, f"{where}.watch[{i}]") for i, one in enumerate(watch)),
    )


def text_or_messages(held: Mapping[str, Any], where: str, names: tuple[str, str] = ("prompt", "messages")) -> Any:
    """The text or the messages of a request, of which it has one. Raises SteersmanError for what is too long."""
    text, chat = names
    if (held.get(text) is None) == (held.get(chat) is None):
        raise SteersmanError(f"{where} needs either {text} or {chat}")
    if held.get(text) is not None:
        return _text(held[text], f"{where}.{text}")
    messages = list_of(held[chat], f"{where}.{chat}", MESSAGES)
    if not is_conversation(messages):
        raise SteersmanError(f"{where}.{chat} must be a list of messages with a role and a content")
    found, total = [], 0
    for i, message in enumerate(messages):
        here = f"{where}.{chat}[{i}]"
        known = fields_of(message, ("role", "content"), here)
        found.append({name: _text(known.get(name), f"{here}.{name}") for name in ("role", "content")})
        total += len(found[-1]["content"])
    if total > PROMPT_CHARS:
        raise SteersmanError(f"{where}.{chat} have {total:,} characters, and at most {PROMPT_CHARS:,} are read here")
    if found[-1]["role"] == "assistant":
        raise SteersmanError(f"{where}.{chat} end with the assistant's message: there is nothing to reply to")
    return found


def fields_of(content: Any, known: Sequence[str] | None, where: str) -> dict[str, Any]:
    """A JSON object with none but `known` fields (None: any)."""
    if not isinstance(content, dict):
        raise SteersmanError(f"{where} must be an object, got {shown(content)}")
    if known is not None:
        for name in content:
            if name not in known:
                raise SteersmanError(f"{where}: unknown field {shown(name)}; it has {', '.join(known)}")
    return content


def list_of(content: Any, where: str, most: int) -> list[Any]:
    """A JSON list of at most `most` entries."""
    if not isinstance(content, list):
        raise SteersmanError(f"{where} must be a list, got {shown(content)}")
    if len(content) > most:
        raise SteersmanError(f"{where} has {len(content)} entries, and at most {most} are taken here")
    return content


def named(where: str, make: Callable[[], T]) -> T:
    """What `make` gives; its mistakes name the field they are in."""
    try:
        return make()
    except SteersmanError as error:
        raise SteersmanError(f"{where}: {error}") from None


def _dial(content: Any, units: str, where: str) -> Dial:
    held = dict(fields_of(content, None, where))
    kind = KINDS.get(str(held.pop("kind", None)))
    if kind is None:
        raise SteersmanError(f"{where}.kind must be one of {', '.join(KINDS)}")
    if kind is FeatureDial:
        held.setdefault("units", "raw" if held.get("mode") in PLAIN else units)
    return named(where, lambda: merged(kind, None, held))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise SteersmanError(f"{where} must be text, got {shown(value)}")
    if len(value) > PROMPT_CHARS:
        raise SteersmanError(f"{where} has {len(value):,} characters, and at most {PROMPT_CHARS:,} are read here")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SteersmanError(f"{where} holds half a character (a lone surrogate)") from None
    return value
