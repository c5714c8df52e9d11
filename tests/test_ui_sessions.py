"""Two people at the playground's page at once, in front of its real server: each gets exactly what they asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.browser import Opened, browser, check_axe, needs_browser, until
from support.playground import PROMPT, demo_sae, served

from steersman.demo import MODEL_PATH
from steersman.lm import LanguageModel
from steersman.sae import SAE, FeatureLabel, FeatureLabels
from steersman.steer import Recipe, Steerer

pytest.importorskip("uvicorn", reason="no uvicorn (extra ui): the playground was not tested in a browser")
pytest.importorskip("starlette", reason="no starlette (extra ui): the playground was not tested in a browser")

from steersman.commands.ui import UiCommand, loaded
from steersman.ui.playground.serving import token_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = needs_browser
LABELS = {3: "<b>bold</b>\u202e שלום\x1b[2J", 5: "five 🌊"}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load(str(MODEL_PATH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = FeatureLabels({j: FeatureLabel(text=text, source="test") for j, text in LABELS.items()})
    return demo_sae(tmp_path_factory.mktemp("page") / "sae", labels)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A real server, which asks for a token."""
    token = token_for("127.0.0.1", always=True)
    playground = loaded(UiCommand(model=str(MODEL_PATH), sae=str(folder)), token)
    with served(playground, token) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture
def sessions(chromium: Browser, url: str) -> Iterator[tuple[Opened, Opened]]:
    both = Opened(chromium, url), Opened(chromium, url)
    for one in both:
        one.page.set_default_timeout(60_000)
        one.page.wait_for_selector("body.ready")
    yield both
    for one in both:
        one.check()
        one.close()


def steer(page: Page, feature: int, strength: float, scope: str = "all") -> None:
    page.fill("#search", str(feature))
    page.click(f"#results li.feature[data-id='{feature}'] button:text-is('Add')")
    page.locator("#interventions input[type=number]").last.fill(str(strength))
    page.locator("#interventions .menus select").last.select_option(scope)


def finished(page: Page) -> None:
    page.wait_for_selector(".box.plain:not(.running) .foot:text('tokens')")
    page.wait_for_selector("#stop[aria-disabled=true]")


def generated(page: Page, side: str) -> str:
    """What the newest text of a side says behind its prompt, as the page holds it."""
    return page.locator(f".run:first-child .box.{side} .text > .tok").evaluate_all(
        "nodes => nodes.map(node => node.textContent).join('')"
    )


def test_two_sessions_get_exactly_what_each_asked_for(
    sessions: tuple[Opened, Opened], lm: LanguageModel, folder: Path
) -> None:
    wanted = [{3: 60.0}, {5: -45.0, 9: 30.0}]
    for session, features in zip(sessions, wanted):
        for feature, strength in features.items():
            steer(session.page, feature, strength)
        session.page.fill("#prompt", PROMPT)
    for session in sessions:
        session.page.click("#generate")  # the second while the first is running or waiting
    for session in sessions:
        finished(session.page)
    sae, steerer = SAE.load(str(folder)), Steerer(lm)
    plain = lm.generate(PROMPT, max_new_tokens=40).completions[0]
    texts = []
    for session, features in zip(sessions, wanted):
        with steerer.features(sae, features, mode="add", units="raw", scope="all"):
            texts.append(lm.generate(PROMPT, max_new_tokens=40).completions[0])
        assert generated(session.page, "steered") == texts[-1]
        assert generated(session.page, "plain") == plain
    assert len({plain, *texts}) == 3, "else nothing is shown by it"


def test_the_pages_parts_in_front_of_the_real_server(sessions: tuple[Opened, Opened], tmp_path: Path) -> None:
    page = sessions[0].page
    assert "token" not in page.url, "the token does not stay in the address"
    assert page.locator("#mode-chat").is_disabled()
    assert "chat template" in page.inner_text("#chat-reason")
    page.fill("#search", "bold")
    page.wait_for_selector("#find-count:text-is('1 feature')")
    assert "<b>bold</b>\\u202e שלום\\x1b[2J" in page.inner_text("#results .label")
    page.click("#results .open")
    page.wait_for_selector("#results .facts-list:has-text('promotes')")
    page.click("#results button:text-is('Add')")
    page.click("text=by a text")
    page.fill("#find-text", "Once upon a time")
    page.click("#find-run")
    page.wait_for_selector("#find-count:text('strongest')")
    assert page.locator("#results li.feature").count() > 0
    body = "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify({text: 'Once upon'})}"
    answer = page.evaluate(f"fetch('api/activating', {body}).then(answer => answer.json())")
    assert {"value", "token", "density", "max_act", "fires_on"} <= set(answer["features"][0])
    page.fill("#prompt", "The dog")
    page.fill("#max_new_tokens", "6")
    page.click("#generate")
    finished(page)
    assert page.locator(".box.steered .text > .tok").count() <= 6
    page.fill("#dose-strengths", "0, 40")
    page.click("#dose-run")
    page.wait_for_selector("#panel-dose table")
    assert page.locator("#panel-dose tbody tr").count() == 2
    page.click("#tab-decompose")
    page.click("#decompose-run")
    page.wait_for_selector("#panel-decompose table")
    until(page, "document.querySelectorAll('.figure').length === 2")
    until(page, "[...document.querySelectorAll('.figure')].every(image => image.naturalWidth > 0)")
    check_axe(page)
    page.click("#tab-code")
    page.wait_for_selector("#panel-code pre:has-text('st.features(sae')")
    with page.expect_download() as download:
        page.click("#recipe-save")
    saved = tmp_path / "recipe.yaml"
    download.value.save_as(saved)
    assert len(Recipe.load(str(saved)).edits) == 1
    before = page.input_value("#interventions input[type=number]")
    page.click("#interventions .sign")
    page.set_input_files("#recipe-file", saved)
    page.wait_for_selector("#interventions li")
    assert page.input_value("#interventions input[type=number]") == before


def test_a_mistake_is_told_where_it_was_made(chromium: Browser, url: str) -> None:
    session = Opened(chromium, url)
    page = session.page
    page.set_default_timeout(30_000)
    page.wait_for_selector("body.ready")
    steer(page, 3, 1.0)
    page.fill("#prompt", PROMPT)
    page.fill("#max_new_tokens", "-5")
    page.click("#generate")
    page.wait_for_selector("#settings-error:not([hidden])")
    assert page.inner_text("#settings-error").startswith("max_new_tokens")
    page.fill("#max_new_tokens", "5")
    page.locator("#interventions .menus select").last.select_option("other")
    page.fill("#interventions .scope-text", "nowhere")
    page.press("#interventions .scope-text", "Enter")
    page.click("#generate")
    page.wait_for_selector("#interventions .error:not([hidden])")
    assert "unknown scope 'nowhere'" in page.inner_text("#interventions .error")
    page.locator("#interventions .menus select").last.select_option("generation")
    page.locator("#prompt").evaluate(
        "node => { node.value = 'fog '.repeat(75_000); node.dispatchEvent(new Event('input')); }"
    )
    page.click("#generate")
    page.wait_for_selector("#prompt-error:not([hidden])")
    assert "256 kB" in page.inner_text("#prompt-error")
    page.fill("#search", "1000000000")
    page.wait_for_selector("#find-count:has-text('no feature')")
    assert page.locator(".run").count() == 0
    session.close()
