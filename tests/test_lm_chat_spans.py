"""Whose the tokens of a conversation are, token for token, by templates in the shape of the families'."""

from typing import Any

import pytest
import torch
from support.chat_toys import GEMMA2, TEMPLATES, chat_model, talk

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel

MULTI = talk("w1 w2", "w3 w4", "w5", "w6", system="w0")

# template -> a conversation of a system message and two rounds: each token with its role and turn ("." is none)
EXPECTED = {
    "chatml": """
        <|im_start|> s0 system s0 w0 S0 <|im_end|> s0 <|im_start|> u1 user u1 w1 U1 w2 U1 <|im_end|> u1
        <|im_start|> a2 assistant a2 w3 A2 w4 A2 <|im_end|> a2 <|im_start|> u3 user u3 w5 U3 <|im_end|> u3
        <|im_start|> a4 assistant a4 w6 A4 <|im_end|> a4""",
    "llama3": """
        <s> . <|header|> s0 system s0 <|end_header|> s0 w0 S0 <|eot|> s0
        <|header|> u1 user u1 <|end_header|> u1 w1 U1 w2 U1 <|eot|> u1
        <|header|> a2 assistant a2 <|end_header|> a2 w3 A2 w4 A2 <|eot|> a2
        <|header|> u3 user u3 <|end_header|> u3 w5 U3 <|eot|> u3
        <|header|> a4 assistant a4 <|end_header|> a4 w6 A4 <|eot|> a4""",
    "gemma": """
        <s> . <start_of_turn> u1 user u1 w0 S0 w1 U1 w2 U1 <end_of_turn> u1
        <start_of_turn> a2 model a2 w3 A2 w4 A2 <end_of_turn> a2
        <start_of_turn> u3 user u3 w5 U3 <end_of_turn> u3 <start_of_turn> a4 model a4 w6 A4 <end_of_turn> a4""",
    "mistral": """
        <s> . [INST] u1 w1 U1 w2 U1 [/INST] u1 w3 A2 w4 A2 </s> a2 [INST] u3 w5 U3 [/INST] u3 w6 A4 </s> a4""",
    "qwen3": """
        <|im_start|> s0 system s0 w0 S0 <|im_end|> s0 <|im_start|> u1 user u1 w1 U1 w2 U1 <|im_end|> u1
        <|im_start|> a2 assistant a2 w3 A2 w4 A2 <|im_end|> a2 <|im_start|> u3 user u3 w5 U3 <|im_end|> u3
        <|im_start|> a4 assistant a4 <think> a4 </think> a4 w6 A4 <|im_end|> a4""",
    "zephyr": """
        <|system|> s0 w0 S0 </s> s0 <|user|> u1 w1 U1 w2 U1 </s> u1 <|assistant|> a2 w3 A2 w4 A2 </s> a2
        <|user|> u3 w5 U3 </s> u3 <|assistant|> a4 w6 A4 </s> a4""",
}


def shown(lm: LanguageModel, messages: Any, **options: Any) -> str:
    """Each token of a conversation with the first letter of its role (large in a message's text) and its turn."""
    batch = lm.encode_chat(messages, **options)
    words = lm.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    out = []
    for word, role, turn, content in zip(words, batch.roles[0], batch.turns[0].tolist(), batch.content[0].tolist()):
        mark = "." if role is None else (role[0].upper() if content else role[0]) + (str(turn) if turn >= 0 else "-")
        out.append(f"{word} {mark}")
    return " ".join(out)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_token_of_a_finished_conversation(name: str) -> None:
    assert shown(chat_model(name), MULTI) == " ".join(EXPECTED[name].split())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|> s- system s- Be s- helpful s- <|im_end|> s- <|im_start|> u0 user u0 w1 U0 <|im_end|> u0 "
            "<|im_start|> a1 assistant a1",
        ),
        ("llama3", "<s> . <|header|> u0 user u0 <|end_header|> u0 w1 U0 <|eot|> u0 "
                   "<|header|> a1 assistant a1 <|end_header|> a1"),
        ("gemma", "<s> . <start_of_turn> u0 user u0 w1 U0 <end_of_turn> u0 <start_of_turn> a1 model a1"),
        ("mistral", "<s> . [INST] u0 w1 U0 [/INST] u0"),
        ("qwen3", "<|im_start|> u0 user u0 w1 U0 <|im_end|> u0 <|im_start|> a1 assistant a1"),
        ("zephyr", "<|user|> u0 w1 U0 </s> u0 <|assistant|> a1"),
    ],
)  # fmt: skip
def test_a_question_and_the_header_of_the_answer(name: str, expected: str) -> None:
    """A system prompt that the template adds is the system's and of no turn; the header is of the turn to come."""
    assert shown(chat_model(name), "w1") == expected


def test_a_system_message_that_moves_into_the_last_users_turn() -> None:
    assert shown(chat_model("mistral"), talk("w1", "w2", "w3", system="w0")) == (
        "<s> . [INST] u1 w1 U1 [/INST] u1 w2 A2 </s> a2 [INST] u3 w0 S0 w3 U3 [/INST] u3"
    )


def test_thinking_is_kept_in_the_last_turn_and_dropped_before_it() -> None:
    lm = chat_model("qwen3")
    messages = talk("w1", "<think> w7 w8 </think> w2", "w3", "<think>w9</think>w4")
    expected = (
        "<|im_start|> u0 user u0 w1 U0 <|im_end|> u0 <|im_start|> a1 assistant a1 w2 A1 <|im_end|> a1 <|im_start|> u2 "
        "user u2 w3 U2 <|im_end|> u2 <|im_start|> a3 assistant a3 <think> a3 w9 A3 </think> A3 w4 A3 <|im_end|> a3"
    )
    assert shown(lm, messages) == expected
    batch = lm.encode_chat(messages)
    words = lm.tokenizer.convert_ids_to_tokens(batch.input_ids[0][batch.mask("thinking")[0]].tolist())
    assert words == ["<think>", "w9", "</think>"]
    field = [*messages[:3], {"role": "assistant", "content": "w4", "reasoning_content": "w9"}]
    assert shown(lm, field) == expected


def test_a_think_marker_in_a_users_message_opens_nothing() -> None:
    batch = chat_model("qwen3").encode_chat([*talk("w1 <think> w2", "<think> w3 </think> w4"), *talk("w5 <think> w6")])
    assert not batch.mask("thinking").any()  # the assistant's own is dropped, and a user's is text


def test_white_space_that_a_template_trims_or_keeps() -> None:
    for name in TEMPLATES:
        spaced = talk("  w1 w2\n", "\n w3 w4 ", " w5", "w6", system="w0")
        assert shown(chat_model(name), spaced) == " ".join(EXPECTED[name].split()), name


def test_equal_messages_are_told_apart() -> None:
    batch = chat_model("chatml").encode_chat(talk("w1", "w1", "w1", system="w1"))
    assert batch.turns[0][batch.content[0]].tolist() == [0, 1, 2, 3]


def test_a_last_message_that_is_to_be_continued() -> None:
    assert shown(chat_model("llama3"), talk("w1", "w2 w3"), continue_final_message=True) == (
        "<s> . <|header|> u0 user u0 <|end_header|> u0 w1 U0 <|eot|> u0 "
        "<|header|> a1 assistant a1 <|end_header|> a1 w2 A1 w3 A1"
    )


def test_settings_of_the_template_are_part_of_what_is_read() -> None:
    lm = chat_model("qwen3")
    words = shown(lm, "w1", enable_thinking=False)
    assert words.endswith("<|im_start|> a1 assistant a1 <think> a1 </think> a1")
    assert lm.encode_chat("w1", enable_thinking=False).mask("thinking")[0].tolist()[-2:] == [True, True]


def test_parts_of_a_padded_batch() -> None:
    lm = chat_model("llama3")
    given = [talk("w1"), talk("w1 w2", "w3", "w4", system="w0")]
    right, left = lm.encode_chat(given), lm.encode_chat(given, padding_side="left")
    for part in ("user", "assistant", "system", "last_user", "turn:0", "turn:-1", "role:user"):
        for row in range(2):
            real = [batch.mask(part)[row][batch.attention_mask[row].bool()].tolist() for batch in (right, left)]
            alone = lm.encode_chat(given[row]).mask(part)[0].tolist() if (part, row) != ("turn:3", 0) else None
            assert real[0] == real[1] == alone, (part, row)
        assert not right.mask(part)[~right.attention_mask.bool()].any()
    assert right.mask("last_user")[1].tolist() == (right.turns[1] == 3).tolist()
    assert right.mask("turn:-1")[1].tolist() == (right.turns[1] == 4).tolist()  # the turn to come has its header
    assert right.mask("turn:-2").sum(1).tolist() == [5, 5]
    assert right.rows([1, 0, 1]).mask("user").tolist() == [right.mask("user")[i].tolist() for i in (1, 0, 1)]


def test_no_bos_is_doubled_and_none_is_added() -> None:
    for name, template in (("llama3", 0), ("zephyr", None)):
        lm = chat_model(name)
        for ids in (lm.encode_chat("w1").input_ids[0], lm.encode([talk("w1")]).input_ids[0]):
            assert ids.tolist().count(0) == (0 if template is None else 1), name


def test_the_digest_is_the_templates(lm: LanguageModel) -> None:
    a, b = chat_model("llama3"), chat_model("zephyr")
    assert a.template_digest != b.template_digest
    assert len(a.template_digest or "") == 16
    assert lm.template_digest is None
    a.tokenizer.chat_template = b.tokenizer.chat_template
    assert a.template_digest == b.template_digest


def test_what_a_template_does_not_have(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match="has no chat template: give an instruction-tuned model"):
        lm.encode_chat("w5")
    gemma2 = chat_model(GEMMA2)
    with pytest.raises(SteersmanError, match="has no role 'system'"):
        gemma2.encode_chat("w1").mask("system")
    with pytest.raises(SteersmanError, match=r"conversation 0: the chat template refuses .*System role not supported"):
        gemma2.encode_chat("w1", system="w0")
    with pytest.raises(SteersmanError, match="no markers of thinking"):
        gemma2.encode_chat("w1").mask("thinking")
    with pytest.raises(SteersmanError, match="scope turn:2: the longest conversation has 2 turns"):
        gemma2.encode_chat("w1").mask("turn:2")
    with pytest.raises(SteersmanError, match="a turn is a number"):
        gemma2.encode_chat("w1").mask("turn:last")
    with pytest.raises(SteersmanError, match="is no part of a conversation"):
        gemma2.encode_chat("w1").mask("everything")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content ~ ' ' }}{% endfor %}{{ messages[0].content }}", "in two places"),
        ("{% for m in messages %}{{ m.content.split(' ')|first ~ ' ' }}{% endfor %}", "a part of a message"),
        ("{% for m in messages %}{{ m.content ~ ' w' ~ m.content|length ~ ' ' }}{% endfor %}", "other text"),
        ("{% for m in messages %}{{ m.role ~ ' ' }}{% endfor %}", "leaves every message out"),
    ],
)
def test_a_template_that_hides_whose_tokens_are_whose(template: str, why: str) -> None:
    batch = chat_model(template).encode_chat(talk("w1 w2", "w3"))  # the text is known all the same
    with pytest.raises(SteersmanError, match=f"hidden by the chat template of .*{why}.*steer a window"):
        batch.mask("user")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give a conversation"),
        ({"role": "user", "content": "w1"}, "give a conversation"),
        (7, "give a conversation"),
        ([talk("w1"), [1, 2]], "conversation 1 is no list of messages"),
        ([talk("w1"), [{"role": "user"}]], "conversation 1 is no list of messages"),
    ],
)
def test_what_is_no_conversation(given: object, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        chat_model("chatml").encode_chat(given)  # pyright: ignore[reportArgumentType]


def test_a_system_message_beside_one_is_refused() -> None:
    with pytest.raises(SteersmanError, match="has a system message of its own"):
        chat_model("chatml").encode_chat(talk("w1", system="w0"), system="w2")
    with pytest.raises(SteersmanError, match="has no generation prompt"):
        chat_model("chatml").encode_chat(talk("w1", "w2"), continue_final_message=True, add_generation_prompt=True)


def test_texts_beside_conversations_have_no_roles() -> None:
    batch = chat_model("chatml").encode(["w1", talk("w2")])
    assert batch.spans is not None
    with pytest.raises(SteersmanError, match="prompt 0 is plain text and has no roles"):
        _ = batch.spans.names
    assert torch.equal(batch.rows([1]).input_ids, batch.input_ids[1:])
