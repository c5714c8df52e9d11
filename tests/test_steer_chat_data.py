"""Conversations as the material of vectors, budgets, evaluations and effects: the answer by the template."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_toys import chat_model, talk

from steersman import LanguageModel, Steerer, SteeringVector, collect_effects, evaluate_steering
from steersman.conversations import ChatOptions
from steersman.errors import SteersmanError
from steersman.sae import SAE, SAEConfig
from steersman.steer.calibrate import calibrate
from steersman.steer.evaluation.forced import as_continuations, likelihoods
from steersman.steer.evaluation.rollouts import unsteered
from steersman.steer.methods import contrast, read_examples
from steersman.steer.methods.examples import as_chats, as_examples

HOOK = "blocks.1.hook_resid_post"
PROMPTS = [talk(f"w{i}") for i in range(4)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return chat_model("llama3")


def state(lm: LanguageModel, messages: Any, token: str) -> torch.Tensor:
    """The state at the one token of this word in a conversation, read by itself."""
    batch = lm.encode_chat(messages)
    words = lm.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    return lm.capture(batch, hooks=HOOK)[HOOK][0, words.index(token)]


def test_the_answer_is_read_at_its_own_tokens(lm: LanguageModel) -> None:
    """Not at the end token or line break that a template writes behind it."""
    pairs = [((prompt, "w20"), (prompt, "w21")) for prompt in PROMPTS]
    sides = [[p for p, _ in pairs], [n for _, n in pairs]]
    v = contrast(lm, *sides, hook=HOOK, method="caa", diagnostics=False)
    difference = [
        state(lm, [*p, {"role": "assistant", "content": "w20"}], "w20")
        - state(lm, [*p, {"role": "assistant", "content": "w21"}], "w21")
        for p in PROMPTS
    ]
    assert torch.allclose(v.directions[HOOK], torch.stack(difference).mean(0), atol=1e-4)
    assert v.metadata["chat_template"] == lm.template_digest
    last = contrast(lm, *sides, hook=HOOK, method="caa", positions="last", diagnostics=False)
    assert torch.allclose(last.directions[HOOK], v.directions[HOOK])  # one token long
    whole = [[[*prompt, {"role": "assistant", "content": text}] for prompt in PROMPTS] for text in ("w20", "w21")]
    assert contrast(lm, *whole, hook=HOOK, method="caa", diagnostics=False).directions[HOOK].equal(v.directions[HOOK])


def test_an_unanswered_conversation_is_read_where_the_answer_would_begin(lm: LanguageModel) -> None:
    v = contrast(lm, PROMPTS[:2], PROMPTS[2:], hook=HOOK, method="caa", positions="last", diagnostics=False)
    batch = lm.encode_chat(PROMPTS)
    h = lm.capture(batch, hooks=HOOK)[HOOK][:, -1]
    assert torch.allclose(v.directions[HOOK], (h[:2] - h[2:]).mean(0), atol=1e-4)
    plain = contrast(lm, ["w1 w2"], ["w3 w4"], hook=HOOK, diagnostics=False)
    assert "chat_template" not in plain.metadata


def test_thinking_is_no_part_of_the_answer() -> None:
    lm = chat_model("qwen3")
    row = lm.encode_chat(talk("w1", "<think> w2 w3 </think> w4 w5")).spans.conversations[0]
    first, last = row.answer()
    assert lm.tokenizer.convert_ids_to_tokens(row.ids[first:last]) == ["w4", "w5"]


def test_examples_of_conversations_in_a_file(tmp_path: Path) -> None:
    lines = [
        {"prompt": PROMPTS[0], "positive": "w20", "negative": "w21"},
        {"positive": talk("w1", "w2"), "negative": talk("w1", "w3")},
        {"messages": talk("w1"), "label": "positive"},
        {"messages": talk("w1", "w2"), "label": False},
    ]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_examples(tmp_path / "e.jsonl")
    assert [e.text for e in found.positive] == [talk("w0", "w20"), talk("w1", "w2"), talk("w1")]
    assert [(e.prompt, e.answer) for e in found.negative] == [
        (PROMPTS[0], "w21"), (talk("w1"), "w3"), (talk("w1"), "w2"),
    ]  # fmt: skip
    assert found.positive[2].prompt == ""


def test_texts_become_messages_and_answers_the_assistants() -> None:
    given = as_examples(["w1", ("w2 ", " w3")], "positive")
    from steersman.steer.methods import Examples

    found = as_chats(Examples(positive=given, negative=[]), ChatOptions(system="w0")).positive
    assert found[0].text == talk("w1", system="w0")
    assert found[1].text == talk("w2 ", "w3", system="w0")
    assert found[1].prompt == talk("w2 ", system="w0")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((talk("w1", "w2"), "w3"), "its prompt ends with the assistant's message"),
        ((talk("w1"), " "), "has an empty answer"),
        ([{"role": "user"}], "neither a text nor a conversation"),
    ],
)
def test_examples_that_are_none(entry: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=f"positive example 0.*{message}"):
        as_examples([entry], "positive")


def test_answers_that_are_cut_off_or_missing(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match="its answer goes on beyond max_length"):
        contrast(lm, [talk("w1", "w2")], [talk("w1", "w3")], hook=HOOK, method="caa", max_length=6)
    with pytest.raises(SteersmanError, match="reads the answer to a prompt"):
        contrast(lm, [talk("w1")], [talk("w2")], hook=HOOK, method="caa")


def test_optimised_completions_are_the_assistants(lm: LanguageModel) -> None:
    v = contrast(lm, [(p, "w20") for p in PROMPTS], (), hook=HOOK, method="optimised", steps=3)
    assert v.metadata["loss"] <= v.metadata["loss_unsteered"]


def test_a_budget_on_conversations_in_a_chat_scope(lm: LanguageModel) -> None:
    v = SteeringVector(directions={HOOK: torch.linspace(-1, 1, 16)}, model_name=lm.name, method="test")
    talks = [talk(f"w{i} w{i + 1}", "w5 w6") for i in range(6)]
    found = calibrate(v, lm, texts=talks, target_kl=0.02, scope="user", max_length=64)
    assert found.search.converged
    assert found.vector.metadata["calibration"]["chat_template"] == lm.template_digest
    everywhere = calibrate(v, lm, texts=talks, target_kl=0.02, scope="all", max_length=64)
    assert everywhere.search.scale != found.search.scale
    with pytest.raises(SteersmanError, match="scope 'user' needs to know"):
        calibrate(v, lm, texts=["w1 w2 w3"], target_kl=0.05, scope="user")


def test_likelihoods_of_replies(lm: LanguageModel) -> None:
    """log p of the reply's tokens given the prompt with its header, and nothing of what follows."""
    items = as_continuations([(prompt, "w5 w6", "w7") for prompt in PROMPTS])
    logp, counts = likelihoods(lm, items, unsteered, 3)
    assert counts.tolist() == [[2.0, 1.0]] * 4
    batch = lm.encode_chat(PROMPTS[:1])
    reply = lm.tokenizer.convert_tokens_to_ids("w7")
    expected = lm.logits(batch)[0, -1].log_softmax(-1)[reply]
    assert logp[0, 1] == pytest.approx(float(expected), abs=1e-4)


def test_an_evaluation_of_conversations(lm: LanguageModel) -> None:
    v = SteeringVector(directions={HOOK: torch.linspace(-1, 1, 16)}, model_name=lm.name, method="test")
    found = evaluate_steering(
        lm, v, PROMPTS, scale=(1.0,), max_new_tokens=4, scope="assistant", prompt_prefix="w9 ", words=["w5"],
        texts=[talk("w1", "w2")], continuations=[(PROMPTS[0], "w5", "w6")], temperature=0.0, samples=1,
    )  # fmt: skip
    assert found.prompts[0].startswith("<s> <|header|> user")
    assert {"vector", "random", "prompt", "unsteered"} <= set(found.arms)
    assert json.loads(json.dumps(found.prompts)) == found.prompts


def test_effects_of_texts_as_messages(lm: LanguageModel) -> None:
    sae = SAE(SAEConfig(d_in=16, d_sae=8, k=2, hook_name=HOOK, model_name=lm.name), torch.Generator().manual_seed(0))
    how: dict[str, Any] = {
        "prompts": ("w1", "w2"), "n_vectors": 2, "rollouts": 4, "new_tokens": 3, "scale_rule": "norm",
        "scale_target": 1.0, "top_k": None, "top_p": None, "shard_vectors": 2,
    }  # fmt: skip
    plain, chats = collect_effects(lm, sae, **how), collect_effects(lm, sae, **how, chat=True)
    assert chats.manifest.settings["chat_template"] == lm.template_digest
    assert "chat" not in plain.manifest.settings
    assert "chat_template" not in plain.manifest.settings
    assert not torch.equal(plain.baseline.mean, chats.baseline.mean)


def test_a_steered_report_over_conversations(lm: LanguageModel) -> None:
    with Steerer(lm).vector(torch.ones(16), hook=HOOK, scope="assistant") as context:
        text = lm.chat(PROMPTS, max_new_tokens=3, eos_token_id=None)
        made = context.trace.count
    with Steerer(lm).vector(torch.ones(16), hook=HOOK, scope="assistant") as context:
        lm.logits(text.batch, prompt_length=text.prompt_length)
    assert context.trace.count == made + len(PROMPTS)  # the last token is read here
