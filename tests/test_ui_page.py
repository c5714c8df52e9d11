"""The playground's page in a real Chromium, in front of a stand-in for its server that answers what a test chooses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.browser import PHONE, Opened, browser, check_axe, needs_browser, overflows, until
from support.playground_stand_in import HOSTILE, StandIn, standing_in

from steersman.visible import visible

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytest.importorskip("uvicorn", reason="no uvicorn (extra ui): the playground's page was not tested")
pytest.importorskip("starlette", reason="no starlette (extra ui): the playground's page was not tested")
pytestmark = needs_browser
SHOWN = visible(HOSTILE)
"""What a person sees of the hostile text: all of it, and nothing done."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[StandIn, str]]:
    with standing_in() as both:
        yield both


@pytest.fixture
def server(served: tuple[StandIn, str]) -> StandIn:
    served[0].reset()
    return served[0]


@pytest.fixture
def opened(chromium: Browser, served: tuple[StandIn, str], server: StandIn) -> Iterator[Opened]:
    page = Opened(chromium, served[1])
    page.page.set_default_timeout(30_000)
    page.page.wait_for_selector("body.ready")
    yield page
    page.check()
    page.close()


@pytest.fixture
def page(opened: Opened) -> Page:
    return opened.page


def add(page: Page, feature: int) -> None:
    page.click(f"li.feature[data-id='{feature}'] button:text-is('Add')")


def generate(page: Page, prompt: str = "Once") -> None:
    page.fill("#prompt", prompt)
    page.click("#generate")
    finished(page)


def finished(page: Page) -> None:
    page.wait_for_selector("#stop[aria-disabled=true]")
    until(page, "document.querySelector('#progress').textContent === ''")


def tokens(page: Page, side: str) -> Locator:
    return page.locator(f".box.{side} .tok")


def text_of(page: Page, side: str, run: int = -1) -> str:
    return page.locator(f".box.{side} .text").nth(run).inner_text()


def test_search_slide_generate_and_compare(page: Page, server: StandIn) -> None:
    assert "Write the beginning of a text" in page.inner_text("#runs")
    assert "Find a feature below" in page.inner_text("#steering-empty")
    page.fill("#search", "snow")
    until(page, "document.querySelectorAll('li.feature').length === 1")
    page.click("li.feature .open")
    page.wait_for_selector("li.feature .contexts mark")
    assert "promotes" in page.inner_text("li.feature .detail")
    add(page, 1)
    slider = page.locator("#interventions input[type=range]")
    assert slider.get_attribute("min") == "-4"
    slider.fill("2.5")
    assert page.input_value("#interventions input[type=number]") == "2.5"
    assert page.inner_text("#interventions .worth") == "12.5 raw"  # of a largest activation of 5
    generate(page, "Once upon")
    sent = server.asked_last("generate")
    assert sent["sides"] == ["steered", "plain"]
    assert sent["state"]["prompt"] == "Once upon"
    one = {"kind": "feature", "id": 1, "strength": 2.5, "mode": "add", "units": "max_act"}
    assert sent["state"]["interventions"] == [{**one, "scope": "generation", "include_bos": False}]
    assert sent["state"]["watch"] == [1]
    for side in ("steered", "plain"):
        assert text_of(page, side).startswith("HiOnce upon a time, snow fell on the town.")
    # " snow" is token 5, whose activation of 5 / 3 is a third of the largest; the first has none
    token = tokens(page, "steered").filter(has_text=re.compile("^ snow$"))
    assert token.get_attribute("data-hue") == "0"
    assert float(token.evaluate("node => node.style.getPropertyValue('--share')")) == pytest.approx(1 / 3, abs=1e-3)
    assert tokens(page, "steered").nth(1).get_attribute("data-hue") == "none"
    token.hover()
    assert re.search(r"#1 snow and cold\s*1\.67\s*0\.33 \S max", page.inner_text("#tip"))
    token.click()
    page.click(".picked li.feature[data-id='1'] .watch")
    assert page.locator("#results li[data-id='1'] .watch").get_attribute("aria-pressed") == "true"
    check_axe(page)


def test_modes_units_and_scopes(page: Page, server: StandIn) -> None:
    add(page, 1)
    menu = page.locator("#interventions .menus select")
    menu.nth(1).select_option("raw")
    assert page.input_value("#interventions input[type=number]") == "5"
    menu.nth(0).select_option("scale")
    assert menu.nth(1).locator("option").all_inner_texts() == ["raw"]
    assert page.locator("#interventions input[type=range]").get_attribute("max") == "4"
    menu.nth(2).select_option("other")
    page.fill("#interventions .scope-text", "2:10")
    page.press("#interventions .scope-text", "Enter")
    add(page, 2)
    page.uncheck("#interventions li:nth-child(2) input[type=checkbox]")
    page.click("#vector-add")
    generate(page)
    sent = server.asked_last("generate")["state"]["interventions"]
    assert [one.get("id", one.get("name")) for one in sent] == [1, HOSTILE], "what is off is not sent"
    assert (sent[0]["mode"], sent[0]["units"], sent[0]["strength"], sent[0]["scope"]) == ("scale", "raw", 0, "2:10")
    assert sent[1] == {"kind": "vector", "name": HOSTILE, "strength": 1, "scope": "generation", "include_bos": False}
    page.click("#interventions li:nth-child(1) .sign")
    assert page.locator("#interventions li").count() == 2
    page.click(".undo button")
    assert page.locator("#interventions li").count() == 3
    assert "#1" in page.inner_text("#interventions li:nth-child(1)")


def test_a_chat_goes_on_from_each_sides_own_replies(page: Page, server: StandIn) -> None:
    page.click("text=Chat")
    page.fill("#system", "Be brief.")
    add(page, 1)
    page.fill("#prompt", "Hello")
    page.press("#prompt", "Control+Enter")
    finished(page)
    assert page.input_value("#prompt") == ""
    sent = server.asked_last("generate")
    start = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (sent["state"]["messages"], sent["sides"]) == (start, ["steered", "plain"])
    server.words = {"steered": ["Snow", "!"], "plain": ["Yes", "."]}
    page.click("text=Again, as steered now")
    finished(page)
    assert page.locator(".run").count() == 1
    page.fill("#prompt", "And then?")
    page.click("#generate")
    finished(page)
    first, second = (body for path, body in server.asked[-2:] if path == "generate")
    assert (first["sides"], second["sides"]) == (["steered"], ["plain"])
    assert [m["content"] for m in first["state"]["messages"]] == ["Be brief.", "Hello", "Snow!", "And then?"]
    assert [m["content"] for m in second["state"]["messages"]] == ["Be brief.", "Hello", "Yes.", "And then?"]
    assert page.locator(".run .user").all_inner_texts() == ["Hello", "And then?"]
    check_axe(page)
    page.click("#talk-clear")
    assert page.locator(".run").count() == 0


def test_a_queue_is_shown_and_stopping_works(page: Page, server: StandIn) -> None:
    server.hold = "queue"
    page.fill("#prompt", "Once")
    page.click("#generate")
    until(page, "document.querySelector('#progress').textContent === '1 job ahead of yours'")
    server.hold = 4
    until(page, "document.querySelectorAll('.box.plain .tok').length === 5")  # the prompt's, and four
    page.press("#prompt", "Escape")
    finished(page)
    assert "stopped" in page.inner_text(".box.plain .foot")
    assert tokens(page, "plain").count() == 5
    server.hold = ""
    generate(page)
    assert "length reached" in page.locator(".box.plain .foot").first.inner_text()


def test_an_error_is_one_line_near_its_cause(opened: Opened, server: StandIn) -> None:
    page = opened.page
    add(page, 2)
    add(page, 1)
    page.locator("#interventions input[type=number]").nth(1).fill("1e9")
    page.click("#generate")
    card = page.locator("#interventions li").nth(1).locator(".error")
    card.wait_for()
    assert card.inner_text() == "strength must be at most 1000"
    assert page.locator(".run").count() == 0, "what was refused is no text"
    page.locator("#interventions input[type=number]").nth(1).fill("1")
    page.fill("#max_new_tokens", "-5")
    page.click("#generate")
    page.wait_for_selector("#settings-error:not([hidden])")
    assert page.inner_text("#settings-error") == "max_new_tokens must be from 1 to 100, got -5"
    assert page.get_attribute("#max_new_tokens", "aria-invalid") == "true"
    page.fill("#max_new_tokens", "3")
    server.fail = f"the model ran out of {HOSTILE}"
    page.click("#generate")
    page.wait_for_selector("#generate-error:not([hidden])")
    assert page.inner_text("#generate-error") == f"the model ran out of {SHOWN}"
    server.fail = ""
    generate(page)
    assert page.locator("#generate-error").is_hidden()
    page.route("**/api/features?*", lambda route: route.abort())
    page.fill("#search", "snow")
    page.wait_for_selector("#find-error:not([hidden])")
    assert "does not answer" in page.inner_text("#find-error")
    opened.errors = [error for error in opened.errors if "400" not in error and "ERR_FAILED" not in error]


def test_a_reload_loses_nothing_and_tabs_do_not_mix(opened: Opened, server: StandIn) -> None:
    page = opened.page
    add(page, 1)
    page.locator("#interventions input[type=number]").fill("1.75")
    page.fill("#seed", "7")
    generate(page, "Once upon\na time")
    before = text_of(page, "steered")
    page.click("#tab-code")
    until(
        page, "Object.values(sessionStorage).some(kept => kept.includes('1.75') && kept.includes('\"panel\":\"code\"'))"
    )
    page.evaluate("Storage.prototype.setItem = () => {}")  # as if it were to end without a word
    other = opened.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("body.ready")
    assert other.input_value("#interventions input[type=number]") == "1.75", "a new tab begins where one left off"
    other.locator("#interventions input[type=number]").fill("3")
    other.fill("#prompt", "another")
    other.close()
    page.reload()
    page.wait_for_selector("body.ready")
    assert page.input_value("#prompt") == "Once upon\na time"
    assert page.input_value("#interventions input[type=number]") == "1.75"
    assert page.input_value("#seed") == "7"
    assert text_of(page, "steered") == before
    assert page.get_attribute("#tab-code", "aria-selected") == "true"
    assert tokens(page, "steered").filter(has_text=re.compile("^ snow$")).get_attribute("data-hue") == "0"
    server.hold = 4
    page.click("#generate")
    until(page, "document.querySelectorAll('.run:first-child .box.plain .tok').length === 5")
    page.reload()
    page.wait_for_selector("body.ready")
    assert text_of(page, "plain", run=0).startswith("HiOnce upon")
    assert "broke off" in page.locator(".box.plain .foot").first.inner_text()


def test_a_phone_in_the_dark(chromium: Browser, served: tuple[StandIn, str], server: StandIn) -> None:
    opened = Opened(chromium, served[1], size=PHONE, dark=True, has_touch=True)
    page = opened.page
    page.wait_for_selector("body.ready")
    add(page, 0)
    add(page, 1)
    generate(page, HOSTILE)
    page.click("#dose-run")
    page.wait_for_selector(".result table")
    check_axe(page)
    assert not overflows(page)
    boxes = [page.locator(f".box.{side}").bounding_box() for side in ("steered", "plain")]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"], "one below the other"
    assert page.locator("#generate").is_visible(), "at hand wherever the page is scrolled to"
    paper = page.evaluate("getComputedStyle(document.querySelector('.panel')).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", paper)[:3])) < 200
    opened.check()
    opened.close()


def test_hostile_text_is_text(page: Page, server: StandIn, tmp_path: Path) -> None:
    add(page, 0)
    page.click("#vector-add")
    page.click("li.feature[data-id='0'] .open")
    page.wait_for_selector("li.feature .contexts")
    assert page.inner_text("li.feature[data-id='0'] .contexts mark") == SHOWN
    assert SHOWN in page.inner_text("li.feature[data-id='0'] .label")
    generate(page, HOSTILE)
    assert page.input_value("#prompt") == HOSTILE
    token = tokens(page, "steered").filter(has_text="onerror")
    assert token.inner_text() == SHOWN
    token.click()
    assert SHOWN in page.inner_text(".picked")
    for tool, button in (("dose", "#dose-run"), ("target", "#target-run"), ("decompose", "#decompose-run")):
        page.click(f"#tab-{tool}")
        page.click(button)
        page.wait_for_selector(f"#panel-{tool} .result table")
        assert SHOWN in page.inner_text(f"#panel-{tool} .result"), tool
    page.click("#tab-code")
    until(page, "document.querySelector('#panel-code pre').textContent.includes('onerror')")
    recipe = tmp_path / "<img src=x onerror=alert(3)>\u202e.yaml"
    recipe.write_text("edits: []")
    page.set_input_files("#recipe-file", recipe)
    until(page, "document.querySelector('#bar-note').textContent.startsWith('Loaded')")
    assert visible(recipe.name) in page.inner_text("#bar-note")
    assert page.input_value("#prompt") == HOSTILE
    assert page.locator("#interventions li").count() == 1
    assert page.locator("main img:not(.figure), main script").count() == 0


def test_tools(page: Page, server: StandIn) -> None:
    assert "Add a feature or a vector first" in page.inner_text("#panel-dose")
    add(page, 2)
    add(page, 1)
    page.select_option("#dose-of", index=1)
    page.fill("#dose-strengths", "0, 1,2.5")
    page.click("#dose-run")
    page.wait_for_selector("#panel-dose .figure")
    asked = server.asked_last("dose")
    assert (asked["intervention"], asked["strengths"], len(asked["state"]["interventions"])) == (1, [0, 1, 2.5], 2)
    assert page.get_attribute("#panel-dose .figure", "alt") == "KL and loss over strength"
    until(page, "document.querySelector('.figure').naturalWidth > 0")
    page.fill("#dose-strengths", "a lot")
    page.click("#dose-run")
    assert "strengths are numbers" in page.inner_text("#panel-dose .error")
    page.click("#tab-target")
    page.click("#target-run")
    page.wait_for_selector("#panel-target table")
    assert server.asked_last("target") == {"features": {"2": 1}}
    page.click("#panel-target .result button:text('Add to steering')")
    assert "target-1" in page.inner_text("#interventions li:nth-child(3)")
    assert page.input_value("#interventions li:nth-child(3) input[type=number]") == "2"
    page.click("#tab-decompose")
    page.select_option("#decompose-of", "feature 1")
    page.fill("#decompose-k", "4")
    page.click("#decompose-run")
    page.wait_for_selector("#panel-decompose table")
    assert server.asked_last("decompose") == {"feature": 1, "method": "omp", "k": 4}
    page.click("#tab-code")
    page.wait_for_selector("#panel-code a[href='api/vectors/target-1.safetensors']")
    with page.expect_download() as download:
        page.click("#recipe-save")
    assert Path(download.value.path()).read_text() == "edits: []\n"
    assert download.value.suggested_filename == "recipe.yaml"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy-python")
    until(page, "document.querySelector('#bar-note').textContent.startsWith('Copied')")
    assert page.evaluate("navigator.clipboard.readText()").startswith("# <img")
    check_axe(page)


def test_without_an_effects_map_the_target_panel_says_what_to_do(page: Page, server: StandIn) -> None:
    server.effects = False
    page.reload()
    page.wait_for_selector("body.ready")
    page.click("#tab-target")
    assert "--effects" in page.inner_text("#panel-target")


def test_keyboard(page: Page, server: StandIn) -> None:
    page.keyboard.press("/")
    assert focused(page) == "search"
    page.keyboard.type("1")
    page.keyboard.press("Escape")
    page.locator("#search").blur()
    add(page, 1)
    page.keyboard.press("s")
    before = float(page.input_value("#interventions input[type=range]"))
    page.keyboard.press("ArrowRight")
    assert float(page.input_value("#interventions input[type=number]")) > before
    page.keyboard.press("p")
    assert focused(page) == "prompt"
    page.keyboard.type("Once /?s")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert focused(page) == "prompt", "where the focus was, it stays"
    assert server.asked_last("generate")["state"]["prompt"] == "Once /?s"
    said = page.inner_text("#status-live")
    assert said.startswith("Done. Steered: Once upon a time, snow fell")
    page.locator(".box.steered .text").focus()
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == " snow"
    assert "1.67" in page.inner_text("#tip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Close the list"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == " snow"
    page.locator("#tab-dose").focus()
    page.keyboard.press("ArrowLeft")
    assert focused(page) == "tab-code"
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    check_axe(page)
    page.uncheck("#single-keys")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#help").is_hidden(), "single letters can be turned off"


def focused(page: Page) -> Any:
    return page.evaluate("document.activeElement.id || document.activeElement.textContent")
