"""Text to ids: one BOS where the family has one, padding without new embeddings."""

import pytest
import torch
from support.tiny_models import word_tokenizer
from tokenizers.processors import TemplateProcessing

from steersman import LanguageModel
from steersman.errors import SteersmanError
from steersman.lm.tokens import TextEncoder


def adding(template: str, **special: str):
    """A tokenizer that adds special tokens by itself."""
    tokenizer = word_tokenizer(**special)
    ids = {"<s>": 0, "</s>": 1}
    used = [(name, i) for name, i in ids.items() if name in template]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=used)
    return tokenizer


def test_exactly_one_bos() -> None:
    plain = word_tokenizer(bos_token="<s>", eos_token="</s>")
    itself = adding("<s> $A", bos_token="<s>", eos_token="</s>")
    both = adding("<s> $A </s>", bos_token="<s>", eos_token="</s>")
    for tokenizer in (plain, itself, both):
        text = TextEncoder(tokenizer, is_encoder=False)
        assert text.ids("w5 w6", bos=True) == [0, 5, 6]
        assert text.ids("<s> w5", bos=True) == [0, 5]  # written in the text: not doubled
        assert text.ids("w5 w6", bos=False) == [5, 6]


def test_families_without_bos_get_none() -> None:
    text = TextEncoder(word_tokenizer(eos_token="</s>"), is_encoder=False)
    assert text.bos_token_id is None
    assert text.ids("w5", bos=True) == [5]
    with pytest.raises(SteersmanError, match="text 1 of 2 is empty"):
        text.batch(["w5", ""], bos=True, padding_side="right", max_length=None)


def test_encoders_frame_the_text_themselves() -> None:
    text = TextEncoder(adding("<s> $A </s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>"), is_encoder=True)
    assert text.ids("w5 w6", bos=True) == [0, 5, 6, 1]
    assert text.ids("w5 w6", bos=False) == [5, 6]
    assert text.bos_token_id == 0


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"pad_token": "<pad>", "eos_token": "</s>"}, 3),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, 1),
        ({"unk_token": "<unk>"}, 2),
    ],
)
def test_pad_token(special: dict[str, str], pad: int) -> None:
    tokenizer = word_tokenizer(**special)
    text = TextEncoder(tokenizer, is_encoder=False)
    assert text.pad_token_id == tokenizer.pad_token_id == pad
    batch = text.batch(["w5 w6", "w7"], bos=True, padding_side="left", max_length=None)
    assert batch.input_ids.tolist() == [[5, 6], [pad, 7]]
    assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]
    assert batch.lengths.tolist() == [2, 1]


def test_batches() -> None:
    text = TextEncoder(word_tokenizer(bos_token="<s>", eos_token="</s>"), is_encoder=False)
    batch = text.batch(["w5 w6 w7", "w8"], bos=True, padding_side="right", max_length=3)
    assert batch.input_ids.tolist() == [[0, 5, 6], [0, 8, 1]]
    assert text.batch([""], bos=True, padding_side="right", max_length=None).input_ids.tolist() == [[0]]
    with pytest.raises(SteersmanError, match="'left' or 'right'"):
        text.batch(["w5"], bos=True, padding_side="centre", max_length=None)
    with pytest.raises(SteersmanError, match="no texts"):
        text.batch([], bos=True, padding_side="left", max_length=None)
    bare = TextEncoder(word_tokenizer(), is_encoder=False)
    with pytest.raises(SteersmanError, match="no pad, eos or unk"):
        bare.batch(["w5 w6", "w7"], bos=True, padding_side="left", max_length=None)


def test_a_bos_that_the_tokenizer_never_adds_is_said_once_and_left_out_on_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = word_tokenizer(bos_token="<s>", eos_token="</s>")
    plain.name_or_path = "a-model"
    for _ in range(2):
        assert not TextEncoder(plain, is_encoder=False).adds_bos
    assert [r.getMessage() for r in caplog.records if "a-model" in r.getMessage()] == [
        "the tokenizer of a-model puts no BOS before a text by itself: <s> is put there all the same; bos=False "
        "leaves it out"
    ]
    itself = TextEncoder(adding("<s> $A", bos_token="<s>", eos_token="</s>"), is_encoder=False)
    assert itself.adds_bos
    without = TextEncoder(plain, is_encoder=False, bos=False)
    assert without.ids("w5 w6", bos=True) == [5, 6]
    assert (without.bos_token_id, without.known_bos) == (None, 0)
    with pytest.raises(SteersmanError, match="is empty and no BOS was asked for"):
        without.batch([""], bos=True, padding_side="left", max_length=None)


CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"


def test_token_ids_and_conversations_are_texts() -> None:
    tokenizer = word_tokenizer(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    text = TextEncoder(tokenizer, is_encoder=False)

    def rows(given: object) -> list[list[int]]:
        return text.batch(given, bos=True, padding_side="right", max_length=None).input_ids.tolist()

    assert rows([0, 5, 6]) == rows([[0, 5, 6]]) == rows(torch.tensor([0, 5, 6])) == [[0, 5, 6]]
    assert rows([[5, 6], "w7"]) == [[5, 6], [0, 7]]  # ids as they are, no BOS before them
    with pytest.raises(SteersmanError, match="text 0 is a conversation, and the tokenizer has no chat template"):
        rows(CHAT)
    tokenizer.chat_template = TEMPLATE
    assert rows(CHAT) == [[2, 5, 6, 2, 7]]
    assert rows([CHAT[:1], CHAT[:1]]) == [[2, 5, 6, 9]] * 2  # the answer is still to come


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "texts must be a string or a list of them, got NoneType"),
        (7, "texts must be a string or a list of them, got int"),
        ({"role": "user", "content": "w5"}, "got dict"),
        ([["w5", "w6"]], "text 0 is a list of 2: give strings, token ids, or conversations"),
        (["w5", None], "text 1 is a NoneType"),
        ([[5, 999]], "text 0 holds the token id 999: the tokenizer has ids 0 to 60"),
        ([[]], "text 0 is a list of 0"),
    ],
)
def test_what_is_no_text(given: object, message: str) -> None:
    text = TextEncoder(word_tokenizer(bos_token="<s>", eos_token="</s>"), is_encoder=False)
    with pytest.raises(SteersmanError, match=message):
        text.batch(given, bos=True, padding_side="left", max_length=None)


def test_half_a_surrogate_pair_is_told(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match=r"text 1 holds half of a surrogate pair .*character 3"):
        lm.encode(["w5", "w5 \ud83d"])
