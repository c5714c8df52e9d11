"""Streams: the tokens and texts of `generate`, one by one, and nothing left behind."""

import threading

import pytest
import torch
from support.chat_toys import chat_model, talk
from support.tiny_models import count_hooks

from steersman import LanguageModel, Steerer
from steersman.demo import MODEL_PATH
from steersman.errors import SteersmanError
from steersman.lm.generate import Generation
from steersman.lm.streaming import StreamedToken, TextPieces

PROMPTS = ["w1 w2 w3", "w4", "w5 w6"]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return chat_model("chatml")


def check_equal(tokens: list[StreamedToken], text: Generation) -> None:
    """The tokens, the text and the ends of every row are the generation's."""
    for row in range(len(text.tokens)):
        mine = [t for t in tokens if t.row == row]
        assert [t.token for t in mine] == text.new_tokens[row][text.new_mask[row].bool()].tolist()
        assert "".join(t.text for t in mine) == text.completions[row]
        assert [t.finished for t in mine] == [False] * (len(mine) - 1) + [True]


@pytest.mark.parametrize(
    "options",
    [{}, {"seed": 1}, {"temperature": 1.5, "top_k": 5, "seed": 2}, {"num_return_sequences": 2, "seed": 3},
     {"use_cache": False}],
)  # fmt: skip
def test_tokens_are_those_of_generate(lm: LanguageModel, options: dict[str, object]) -> None:
    settings = {"max_new_tokens": 12, "eos_token_id": [1, 7, 8, 9, 12], **options}  # some rows end early
    text = lm.generate(PROMPTS, **settings)  # pyright: ignore[reportArgumentType]
    stream = lm.stream(PROMPTS, **settings)  # pyright: ignore[reportArgumentType]
    tokens = list(stream)
    check_equal(tokens, text)
    assert stream.generation is not None
    assert stream.generation.tokens.tolist() == text.tokens.tolist()


def test_the_readers_random_numbers_are_its_own(lm: LanguageModel) -> None:
    settings = {"max_new_tokens": 6, "eos_token_id": None, "seed": 5}
    text = lm.generate(PROMPTS, **settings)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(7)
    expected = torch.rand(4).tolist()
    torch.manual_seed(7)
    tokens, drawn = [], []
    for token in lm.stream(PROMPTS, **settings):  # pyright: ignore[reportArgumentType]
        tokens.append(token)
        drawn.append(float(torch.rand(1)))
    check_equal(tokens, text)
    assert drawn[:4] == expected


def test_a_steered_stream_beside_other_passes(lm: LanguageModel) -> None:
    v = torch.linspace(-3, 3, 16)
    steerer = Steerer(lm)
    scales = [0.0, 1.0, 3.0]
    with steerer.vector(v, hook=HOOK, scale=scales, scope="generation") as steering:
        text = lm.generate(PROMPTS, max_new_tokens=6, eos_token_id=None)
        steered = steering.trace.count
    plain = lm.generate(PROMPTS, max_new_tokens=6, eos_token_id=None)
    with steerer.vector(v, hook=HOOK, scale=scales, scope="generation") as steering:
        first, tokens = lm.stream(PROMPTS, max_new_tokens=6, eos_token_id=None), []
        for token in first:
            tokens.append(token)
            if len(tokens) == 7:
                with lm.unedited():
                    assert lm.generate(PROMPTS, max_new_tokens=6, eos_token_id=None).tokens.equal(plain.tokens)
        assert steering.trace.count == steered
    check_equal(tokens, text)
    assert not text.tokens.equal(plain.tokens)


def test_left_early_nothing_stays(lm: LanguageModel) -> None:
    before = threading.active_count()
    with Steerer(lm).vector(torch.ones(16), hook=HOOK), lm.stream(PROMPTS, max_new_tokens=50) as stream:
        for _ in stream:
            break
    assert list(stream) == []
    assert stream.generation is None
    assert count_hooks(lm.model) == 0
    assert threading.active_count() == before
    abandoned = lm.stream(PROMPTS, max_new_tokens=50)
    next(abandoned)
    del abandoned
    assert threading.active_count() == before
    assert "generate" not in lm.model.__dict__
    assert lm.stream(PROMPTS, max_new_tokens=50).generation is None  # never begun
    assert not lm.model.training


def test_conversations_and_batches_stream(lm: LanguageModel) -> None:
    batch = lm.encode_chat([talk("w1"), talk("w2 w3", "w4", "w5")], padding_side="left")
    text = lm.chat([talk("w1"), talk("w2 w3", "w4", "w5")], max_new_tokens=5)
    check_equal(list(lm.stream(batch, max_new_tokens=5)), text)
    check_equal(list(lm.stream(talk("w1"), max_new_tokens=5)), lm.chat("w1", max_new_tokens=5))
    with pytest.raises(SteersmanError, match="padded on the left"):
        lm.stream(lm.encode_chat([talk("w1"), talk("w2 w3")]))


def test_pieces_are_whole_characters() -> None:
    """Tokens of single bytes: a character comes with its last byte, and what never becomes one at the end."""

    class Bytes:
        def decode(self, ids: list[int], **_options: object) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    pieces = TextPieces(Bytes(), [list(b"x")], [], 20, others_end=False)
    told = "é日🙂a"
    given = [pieces.add([byte])[0].text for byte in told.encode()]
    assert [text for text in given if text] == list(told)
    cut = TextPieces(Bytes(), [list(b"x")], [], 3, others_end=False)
    assert [cut.add([byte])[0].text for byte in "a日".encode()[:3]] == ["a", "", "�"]


def test_the_bundled_model_streams_its_text() -> None:
    lm = LanguageModel.load(MODEL_PATH)
    settings = {"max_new_tokens": 12, "seed": 0, "temperature": 1.0}
    prompts = ["The", "In the morning"]
    text = lm.generate(prompts, **settings)  # pyright: ignore[reportArgumentType]
    check_equal(list(lm.stream(prompts, **settings)), text)  # pyright: ignore[reportArgumentType]
    word = text.completions[0].split()[3]  # a string that ends a row is known a token later
    check_equal(
        list(lm.stream(prompts[:1], stop_strings=[word], **settings)),  # pyright: ignore[reportArgumentType]
        lm.generate(prompts[:1], stop_strings=[word], **settings),  # pyright: ignore[reportArgumentType]
    )


def test_mistakes_are_told_at_once(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match="beam search cannot be streamed"):
        lm.stream("w1", num_beams=2)
    with pytest.raises(SteersmanError, match="stream gives the tokens itself"):
        lm.stream("w1", streamer=object())
    with pytest.raises(SteersmanError, match="max_new_tokens must be at least 1"):
        lm.stream("w1", max_new_tokens=0)
    with pytest.raises(SteersmanError, match="exceed the context"):
        list(lm.stream("w1", max_new_tokens=500))
