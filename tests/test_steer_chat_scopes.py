"""Scopes by role, turn and thinking: the tokens that they steer, by padding, caches, beams, batches and passes."""

import pytest
import torch
from support.chat_toys import GEMMA2, TEMPLATES, chat_model, talk
from torch import Tensor

from steersman import LanguageModel, Steerer
from steersman.errors import SteersmanError
from steersman.lm import Generation
from steersman.lm.tokens import ChatBatch

HOOK = "blocks.1.hook_resid_post"
PARTS = ("assistant", "user", "system", "last_user", "turn:1", "turn:-1", "role:user")
TALKS = [talk("w1 w2", "w3", "w4 w5 w6", system="w0"), talk("w7"), talk("w1", "w2 w3", "w4", "w5 w6", "w8")]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return chat_model("chatml")


def pushed(lm: LanguageModel, scope: object, **options: object):
    v = torch.linspace(-2, 2, 16)
    return Steerer(lm).vector(v, hook=HOOK, scope=scope, **options)  # pyright: ignore[reportArgumentType]


def steered(lm: LanguageModel, batch: ChatBatch, scope: str) -> list[set[int]]:
    """Absolute positions that a plain pass over the batch steers in each row."""
    with pushed(lm, scope, include_bos=True) as context:
        lm.logits(batch)
    return [{p for row, p in context.trace.pairs() if row == i} for i in range(len(batch.input_ids))]


def of_mask(batch: ChatBatch, mask: Tensor) -> list[set[int]]:
    positions = batch.attention_mask.cumsum(1) - 1
    return [set(positions[i][mask[i]].tolist()) for i in range(len(mask))]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("part", PARTS)
def test_a_plain_pass_steers_the_parts_tokens_whatever_the_padding(name: str, part: str) -> None:
    lm = chat_model(name)
    right, left = lm.encode_chat(TALKS), lm.encode_chat(TALKS, padding_side="left")
    found = steered(lm, right, part)
    assert found == steered(lm, left, part) == of_mask(right, right.mask(part))
    assert any(found) != ((name, part) == ("mistral", "turn:-1"))  # its turns to come have no header
    assert found == [steered(lm, lm.encode_chat(given), part)[0] if part != "turn:1" or i != 1 else found[1]
                     for i, given in enumerate(TALKS)]  # fmt: skip


def test_the_bos_is_left_alone_unless_asked_for(lm: LanguageModel) -> None:
    batch = lm.encode_chat(TALKS[0])
    with pushed(lm, "system") as context:
        lm.logits(batch)
    assert {p for _, p in context.trace.pairs()} == set(range(1, 4))
    assert steered(lm, batch, "system") == [set(range(4))]


def written(lm: LanguageModel, scope: str, talks: object, **options: object) -> tuple[Generation, list[set[int]]]:
    with pushed(lm, scope) as context:
        text = lm.chat(talks, max_new_tokens=6, eos_token_id=None, **options)  # pyright: ignore[reportArgumentType]
    pairs = context.trace.pairs()
    return text, [{p for row, p in pairs if row == i} for i in range(len(text.tokens))]


@pytest.mark.parametrize("part", PARTS)
def test_generation_with_and_without_a_cache_alone_and_in_a_batch(lm: LanguageModel, part: str) -> None:
    text, found = written(lm, part, TALKS)
    again, found_again = written(lm, part, TALKS, use_cache=False)
    assert text.tokens.tolist() == again.tokens.tolist()
    assert found == found_again
    for i, given in enumerate(TALKS):
        if part == "turn:1" and i == 1:
            continue
        alone, where = written(lm, part, given)
        assert alone.new_tokens[0].tolist() == text.new_tokens[i].tolist()
        assert where[0] == found[i]
    # The last token is never fed; all others of the generation are the assistant's last turn's.
    made = [set(range(int(n), int(n) + 5)) for n in text.prompt_length]
    for mine, positions in zip(made, found):
        assert (mine <= positions) if part in ("assistant", "turn:-1") else (part == "turn:1" or not mine & positions)


@pytest.mark.parametrize("part", [*PARTS, "thinking"])
def test_a_pass_over_a_finished_text_steers_what_generating_it_did(part: str) -> None:
    lm = chat_model("qwen3")
    text, found = written(lm, part, TALKS, template={"enable_thinking": False})
    with pushed(lm, part) as context:
        forced = lm.logits(text.batch)
    chosen = forced[:, :-1].argmax(-1)[:, text.prompt_columns - 1 :]
    assert chosen.tolist() == text.new_tokens.tolist()
    fed = [{p for row, p in context.trace.pairs() if row == i} for i in range(len(TALKS))]
    lengths = text.attention_mask.sum(1).tolist()
    assert [positions - {n - 1} for positions, n in zip(fed, lengths)] == found


def test_beams_and_returned_sequences_share_their_conversations_layout(lm: LanguageModel) -> None:
    _, alone = written(lm, "last_user", TALKS)
    with pushed(lm, "last_user") as context:
        lm.chat(TALKS, max_new_tokens=6, eos_token_id=None, num_beams=2)
    assert context.trace.rows == [len(positions) for positions in alone for _ in range(2)]
    text, many = written(lm, "assistant", TALKS, num_return_sequences=2, seed=0)
    assert len(many) == 6
    assert many[0] == many[1] != many[4]
    assert [len(c) for c in text.conversations] == [5, 5, 3 - 1, 3 - 1, 6, 6]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_thinking_is_followed_while_it_is_generated(use_cache: bool, beams: int) -> None:
    lm = chat_model("qwen3")
    names = ["w1", "<think>", "w2", "w3", "</think>", "w4", "<think>", "w5"]
    ids: list[int] = lm.tokenizer.convert_tokens_to_ids(names)
    widths = lm.encode_chat([talk("w1"), talk("w1 w2 w3")], padding_side="left").input_ids.shape[1]

    def force(h: Tensor, fwd: object) -> Tensor:
        step = max(0, fwd.past + fwd.length - widths)  # pyright: ignore[reportAttributeAccessIssue]
        out = torch.full_like(h, -10.0)
        out[..., ids[step % len(ids)]] = 0.0
        out[..., ids[0]] += 0.1 * (step == 0)
        return out

    with lm.edit("logits", force), pushed(lm, "thinking") as context:
        text = lm.chat(
            [talk("w1"), talk("w1 w2 w3")], max_new_tokens=8, eos_token_id=None, use_cache=use_cache, num_beams=beams
        )
    assert text.new_tokens.tolist() == [ids, ids]
    for row, n in zip((0, beams), text.prompt_length.tolist()):
        # <think> w2 w3 </think>, and the second <think>; the last token is never fed
        assert {p - n for r, p in context.trace.pairs() if r == row} == {1, 2, 3, 4, 6}, row


def test_several_turns_over_one_kept_cache(lm: LanguageModel) -> None:
    """The second turn read on top of the first one's keys and values is what reading the whole conversation gives."""
    first = lm.chat(TALKS[1], max_new_tokens=3, eos_token_id=None)
    messages = [*first.conversations[0], {"role": "user", "content": "w9 w10"}]
    whole = lm.encode_chat(messages)
    for part in ("assistant", "user", "last_user", "turn:1", "turn:-1"):
        with pushed(lm, part) as fresh, lm.chat_spans(whole):
            at_once = lm.model.generate(whole.input_ids, max_new_tokens=4, eos_token_id=None)
        steered_at_once = fresh.trace.pairs()
        with pushed(lm, part) as kept, lm.chat_spans(whole):
            cache = lm.model(whole.input_ids[:, :9], use_cache=True)[lm.cache_name]
            again = lm.model.generate(whole.input_ids, max_new_tokens=4, eos_token_id=None, **{lm.cache_name: cache})
        assert again.tolist() == at_once.tolist(), part
        assert kept.trace.count == fresh.trace.count, part
        assert kept.trace.pairs() == [(row, p) for row, p in steered_at_once if p >= 9], part  # the later text's


def test_token_by_token_in_a_users_own_loop(lm: LanguageModel) -> None:
    batch = lm.encode_chat(TALKS[0])
    whole = steered(lm, batch, "user")
    with pushed(lm, "user") as context, lm.chat_spans(batch):
        cache = None
        for column in range(batch.input_ids.shape[1]):
            given = {} if cache is None else {lm.cache_name: cache}
            cache = lm.model(batch.input_ids[:, column : column + 1], use_cache=True, **given)[lm.cache_name]
    assert {p for _, p in context.trace.pairs()} == whole[0]


def test_a_stream_is_steered_as_the_generation(lm: LanguageModel) -> None:
    with pushed(lm, "assistant"):
        text = lm.chat(TALKS, max_new_tokens=5)
        tokens = list(lm.stream([*TALKS], max_new_tokens=5))
    for row in range(3):
        assert [t.token for t in tokens if t.row == row] == text.new_tokens[row][text.new_mask[row].bool()].tolist()


def test_scale_zero_is_the_unsteered_reply(lm: LanguageModel) -> None:
    plain = lm.chat(TALKS, max_new_tokens=5)
    for part in PARTS:
        with Steerer(lm).vector(torch.ones(16), hook=HOOK, scale=0.0, scope=part):
            assert lm.chat(TALKS, max_new_tokens=5).tokens.tolist() == plain.tokens.tolist()


def test_what_a_scope_needs(lm: LanguageModel) -> None:
    with pushed(lm, "assistant"):
        batch = lm.encode_chat(TALKS[0])
        message = "scope 'assistant' needs to know whose the tokens of a pass are"
        with pytest.raises(SteersmanError, match=message):
            lm.logits(batch.input_ids, batch.attention_mask)
        with pytest.raises(SteersmanError, match=message):
            lm.generate("w1 w2", max_new_tokens=2)
        with pytest.raises(SteersmanError, match="prompt 1 is plain text"):
            lm.generate([TALKS[1], "w2"], max_new_tokens=2)
        with lm.chat_spans(batch), pytest.raises(SteersmanError, match=message):
            lm.generate("w1 w2", max_new_tokens=2)  # not of the conversation declared around it
        with lm.chat_spans(batch), pytest.raises(SteersmanError, match="layout of the chat has 1 rows"):
            lm.logits(batch.input_ids.expand(2, -1))
    with pytest.raises(SteersmanError, match="these are no conversations"):
        lm.chat_spans(lm.encode("w1"))


def test_what_a_model_cannot_be_steered_by_is_said_before_it_runs() -> None:
    with pytest.raises(SteersmanError, match="has no role 'system'"):
        pushed(chat_model(GEMMA2), "system")
    with pytest.raises(SteersmanError, match="no markers of thinking"):
        pushed(chat_model("zephyr"), "thinking")
    bare = chat_model("zephyr")
    bare.tokenizer.chat_template = None
    with pytest.raises(SteersmanError, match="has no chat template"):
        pushed(bare, "assistant")


def test_replies_and_conversations(lm: LanguageModel) -> None:
    text = lm.chat([talk("w1"), "w2"], max_new_tokens=3, system="w0")
    assert [c[:-1] for c in text.conversations] == [talk("w1", system="w0"), talk("w2", system="w0")]
    assert text.replies == [c.strip() for c in text.completions]
    going = lm.chat(talk("w1", "w2 w3"), max_new_tokens=3, continue_final_message=True)
    assert going.replies[0].startswith("w2 w3")
    assert going.conversations[0][-1] == {"role": "assistant", "content": going.replies[0]}
    with pytest.raises(SteersmanError, match=r"ends with the assistant's message: continue_final_message=True"):
        lm.chat(talk("w1", "w2"))
    with pytest.raises(SteersmanError, match="the prompts were texts"):
        _ = lm.generate("w1", max_new_tokens=1).replies
