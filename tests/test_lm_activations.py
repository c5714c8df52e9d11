"""What fires on a text: planted features on words, what is shown of them, and what is refused."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support.browser import PHONE, Opened, browser, check_axe, needs_browser, overflows
from support.word_features import HOOK, word_model, word_sae

from steersman import SAE, LanguageModel
from steersman.demo import MODEL_PATH
from steersman.errors import SteersmanError
from steersman.lm import Activations, TextActivations
from steersman.lm.activations import token_texts
from steersman.sae import FeatureLabel, FeatureLabels
from steersman.terminal import in_colour

NASTY = ["<script>alert(1)</script>", "\x1b[31mred", "שלום\u202e", "🙂", "a\nb"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return word_model()


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> SAE:
    made = word_sae(lm)
    made.labels = FeatureLabels({3: FeatureLabel(text="the word w7")})
    return made


def test_planted_features_fire_on_their_words(lm: LanguageModel, sae: SAE) -> None:
    (text,) = lm.activations(sae, "w7 w20 w8 w7")
    top = text.top()
    assert [(found.feature, found.value, found.n_tokens, found.label) for found in top] == [
        (3, 2.0, 2, "the word w7"),
        (4, 2.0, 1, ""),
    ]
    assert top[0].token.strip() == "w7"
    assert [[one.feature for one in features] for features in text.per_token()][-4:] == [[3], [], [4], [3]]
    assert text.of(3).tolist()[-4:] == [2.0, 0.0, 0.0, 2.0]
    assert text.top(1)[0].feature == 3
    assert not text.per_token(0)[-1]


def test_several_texts_are_as_each_alone_whatever_shares_their_batch(lm: LanguageModel, sae: SAE) -> None:
    texts = ["w7", "w20 w8 w4 w5 w6", "w9 w7"]
    together = lm.activations(sae, texts, batch_size=2)
    assert len(together) == 3
    for text, one in zip(texts, together):
        (alone,) = lm.activations(sae, text)
        assert one.to_json() == alone.to_json()
        assert len(one) == len(one.token_ids) == len(one.values)  # no padding
    assert [(found.feature, found.n_tokens) for found in together.top(1)] == [(3, 2)]
    assert isinstance(together[1:], Activations)


def test_a_bos_counts_only_if_asked(lm: LanguageModel, sae: SAE) -> None:
    assert lm.bos_token_id is not None
    with torch.no_grad():
        rows = lm.model.get_input_embeddings().weight
        before = rows[lm.bos_token_id].clone()
        rows[lm.bos_token_id, 0] = 9.0  # feature 0 is 8 on the BOS
        try:
            (quiet,) = lm.activations(sae, "w7")
            (loud,) = lm.activations(sae, "w7", include_bos=True)
        finally:
            rows[lm.bos_token_id] = before
    assert [found.feature for found in quiet.top()] == [3]
    assert quiet.counted.tolist() == [False, True]
    assert loud.top()[0].feature == 0
    assert loud.top()[0].value == pytest.approx(8.0)


def test_features_that_fire_everywhere_are_left_out_if_asked(lm: LanguageModel, sae: SAE) -> None:
    assert sae.feature_stats is not None
    density, sae.feature_stats.density[4] = float(sae.feature_stats.density[4]), 0.9
    try:
        (text,) = lm.activations(sae, "w7 w8", max_density=0.5)
    finally:
        sae.feature_stats.density[4] = density
    assert [found.feature for found in text.top()] == [3]
    with pytest.raises(SteersmanError, match="share of tokens"):
        lm.activations(sae, "w7", max_density=5.0)


def test_units_are_shares_of_the_largest_activation(lm: LanguageModel, sae: SAE) -> None:
    (text,) = lm.activations(sae, "w7", units="max_act")
    assert text.top()[0].value == 1.0
    assert sae.feature_stats is not None
    stats, sae.feature_stats = sae.feature_stats, None
    try:
        with pytest.raises(SteersmanError, match="statistics"):
            lm.activations(sae, "w7", units="max_act")
    finally:
        sae.feature_stats = stats


def test_refused(lm: LanguageModel, sae: SAE) -> None:
    with pytest.raises(SteersmanError, match="context"):
        lm.activations(sae, ["w7", "w7 " * 5000])
    with pytest.raises(SteersmanError, match="units"):
        lm.activations(sae, "w7", units="percent")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SteersmanError, match="batch_size"):
        lm.activations(sae, "w7", batch_size=0)


def shown(tokens: list[str], label: str = "") -> TextActivations:
    """A text whose every token has feature 5, by hand."""
    n = len(tokens)
    return TextActivations(
        tokens=tokens, token_ids=list(range(n)), counted=torch.ones(n, dtype=torch.bool),
        values=torch.arange(1.0, n + 1)[:, None], indices=torch.full((n, 1), 5), hook_name=HOOK,
        labels={5: label} if label else {},
    )  # fmt: skip


def test_text_of_others_is_shown_and_does_nothing() -> None:
    text = shown(NASTY, label="\x1b]0;title\x07<b>bold</b>")
    plain, coloured = text.to_text(), text.to_text(colour=True)
    assert "\x1b" not in plain
    assert "\u202e" not in plain
    assert not set(re.findall(r"\x1b\[[0-9;]*m|\x1b.", coloured)) - {"\x1b[38;5;16;48;5;222m", "\x1b[0m"}
    assert "🙂" in plain
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)

    page = text._repr_html_()
    Tags().feed(page)
    assert not {"script", "img"} & set(tags)
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;bold" in page
    assert "שלום" in page
    assert "\u202e" not in page
    assert json.loads(json.dumps(text.to_json()))["tokens"][0]["token"] == NASTY[0]


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    terminal: object = Terminal()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert in_colour(terminal)  # pyright: ignore[reportArgumentType]
    assert not in_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not in_colour(terminal)  # pyright: ignore[reportArgumentType]


def test_no_feature_at_all(lm: LanguageModel, sae: SAE) -> None:
    (text,) = lm.activations(sae, "w20 w21")
    assert text.top() == []
    assert "no feature is active" in text.to_text()
    assert "<table>" in text._repr_html_()


@pytest.mark.parametrize("text", ["One day a dog ran.", " Snow!", "naïve café 🙂 שלום 漢字\nnew"])
def test_tokens_together_are_the_text(text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_stands_at_its_last() -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: object) -> str:
            return bytes(ids).decode("utf-8", "replace")

    assert token_texts(Bytes(), list("é🙂!".encode())) == ["", "é", "", "", "", "🙂", "!"]
    assert token_texts(Bytes(), list("🙂".encode())[:2]) == ["", "\ufffd"]  # cut off in the middle


@needs_browser
def test_a_notebook_cell_in_a_browser(tmp_path: Path) -> None:
    cell = Activations([shown(NASTY, label="<img src=x onerror=alert(1)>"), shown(["word"] * 80)])._repr_html_()
    page = tmp_path / "cell.html"
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>cell</title><meta name="viewport"'
    page.write_text(f'{head} content="width=device-width"><main><h1>Cell</h1>{cell}</main>', encoding="utf-8")
    with browser() as chromium:
        for size, dark in ((PHONE, False), (PHONE, True)):
            opened = Opened(chromium, page, size, dark)
            opened.page.click("summary >> nth=0")
            check_axe(opened.page)
            assert not overflows(opened.page)
            assert opened.page.locator(".tokens span[title]").first.get_attribute("title") == (
                "5:1 <img src=x onerror=alert(1)>"
            )
            opened.check()  # nothing of it ran
            opened.close()
