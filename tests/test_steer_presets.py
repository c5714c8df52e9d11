"""Presets: every system is listed whole, is built from what it needs, and says in one line what is missing."""

import json
import re
from typing import Any

import pytest
import torch
from support.tiny_models import toy_sae, with_text

from steersman import LanguageModel, SteersmanError
from steersman.steer import PRESETS, Annotated, AnnotationTable, Preset, contrast, preset, steered
from steersman.steer.analysis.thresholds import find_condition, percentile_limits
from steersman.steer.decoding import FunctionCritic
from steersman.steer.presets import Decoder
from steersman.steer.presets.base import CODE, NOTES, PAPER, REIMPLEMENTED
from steersman.steer.scores.reading import labelled_sides

HOOK = "blocks.1.hook_resid_post"
YES = [f"w{i} w40 w{i + 2}" for i in range(5, 17)]
NO = [f"w{i} w50 w{i + 2}" for i in range(5, 17)]
ANSWERS = [(f"w{i} w{i + 1}", " w40") for i in range(5, 13)], [(f"w{i} w{i + 1}", " w50") for i in range(5, 13)]


def sae() -> Any:
    made = toy_sae(HOOK)
    with torch.no_grad():
        made.b_enc += 0.5
    return made


def needs(lm: LanguageModel) -> dict[str, dict[str, Any]]:
    """What each preset is built from here."""
    batch = lm.encode(YES[:2])
    states = lm.capture(batch.input_ids, batch.attention_mask, hooks=[HOOK])[HOOK]
    active = int(sae().encode(states.flatten(0, 1)).mean(0).argmax())
    axis = contrast(lm, YES, NO, hook=[HOOK, "blocks.2.hook_resid_post"], diagnostics=False)
    return {
        "cast": {"condition": find_condition(lm, YES, NO, n_null=1), "vector": axis},
        "capping": {"axis": axis, "limits": percentile_limits(lm, YES, axis, 75)},
        "swfc": {"examples": (YES, NO)},
        "sttp": {"examples": (YES, NO)},
        "stmp": {"examples": (YES, NO)},
        "mean_matching": {"examples": (YES, NO)},
        "mimic": {"examples": (YES, NO)},
        "leace": {"examples": (YES, NO)},
        "iti": {"examples": (YES, NO), "k": 2},
        "function_vector": {"prompts": YES, "heads": [(0, 1), (1, 0)]},
        "pasta": {"prompts": YES[:2], "spans": ["w40", "w40"]},
        "auto_pasta": {
            "prompts": YES[:2],
            "contexts": YES[:2],
            "questions": ["w3", "w3"],
            "max_new_tokens": 4,
            "threshold": 0.0,
        },
        "llm_steer": {"prompts": YES[:2], "contexts": YES[:2], "k": 2},
        "steer_experts": {"base": lm, "negative": "w40"},
        "negative_prompt": {"negative": "w40"},
        "classifier_free_guidance": {"unconditional": "w40"},
        "vista_tokens": {},
        "dac": {"properties": axis},
        "east": {"decisions": [{"text": t, "weight": i % 3, "group": f"e{i // 4}"} for i, t in enumerate(YES)]},
        "icv": {"examples": (YES, NO)},
        "vti_text": {"examples": (YES, NO), "read_at_site": False},
        "vista_context": {"examples": (YES[:1], NO[:1])},
        "safety_vector": {"examples": (NO, YES)},
        "style_vectors": {"styles": {"a": YES, "b": NO}, "style": "a"},
        "code_types": {"examples": (YES, NO)},
        "ta2": {"examples": (YES, NO)},
        "concept_shift": {"tuned": _tuned(), "texts": YES + NO, "k": 2},
        "reliable_evaluation": {"arms": {"v": axis}, "items": [("w5 w6", " w40", " w50")]},
        "ssv": {"examples": ANSWERS, "epochs": 1},
        "reft_r1": {"examples": ANSWERS, "epochs": 1},
        "bipo": {"examples": ANSWERS, "epochs": 1},
        "latent_steering": {"examples": (YES[:2], NO[:2]), "steps": 2},
        "style_vectors_trained": {"examples": (YES[:2], NO[:2]), "steps": 2},
        "psr": {"prompts": YES[:4], "instruction": "w40 ", "max_new_tokens": 3, "epochs": 2},
        "sae_ssv": {"sae": sae(), "examples": (YES, NO)},
        "smc": {"mask": r"( w[0-9]+)*", "n": 2},
        "fk": {"reward": lambda texts: [float("w40" in t) for t in texts], "n": 2, "every": 1},
        "critic_control": {"critic": FunctionCritic(lambda prefixes: [1.0] * len(prefixes))},
        "darwin": {"reward": lambda texts: [float(len(t)) for t in texts], "mutate": lambda i, n, seed: [i] * n},
        "best_of_n": {"reward": lambda texts: [float("w40" in t) for t in texts], "n": 2},
        "lf_steering": {"sae": sae(), "examples": (YES, NO)},
        "scar": {"sae": sae(), "feature": active},
        "feature_flow": {
            "saes": [toy_sae("blocks.0.hook_resid_post"), sae()],
            "feature": (HOOK, active),
        },
        "output_centric": {"sae": sae(), "features": [3, 5]},
        "personality": {"sae": sae(), "features": [3, 5], "strength": 2.0},
        "output_score": {"sae": sae(), "candidates": [1, 2, 3], "units": "raw"},
        "corrsteer": {"saes": sae(), "rewarded": labelled_sides(lm, YES, NO), "scale": 4.0},
        "safety_arithmetic": {"tuned": _tuned(), "base": with_text("llama")},
        "soteria": {"tuned": _tuned(), "base": with_text("llama"), "heads": [(1, 0)]},
    }


def _tuned() -> LanguageModel:
    lm = with_text("llama")
    with torch.no_grad():
        for p in lm.model.parameters():
            p += 0.01 * torch.randn_like(p)
    return lm


def test_every_preset_is_listed_whole() -> None:
    known = (CODE, NOTES, PAPER, REIMPLEMENTED)
    for name, one in PRESETS.items():
        assert isinstance(one, Preset)
        assert name == one.name
        assert one.title
        assert one.mechanism
        assert one.source
        assert "arXiv" in one.source or name == "best_of_n", name
        assert any(text in one.certainty for text in known) or "closed form" in one.certainty, name
        assert one.available or one.not_covered
        for need in one.needs.values():
            assert need.what
            assert need.how
        json.dumps(one.record(), allow_nan=False)
        if one.available:
            assert set(one.needs) <= set(one.arguments()), name


def test_presets_are_built_and_steer(lm: LanguageModel) -> None:
    batch = lm.encode(YES[:2])
    plain = lm.logits(batch.input_ids, batch.attention_mask)
    given_to = needs(lm)
    built = {name for name, one in PRESETS.items() if one.available} - {"protein_features"}
    assert built == set(given_to), "every preset is built here"
    for name, given in given_to.items():
        one = preset(name)
        if one.needs:
            with pytest.raises(SteersmanError) as error:
                one.build(lm)
            assert str(error.value).startswith(f"preset {name!r} needs {next(iter(one.needs))}, "), name
            assert all(need.how in str(error.value) for need in one.needs.values())
        with pytest.raises(SteersmanError, match="setting 'skale'"):
            one.build(lm, **given, skale=1)
        made = one.build(lm, **given)
        if one.makes == "edits":
            with steered(made, lm):
                changed = lm.logits(batch.input_ids, batch.attention_mask)
            assert not torch.equal(changed, plain), name
            with steered(made, lm, scale=0.0):
                assert torch.equal(lm.logits(batch.input_ids, batch.attention_mask), plain), name
            assert made.method in (name, one.name, getattr(one, "method", name)) or name == "iti", name
            assert re.search(r"[0-9.]{9,}", made.metadata["source"])[0] in one.source, name  # pyright: ignore
        elif isinstance(made, Decoder):
            if name == "darwin":
                assert made("w5 w6", max_new_tokens=2, iterations=1, variants=1, beams=2).best
                continue
            shown = made(YES[:1], max_new_tokens=3)
            found = shown[0] if isinstance(shown, list) else getattr(shown, "generation", shown)
            assert found.texts[0].startswith(YES[0]), name
        elif hasattr(made, "__enter__"):
            with made:
                assert not torch.equal(lm.logits(batch.input_ids, batch.attention_mask), plain), name
            assert torch.equal(lm.logits(batch.input_ids, batch.attention_mask), plain), name


def test_protein_features_are_a_table_of_annotations(lm: LanguageModel) -> None:
    words = [f"w{i} w40 w{j} w50" for i in range(5, 15) for j in range(20, 30)]
    annotated = [
        Annotated(tokens=tuple(lm.token_ids(text, bos=True)), annotations={"site": [i == 2 for i in range(5)]})
        for text in words
    ]
    made = preset("protein_features").build(lm, sae=sae(), annotated=annotated, min_tokens=10)
    assert isinstance(made, AnnotationTable)


def test_what_is_not_covered_says_so(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match="cannot be built: it needs an environment with a judge"):
        preset("dialogue_action_tokens").build(lm)
    with pytest.raises(SteersmanError, match="unknown preset 'scarr'.*the nearest is 'scar'"):
        preset("scarr")
