"""What a state of the panel means: the steering that it opens, and the text that comes of it.

Everything goes through the public objects, so a state does exactly what the Python of `sharing.python_of` does: one
`Steerer` context for each intervention, in order, and `LanguageModel.stream`, which makes the tokens of `generate`.

Shape letters: S tokens, D width, K active latents a token.
"""

import contextvars
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.lm.activations import token_texts
from steersman.lm.generate import end_tokens
from steersman.lm.origin import check_sae_fits
from steersman.lm.tokens import TokenBatch, bos_tokens
from steersman.sae import SAE, FeatureLabels, SparseCode
from steersman.steer import EffectMap, Steerer, SteeringVector
from steersman.steer.edits.feature import MODES, UNITS
from steersman.steer.edits.rules import RULES
from steersman.steer.scope import Scope
from steersman.steer.steering import Steering
from steersman.ui.playground.queue import Event
from steersman.ui.playground.state import Dial, FeatureDial, State, named

SIDES = ("steered", "plain")
TOP = 5
"""Strongest features told of every token, beside the watched ones."""
PLAIN_TEXTS = 16
"""Plain texts that are kept, to be told again beside other steered ones; the oldest goes first."""
MADE_VECTORS = 64
"""Vectors made here that are kept; the oldest goes first."""
LONGEST_NAME = 60
"""Longest name of one that says its targets."""
PLAYABLE = tuple(mode for mode in MODES if mode not in RULES or not RULES[mode].thresholds)
"""Modes that need nothing but a strength."""

Stopped = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class KnownVector:
    """A vector that interventions may name."""

    vector: SteeringVector
    """The vector."""
    path: Path | None
    """Its file; None for one that was made here."""
    made_of: Mapping[int, float] = field(default_factory=dict)
    """The targets of one that was made here."""


@dataclass(kw_only=True)
class Engine:
    """One model, one SAE, and what the panel may use beside them."""

    lm: LanguageModel
    """The model."""
    sae: SAE
    """The SAE, of one of its hook points."""
    model_source: str = ""
    """Folder or hub id that the model was loaded from."""
    sae_source: str = ""
    """Folder, file or hub id of the SAE."""
    load_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `LanguageModel.load` that were not its defaults."""
    given_hook: str | None = None
    """Hook point of an SAE that records none."""
    vectors: dict[str, KnownVector] = field(default_factory=dict)
    """By name."""
    effects: EffectMap | None = None
    """The effect map of the SAE."""
    effects_source: str = ""
    """Folder or file of the map."""

    def __post_init__(self) -> None:
        self.sae.check_residual("the playground")
        self.lm.check_decoder()
        self.hook = check_sae_fits(self.lm, self.sae, self.given_hook)
        self.steerer = Steerer(self.lm)
        self._plain: dict[str, list[Event]] = {}
        if self.effects is not None:
            self.effects.check_sae(self.sae)
        for known in self.vectors.values():
            self.steerer.vector(known.vector)  # refuses what does not fit

    def add_vector(self, path: Path) -> str:
        """Load a vector from a file; its name is that of the file. Raises SteersmanError where the name is taken."""
        name = path.stem
        if name in self.vectors and self.vectors[name].path != path.resolve():
            raise SteersmanError(f"two vectors are called {name!r}: rename one of the files")
        vector = SteeringVector.load(path)
        self.steerer.vector(vector)
        self.vectors[name] = KnownVector(vector=vector, path=path.resolve())
        return name

    def keep_vector(self, vector: SteeringVector, targets: Mapping[int, float]) -> str:
        """Keep a vector that was made here, and give the name that it has now; the same targets have the same."""
        name = "target-" + "+".join(f"{j}x{weight!r}" for j, weight in targets.items())
        if len(name) > LONGEST_NAME:
            name = f"target-{len(targets)}-features-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
        while name in self.vectors and self.vectors[name].path is not None:
            name += "-made"
        made = [known for known, one in self.vectors.items() if one.path is None and known != name]
        for oldest in made[: max(0, len(made) + 1 - MADE_VECTORS)]:
            del self.vectors[oldest]
        self.vectors[name] = KnownVector(vector=vector, path=None, made_of=dict(targets))
        return name

    def vector(self, name: str) -> KnownVector:
        """A vector by its name."""
        known = self.vectors.get(name)
        if known is None:
            have = ", ".join(self.vectors) or "none"
            raise SteersmanError(f"no vector {name[:100]!r} here; there are: {have}")
        return known

    @property
    def labels(self) -> FeatureLabels:
        """Names of features: those of the SAE."""
        return self.sae.labels

    @property
    def units(self) -> list[str]:
        """Units that strengths of this SAE's features can have."""
        stats = self.sae.feature_stats
        if stats is None:
            return ["raw"]
        usable = {
            "raw": True,
            "max_act": True,
            "norm_frac": stats.median_norm > 0 and self.sae.cfg.input_norm == "none",
        }
        return [name for name in UNITS if usable[name]]

    @property
    def default_units(self) -> str:
        """`max_act` where it is known, so that 1 means as much for every feature."""
        return "max_act" if "max_act" in self.units else "raw"

    @property
    def no_chat(self) -> str:
        """Why there is no chat; empty where there is."""
        if self.lm.template_digest is not None:
            return ""
        return f"{self.lm.name} has no chat template, so it continues texts alone"

    def check(self, state: State) -> None:
        """Raise SteersmanError, naming the intervention, for what this model and SAE cannot do."""
        if state.is_chat and self.no_chat:
            raise SteersmanError(self.no_chat)
        for i, feature in enumerate(state.watch):
            named(f"state.watch[{i}]", lambda feature=feature: self.sae.check_feature(feature))
        for i, dial in enumerate(state.interventions):
            named(f"state.interventions[{i}]", lambda dial=dial: self._check_dial(dial, state.is_chat))
        self.steerings(state)

    def _check_dial(self, dial: Dial, chat: bool) -> None:
        scope = Scope.of(dial.scope)
        if not chat and any(one.part is not None for one in (scope, *scope.parts)):
            raise SteersmanError(f"scope {dial.scope!r} is a part of a chat, and this is a text to continue")
        if isinstance(dial, FeatureDial):
            if dial.mode not in PLAYABLE:
                raise SteersmanError(f"mode {dial.mode[:40]!r} is none of {', '.join(PLAYABLE)}")
            self.sae.check_feature(dial.id)
        self._opened([dial])

    def steerings(self, state: State, varied: tuple[int, Sequence[float]] | None = None) -> list[Steering]:
        """The contexts of the interventions, in order, not yet entered; `varied` names one of them and its strengths,
        one for each row of the batch."""
        index, strengths = varied or (-1, ())
        found, place = [], 0
        for group in groups(state.interventions):
            inside = range(place, place + len(group))
            found.append(self._opened(group, index - place if index in inside else None, strengths))
            place += len(group)
        return found

    def _opened(self, group: Sequence[Dial], varied: int | None = None, strengths: Sequence[float] = ()) -> Steering:
        first = group[0]
        where: dict[str, Any] = {"scope": first.scope, "include_bos": first.include_bos}
        if not isinstance(first, FeatureDial):
            scale = first.strength if varied is None else list(strengths)
            return self.steerer.vector(self.vector(first.name).vector, scale=scale, **where)
        features = {dial.id: dial.strength for dial in group if isinstance(dial, FeatureDial)}
        if varied is not None:
            moved = list(features)[varied]
            features = [{**features, moved: strength} for strength in strengths]
        how = {"mode": first.mode, "units": first.units, "hook": self.given_hook}
        return self.steerer.features(self.sae, features, **how, **where)

    def encode(self, prompt: Any) -> TokenBatch:
        """A text or a chat as the model reads it: one row, left-padded."""
        return self.lm.encode([prompt], padding_side="left")

    def generate(self, state: State, sides: Sequence[str], stopped: Stopped) -> Iterator[Event]:
        """The events of `sides`, which take turns token by token: see the page's API.

        The plain text of a prompt is written once: while only interventions change, it is told again.
        """
        plain = _plain_key(state)
        if "plain" in sides and plain in self._plain:
            yield from self._plain[plain]
            sides = [side for side in sides if side != "plain"]
        batch = self.encode(state.prompt)
        self.lm.check_room(batch.input_ids.shape[1], state.generation.max_new_tokens)
        runs: list[SideRun] = []
        told: list[Event] = []
        try:
            for side in sides:
                runs.append(SideRun(self, state, side, batch))
            going = list(runs)
            while going and not stopped():
                for run in list(going):
                    for event in run.step():
                        told += [event] if run.side == "plain" else []
                        yield event
                    if run.reason:
                        going.remove(run)
                        if run.side == "plain":
                            self._keep_plain(plain, told)
                    if stopped():
                        break
            for run in going:
                yield run.end("stopped")
        finally:
            for run in runs:
                run.close()

    def _keep_plain(self, key: str, told: Sequence[Event]) -> None:
        """Keep what was told of a plain text that came to its end, without its speed."""
        *before, end = told
        self._plain[key] = [*before, Event(end.name, {**end.data, "tokens_per_second": None})]
        while len(self._plain) > PLAIN_TEXTS:
            self._plain.pop(next(iter(self._plain)))

    def code(self, states: Tensor) -> SparseCode:
        """The active features of states [S, D]."""
        return self.sae.encode_sparse(states.to(self.sae.device).float())

    def token_features(self, code: SparseCode, watch: Sequence[int], top: int = TOP) -> list[list[dict[str, Any]]]:
        """Of each token's code the watched features, also those that are 0, and the `top` strongest others."""
        found = []
        for values, indices in zip(code.values.tolist(), code.indices.tolist()):
            active = {j: value for value, j in zip(values, indices) if abs(value) > 0}
            strongest = sorted((j for j in active if j not in watch), key=lambda j: -abs(active[j]))[:top]
            found.append([self._feature(j, active.get(j, 0.0), True) for j in watch])
            found[-1] += [self._feature(j, active[j], False) for j in strongest]
        return found

    def _feature(self, feature: int, value: float, watched: bool) -> dict[str, Any]:
        return {"id": feature, "value": value, "label": self.labels.text(feature), "watched": watched}


def groups(dials: Sequence[Dial]) -> Iterator[list[Dial]]:
    """The interventions as edits: neighbouring features of one mode, units and scope are one, as in the command line.
    Raises SteersmanError for a feature that is twice in one."""
    group: list[Dial] = []
    for dial in dials:
        last = group[-1] if group else None
        if isinstance(dial, FeatureDial) and isinstance(last, FeatureDial) and last.place == dial.place:
            if any(isinstance(other, FeatureDial) and other.id == dial.id for other in group):
                raise SteersmanError(f"feature {dial.id} is turned twice in the same mode, units and scope: keep one")
            group.append(dial)
            continue
        if group:
            yield group
        group = [dial]
    if group:
        yield group


class SideRun:
    """One side of the page: a stream of tokens, the steering it is under, and the states at the SAE's hook point.

    Its contexts are open in a context of execution of its own, so that the other side's passes know nothing of them.
    """

    def __init__(self, engine: Engine, state: State, side: str, batch: TokenBatch) -> None:
        self.engine, self.state, self.side, self.batch = engine, state, side, batch
        self.reason = ""
        """Why it ended; empty while it goes on."""
        self._states: list[Tensor] = []
        self._texts: list[str] = []
        self._seconds = 0.0
        self._open = ExitStack()
        self._context = contextvars.copy_context()
        self._stream = engine.lm.stream(batch, **state.generation.settings())
        self._stops = set(end_tokens(engine.lm, {}))
        self._context.run(self._enter)

    def _enter(self) -> None:
        if self.side == "steered":
            for steering in self.engine.steerings(self.state):
                self._open.enter_context(steering)
        self._open.enter_context(self.engine.lm.edit(self.engine.hook, self._read))  # last: it sees what edits leave

    def _read(self, h: Tensor, _fwd: ForwardPass) -> Tensor:
        self._states.append(h[0].detach().clone())
        return h

    def step(self) -> Iterator[Event]:
        """The events of the next token."""
        start = time.perf_counter()
        token = self._context.run(next, self._stream, None)
        if token is None:
            raise SteersmanError("the model stopped writing before its last token")
        index = len(self._texts)
        self._seconds += time.perf_counter() - start
        self._texts.append(token.text)
        if index == 0:
            yield Event("prompt", {"side": self.side, "tokens": self._prompt(self._states.pop(0))})
        yield Event("token", {"side": self.side, "index": index, "id": token.token, "text": token.text})
        if index > 0:
            yield self._features(index - 1, self._states.pop(0))
        if token.finished:
            self._context.run(next, self._stream, None)  # to its end, so that its thread is gone
            stop = token.token in self._stops
            if not stop:
                yield self._features(index, self._context.run(self._last_state))
            yield self.end("stop" if stop else "length")

    def end(self, reason: str) -> Event:
        """End it, and the event that says so."""
        self.reason = reason
        text, seconds = "".join(self._texts), self._seconds
        speed = len(self._texts) / seconds if seconds > 0 else None
        return Event("end", {"side": self.side, "reason": reason, "text": text, "tokens_per_second": speed})

    def close(self) -> None:
        """Leave nothing on the model."""
        self._stream.close()
        self._context.run(self._open.close)

    def _prompt(self, states: Tensor) -> list[dict[str, Any]]:
        """The tokens of the prompt. The BOS has no features: it is an attention sink in most models."""
        engine, batch = self.engine, self.batch
        ids = batch.input_ids[0].tolist()
        features = engine.token_features(engine.code(states), self.state.watch)
        is_bos = bos_tokens(batch.input_ids, batch.attention_mask, engine.lm.bos_token_id)[0].tolist()
        shown = [[] if bos else found for bos, found in zip(is_bos, features)]
        return described(engine, ids, token_texts(engine.lm.tokenizer, ids), shown)

    def _features(self, index: int, state: Tensor) -> Event:
        found = self.engine.token_features(self.engine.code(state[-1:]), self.state.watch)[0]
        return Event("features", {"side": self.side, "index": index, "features": found})

    @torch.no_grad()
    def _last_state(self) -> Tensor:
        """The state of the last token, which no pass has read: from one over the whole text, where it is steered as
        it would be if more followed."""
        text = self._stream.generation
        assert text is not None
        read = self.engine.lm.capture(text.batch, hooks=self.engine.hook, prompt_length=text.prompt_length)
        return read[self.engine.hook][0]


def _plain_key(state: State) -> str:
    """What a plain text follows from."""
    record = state.record()
    return json.dumps({name: record[name] for name in record if name != "interventions"})


def described(
    engine: Engine, ids: Sequence[int], texts: Sequence[str], features: Sequence[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Tokens with their texts and features, as the page shows them."""
    special = set(engine.lm.tokenizer.all_special_ids)
    rows = zip(ids, texts, features)
    return [{"id": j, "text": text, "special": j in special, "features": found} for j, text, found in rows]
