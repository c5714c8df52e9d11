"""Training on conversations: what counts is the assistant's last message, where the template writes it."""

from typing import Any

import pytest
import torch
from support.chat_toys import chat_model, talk

from steersman.lm import LanguageModel
from steersman.steer import contrast, edit_from_examples, prompted_answers, psr
from steersman.steer.methods import as_examples
from steersman.steer.training import TrainEditConfig
from steersman.steer.training.targets import completion, paired_targets

HOOK = "blocks.1.hook_resid_post"
PROMPTS = [talk("w1 w2 w3"), talk("w4"), talk("w5 w6", "w7", "w8")]
POSITIVE = [(p, a) for p, a in zip(PROMPTS, ("w20 w21", "w22", "w23 w24 w25"))]
NEGATIVE = [(p, a) for p, a in zip(PROMPTS, ("w10", "w11 w12", "w13"))]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return chat_model("chatml")


def test_the_answer_and_the_token_that_ends_it_count(lm: LanguageModel) -> None:
    for i, example in enumerate(as_examples(POSITIVE, "positive")):
        target = completion(lm, example, "an example")
        words = lm.tokenizer.convert_ids_to_tokens(target.ids)
        assert words[target.start :] == [*POSITIVE[i][1].split(), "<|im_end|>"]
        assert words[target.start - 2 : target.start] == ["<|im_start|>", "assistant"]


def test_one_answer_behind_two_conversations(lm: LanguageModel) -> None:
    mine, theirs = paired_targets(lm, talk("w1"), talk("w1", system="w9 w9 w9"), "w20 w21", "an answer")
    assert mine.ids[mine.start :] == theirs.ids[theirs.start :] == lm.token_ids("w20 w21")
    assert mine.ids[: mine.start] == lm.token_ids(talk("w1"), bos=True)
    assert theirs.ids[: theirs.start] == lm.token_ids(talk("w1", system="w9 w9 w9"), bos=True)


@pytest.mark.parametrize("method", ["ssv", "reft_r1", "bipo", "latent", "optimised", "caa"])
def test_vectors_from_conversations(lm: LanguageModel, method: str) -> None:
    options: dict[str, Any] = {"steps": 10} if method in ("latent", "optimised") else {"epochs": 3, "lr": 0.05}
    v = contrast(lm, POSITIVE, NEGATIVE, hook=HOOK, method=method, **options)
    assert v.norm() > 0
    if method != "caa":
        assert v.metadata["loss"] < v.metadata["loss_unsteered"]


def test_steps_of_a_conversation(lm: LanguageModel) -> None:
    """Step 0 is the last token before the answer."""
    v = contrast(lm, POSITIVE, NEGATIVE, hook=HOOK, table=2)
    assert v.directions[HOOK][0].equal(torch.zeros(16)), "the prompts are the same"
    assert v.directions[HOOK][1].norm() > 0


@pytest.mark.parametrize("loss", ["imitation", "likelihood"])
def test_a_system_message_is_learnt(lm: LanguageModel, loss: Any) -> None:
    items = prompted_answers(lm, PROMPTS, "w9 w9 w29", max_new_tokens=4, do_sample=True, seed=0)
    assert items[0].teacher[0] == {"role": "system", "content": "w9 w9 w29"}
    made = psr(lm, items, hook=HOOK, loss=loss, config=TrainEditConfig(lr=0.02, epochs=10, batch_size=3))
    assert made.metadata["loss"] < made.metadata["loss_unsteered"]
    named = edit_from_examples(lm, POSITIVE, hook=HOOK, method="psr", instruction="w9", lr=0.01, epochs=3)
    assert named.metadata["loss"] < named.metadata["loss_unsteered"]
