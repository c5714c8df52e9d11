"""What there is to play with: what the page asks first."""

from typing import Any

from steersman.lm.chat_spans import PARTS
from steersman.ui.playground import panels
from steersman.ui.playground import state as states
from steersman.ui.playground.engine import PLAYABLE, TOP, Engine
from steersman.version import __version__

SCOPES = {
    "generation": "the tokens that are generated",
    "all": "every token of prompt and text",
    "prompt": "the prompt",
    "last_prompt": "the last token of the prompt",
    "last_prompt+generation": "the tokens whose outputs choose the generated ones",
    "assistant": "what the assistant says",
    "user": "what the user says",
    "last_user": "the user's last message",
    "system": "the system message",
    "thinking": "what the assistant thinks, where its template says so",
}
"""Scopes that the page offers; any other that `Scope.of` reads is taken as well."""
MODE_WORDS = {
    "add": "add the strength, everywhere in the scope",
    "clamp": "set the activation to the strength",
    "floor": "raise the activation to the strength where it is below",
    "cap": "lower the activation to the strength where it is above",
    "scale": "multiply the activation; 0 takes the feature away",
    "project_out": "take the feature's direction away, by this share",
    "positive_clamp": "set the activation to the strength, counting from 0 where it is negative",
}


def about(engine: Engine, most_waiting: int) -> dict[str, Any]:
    """The model, the SAE, what an intervention may say, and the limits."""
    sae = engine.sae
    return {
        "version": __version__,
        "model": engine.lm.name,
        "hook": engine.hook,
        "sae": engine.sae_source,
        "d_sae": sae.cfg.d_sae,
        "n_labels": len(engine.labels),
        "has_stats": sae.feature_stats is not None,
        "context_length": engine.lm.context_length,
        "chat": not engine.no_chat,
        "chat_reason": engine.no_chat,
        "units": engine.units,
        "modes": [_mode(engine, name) for name in PLAYABLE],
        "scopes": [{"name": name, "about": SCOPES[name], "chat": name in PARTS} for name in SCOPES],
        "vectors": [
            panels.vector_record(name, known.vector, known.path is None) for name, known in list(engine.vectors.items())
        ],
        "effects": engine.effects is not None,
        "decompose_methods": panels.DECOMPOSE,
        "limits": {
            "max_new_tokens": states.MAX_NEW_TOKENS,
            "prompt_chars": states.PROMPT_CHARS,
            "messages": states.MESSAGES,
            "features": states.INTERVENTIONS,
            "watch": states.WATCHED,
            "dose_strengths": panels.STRENGTHS,
            "queue": most_waiting,
            "top": TOP,
        },
        "defaults": {
            "mode": "add",
            "units": engine.default_units,
            "scope": "generation",
            "strength": 1.0,
            "generation": states.State().record()["generation"],
            "strengths": [0, 0.25, 0.5, 1, 1.5, 2, 3],
        },
    }


def _mode(engine: Engine, name: str) -> dict[str, Any]:
    units = ["raw"] if name in states.PLAIN else engine.units
    return {"name": name, "units": units, "about": MODE_WORDS[name]}
