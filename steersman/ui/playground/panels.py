"""What the panels beside the text show: activations of a text, dose and response, SAE-TS targets, decompositions.

Shape letters: S tokens, L latents, R rows of the batch (one for each strength).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from steersman.doors import number
from steersman.errors import SteersmanError
from steersman.lm.hooks import LOGITS
from steersman.lm.tokens import TokenBatch
from steersman.sae import SparseCode
from steersman.steer import SteeringVector, decompose, plot_decompositions
from steersman.steer.decompose.base import METHODS
from steersman.steer.edits.feature import feature_rows
from steersman.steer.measures import distinct, repetition_rate, token_kl, token_nll
from steersman.ui.playground.engine import Engine, Stopped, described
from steersman.ui.playground.state import FeatureDial, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRENGTHS = 9
"""Strengths of one dose-response plot at most."""
DOSE_TOKENS = 40
MOST_LOGITS = 1 << 28
"""Logits of one text at most, of which a few tables are held at once: a gigabyte each."""
OTHERS = 8
"""Features beside the targets whose predicted effect is shown."""
DECOMPOSE = tuple(name for name, method in METHODS.items() if not method.reads)
"""Methods that read nothing but the vector and the SAE."""


class NotHereError(SteersmanError):
    """This server was started without what the request needs."""


def activations(engine: Engine, text: Any, watch: Sequence[int], top: int) -> dict[str, Any]:
    """The tokens of a text or chat, as the model reads it unsteered, with their strongest features; of a BOS none."""
    (read,) = engine.lm.activations(engine.sae, [text], hook=engine.given_hook)
    features = engine.token_features(SparseCode(read.values, read.indices), watch, top)
    shown = [found if counted else [] for counted, found in zip(read.counted.tolist(), features)]
    return {"tokens": described(engine, read.token_ids, read.tokens, shown)}


def activating(engine: Engine, text: Any, limit: int) -> dict[str, Any]:
    """The features that a text activates most, the BOS left out: where, how strongly, on how many tokens."""
    (read,) = engine.lm.activations(engine.sae, [text], hook=engine.given_hook)
    return {
        "features": [
            {
                "id": one.feature,
                "label": one.label,
                "value": one.value,
                "token": one.token,
                "mean": float(read.of(one.feature).sum()) / one.n_tokens,
                "count": one.n_tokens,
            }
            for one in read.top(limit)
        ]
    }


def dose(
    engine: Engine, state: State, index: int, strengths: Sequence[float], stopped: Stopped
) -> tuple[list[dict[str, Any]], "Figure"] | None:
    """What each strength of one intervention does, greedily: the text, what it costs, and how strongly the feature
    fires on it as the unsteered model reads it. None where it was stopped."""
    lm, sae, dial = engine.lm, engine.sae, state.interventions[index]
    batch = engine.encode(state.prompt)
    new = min(DOSE_TOKENS, state.generation.max_new_tokens)
    lm.check_room(batch.input_ids.shape[1], new)
    if (batch.input_ids.shape[1] + new) * int(lm.config.vocab_size) > MOST_LOGITS:
        raise SteersmanError(f"a prompt of {batch.input_ids.shape[1]} tokens is too long for a dose-response plot")
    rows = engine.lm.encode([state.prompt] * len(strengths), padding_side="left")
    with ExitStack() as stack:
        for steering in engine.steerings(state, (index, strengths)):
            stack.enter_context(steering)
        stream = stack.enter_context(lm.stream(rows, max_new_tokens=new))
        for _ in stream:
            if stopped():
                return None
    made = stream.generation
    assert made is not None
    found = []
    for r, strength in enumerate(strengths):
        if stopped():
            return None
        tokens = made.tokens[r][made.attention_mask[r].bool()][None]
        spans = None if made.spans is None else batch.spans
        text = TokenBatch(input_ids=tokens, attention_mask=torch.ones_like(tokens), spans=spans)
        length = int(made.prompt_length[r])
        with ExitStack() as stack:
            for steering in engine.steerings(state.varied(index, strength)):
                stack.enter_context(steering)
            forced = lm.logits(text, prompt_length=length)
        plain = lm.capture(text, hooks=[engine.hook, LOGITS])
        written = slice(length - 1, -1)
        kl = token_kl(forced, plain[LOGITS])[0, written]
        nll = token_nll(plain[LOGITS], tokens)[0, length - 1 :]
        ids = tokens[0, length:].tolist()
        response = None
        if isinstance(dial, FeatureDial):
            states = plain[engine.hook][0, length:].to(sae.device).float()
            response = float(sae.encode_features(states, torch.tensor([dial.id], device=sae.device)).mean())
        found.append(
            {
                "strength": strength,
                "kl": float(kl.mean()),
                "nll": float(nll.mean()),
                "repetition": repetition_rate(ids),
                "distinct_2": distinct(ids),
                "activation": response,
                "text": made.completions[r],
            }
        )
    return found, dose_figure(found, dial.units if isinstance(dial, FeatureDial) else "multiples of the vector")


def dose_figure(rows: Sequence[Mapping[str, Any]], unit: str) -> "Figure":
    """Cost and response against strength."""
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["strength"])
    figure = Figure(figsize=(7, 5), layout="constrained")
    cost, response = figure.subplots(2, sharex=True)
    x = [row["strength"] for row in rows]
    cost.plot(x, [row["kl"] for row in rows], marker="o", label="KL from the plain model")
    cost.plot(x, [row["nll"] for row in rows], marker="s", label="loss of the text under the plain model")
    cost.set_ylabel("nats per token")
    if all(row["activation"] is not None for row in rows):
        response.plot(x, [row["activation"] for row in rows], marker="o", color="C2", label="mean activation")
        response.set_ylabel("activation on the text")
        share = response.twinx()
    else:
        share = response
    share.plot(x, [row["repetition"] for row in rows], marker="s", color="C3", label="repeated 4-grams")
    share.set(ylabel="share repeated", ylim=(-0.05, 1.05))
    response.set_xlabel(f"strength ({unit})")
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    figure.legend(handles=lines, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    for axes in (cost, response):
        axes.grid(alpha=0.25)
    return figure


def target(engine: Engine, features: Mapping[int, float]) -> dict[str, Any]:
    """The SAE-TS vector that raises chosen features and little else, kept under a name of its own."""
    effects = engine.effects
    if effects is None:
        raise NotHereError("this server has no effect map: start it with --effects FOLDER, of `steersman effects`")
    for feature in features:
        engine.sae.check_feature(feature)
    weights = feature_rows(features)[0]
    vector = effects.solve(weights)
    engine.steerer.vector(vector)
    name = engine.keep_vector(vector, weights)
    predicted = effects.predict(vector)
    rows = [
        {
            "id": j,
            "label": engine.labels.text(j),
            "weight": weight,
            "predicted": float(predicted[j]),
            "signal": float(effects.signal[j]),
        }
        for j, weight in weights.items()
    ]
    beside = predicted.abs().clone()
    beside[list(weights)] = -1
    others = beside.topk(min(OTHERS, len(beside))).indices.tolist()
    return {
        "vector": vector_record(name, vector, made=True),
        "scale": effects.median_scale,
        "rows": rows,
        "others": [
            {"id": j, "label": engine.labels.text(j), "predicted": float(predicted[j])}
            for j in others
            if j not in weights
        ],
    }


def vector_record(name: str, vector: SteeringVector, made: bool) -> dict[str, Any]:
    """A vector as the panel lists it."""
    norm = vector.norm()
    hooks = list(vector.directions)
    return {"name": name, "hooks": hooks, "norm": norm, "method": vector.method, "made": made}


def taken_apart(engine: Engine, what: SteeringVector, method: str, k: int) -> tuple[dict[str, Any], "Figure"]:
    """A vector as signed features, with the curve of what they explain beside that of random directions."""
    if method not in DECOMPOSE:
        raise SteersmanError(f"method must be one of {', '.join(DECOMPOSE)}")
    texts = {j: label.text for j, label in engine.labels.items()}
    given = {"lm": engine.lm, "labels": texts, "hook": engine.given_hook or ""}
    found = decompose(what, engine.sae, method=method, k=k, **given)
    terms = found.to_dict()["terms"]
    rows = [{"id": row["feature"], **{name: row[name] for name in row if name != "feature"}} for row in terms]
    return {
        "method": found.method,
        "explained_variance": found.explained_variance,
        "cosine": found.cosine,
        "rows": rows,
        "warnings": found.warnings,
    }, plot_decompositions({found.method: found})


def checked_strengths(values: Sequence[Any]) -> list[float]:
    """Strengths as numbers. Raises SteersmanError for none, for one that is no finite number and for one twice."""
    found = [number(value, f"strengths[{i}]") for i, value in enumerate(values)]
    if not found or not all(map(math.isfinite, found)):
        raise SteersmanError("strengths must be finite numbers, at least one")
    if len(set(found)) != len(found):
        raise SteersmanError("strengths hold a number twice")
    return found
