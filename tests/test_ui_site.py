"""The site of features: its files, and in a real browser the table, the pages and what hostile text does to them."""

import http.server
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.browser import PHONE, WIDE, Opened, browser, check_axe, needs_browser, overflows
from support.sites import HOSTILE, Planted, planted_site

from steersman.errors import SteersmanError
from steersman.train import DetailedReport, detail_features
from steersman.ui.site import ScoreColumn, check_site, write_site
from steersman.visible import visible

NAME = "<img src=x onerror=alert(5)>"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def report(planted: Planted) -> DetailedReport:
    return detail_features(planted.sae, planted.store, planted.lm, contexts=3)


@pytest.fixture(scope="module")
def index(planted: Planted, report: DetailedReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / NAME
    score = ScoreColumn(torch.arange(130.0).masked_fill(torch.arange(130) % 3 == 0, torch.nan), "a unit")
    return write_site(report, folder, name=NAME, labels=planted.labels, scores={"output": score})


# Files


def test_a_folder_holds_the_table_and_a_page_for_each_feature(index: Path) -> None:
    assert len(list((index.parent / "features").iterdir())) == 130
    assert json.loads((index.parent / "site.json").read_text())["alive"] == 120
    assert not [path for path in index.parent.parent.iterdir() if path != index.parent], "a temporary folder stayed"
    for page in index.parent.rglob("*.html"):
        assert not re.search(r"(src|href)=.?(https?:|//)", page.read_text()), "a page asks another host for something"


def test_a_site_of_ours_is_replaced_and_nothing_else_is(report: DetailedReport, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_site(report, out, name="one")  # an empty folder is as good as none
    (out / "features" / "9999.html").write_text("of an older, wider SAE")
    write_site(report, out, name="two")
    assert "two" in (out / "index.html").read_text()
    assert not (out / "features" / "9999.html").exists()
    for mine in (out / "notes.txt", out / "features" / "mine.html"):
        mine.write_text("mine")
        with pytest.raises(SteersmanError, match="is no part of the site"):
            write_site(report, out, name="three")
        assert mine.read_text() == "mine"
        mine.unlink()
    for foreign in ("file", "folder"):
        place = tmp_path / foreign
        if foreign == "folder":
            place.mkdir()
        (place / "x" if foreign == "folder" else place).write_text("mine")
        with pytest.raises(SteersmanError, match="something else than a site|no folder of its own"):
            check_site(place)
    (tmp_path / "folder" / "site.json").write_text('{"format": "another"}')
    with pytest.raises(SteersmanError, match="something else than a site"):
        check_site(tmp_path / "folder")


def test_a_site_of_some_features_leads_to_no_other(report: DetailedReport, tmp_path: Path) -> None:
    out = write_site(report, tmp_path / "some", name="some", only=[40, 3, 129, 40]).parent
    assert sorted(path.name for path in (out / "features").iterdir()) == ["129.html", "3.html", "40.html"]
    table = json.loads((out / "features.js").read_text().removeprefix("const FEATURES = ").rstrip(";\n"))
    assert table["id"] == [3, 40, 129]
    assert table["density"] == [float(f"{report.features[i].density:.4g}") for i in (3, 40, 129)]
    page = (out / "features" / "40.html").read_text()
    assert set(re.findall(r"href=(\d+)\.html", page)) <= {"3", "129"}
    assert "rel=prev href=3.html" in page
    assert "rel=next href=129.html" in page
    assert "3 of them have a page here" in (out / "index.html").read_text()
    with pytest.raises(SteersmanError, match="features 3 to 130 asked for of an SAE of 130"):
        write_site(report, tmp_path / "some", name="some", only=[3, 130])


def test_what_interrupts_the_writing_leaves_the_old_site_or_none(
    report: DetailedReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steersman.ui.site.write as write

    def broken(detail: Any, *more: Any) -> Any:
        if detail.feature.id == 60:
            raise KeyboardInterrupt
        return page(detail, *more)

    page, new, old = write.feature_page, tmp_path / "new", tmp_path / "old"
    write_site(report, old, name="the old one")
    monkeypatch.setattr(write, "feature_page", broken)
    for place in (new, old):
        with pytest.raises(KeyboardInterrupt):
            write_site(report, place, name="half")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert "the old one" in (old / "index.html").read_text()
    monkeypatch.undo()
    left = tmp_path / ".old.new.tmp" / "features"  # as a killed process leaves it
    left.mkdir(parents=True)
    (left / "3.html").write_text("half")
    write_site(report, old, name="whole")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# In a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    pages: list[Opened] = []

    def open_page(*given: Any, **more: Any) -> Opened:
        pages.append(Opened(chromium, *given, **more))
        return pages[-1]

    yield open_page
    for page in pages:
        page.check()
        page.close()


def ids(page: Any) -> list[int]:
    return [int(text) for text in page.locator("#table tbody td[data-key=id]").all_inner_texts()]


@needs_browser
def test_the_table_is_searched_and_sorted(index: Path, report: DetailedReport, opened: Any) -> None:
    page = opened(index).page
    by_tenth = sorted(range(120), key=lambda i: (-float(f"{report.features[i].typical_act:.4g}"), i))
    assert ids(page) == by_tenth[:100]
    assert page.locator("#count").inner_text() == "120 of 130 features"
    page.keyboard.press("/")
    page.keyboard.type("LABEL-4")
    assert sorted(ids(page)) == [4, 40, 42, 44, 46, 48]
    check_axe(page)
    page.fill("#search", "125")
    assert ids(page) == [125], "a feature is found by its id, also one that never fires"
    page.fill("#search", "")
    density = page.locator("th[data-key=density]")
    density.locator("button").focus()
    page.keyboard.press("Enter")
    assert density.get_attribute("aria-sort") == "descending"
    expected = sorted(range(120), key=lambda i: (-report.features[i].density, i))
    assert ids(page) == expected[:100]
    page.keyboard.press("Enter")
    assert density.get_attribute("aria-sort") == "ascending"
    assert page.locator("th[aria-sort]").count() == 1
    page.locator("#forward").click()
    assert page.locator("#page").inner_text() == "101 to 120"
    assert page.locator("#forward").is_disabled()
    page.check("#dead")
    assert len(set(ids(page))) == 100
    page.locator("th[data-key='score output'] button").click()
    assert ids(page)[:3] == [128, 127, 125]
    page.locator("#forward").click()
    assert ids(page)[-1] == 129, "what has no score comes last"


@needs_browser
def test_the_table_of_some_features_has_their_ids(report: DetailedReport, opened: Any, tmp_path: Path) -> None:
    page = opened(write_site(report, tmp_path / "some", name="some", only=[3, 40, 129])).page
    assert sorted(ids(page)) == [3, 40]
    page.fill("#search", "129")
    assert ids(page) == [129]
    page.locator("#table tbody a").first.click()
    assert page.locator("h1").inner_text().startswith("Feature 129")


@needs_browser
def test_a_feature_is_opened_and_its_values_are_seen(index: Path, report: DetailedReport, opened: Any) -> None:
    page = opened(index).page
    page.fill("#search", "label-12")
    first = ids(page)[0]
    page.locator("#table tbody a").first.click()
    assert page.url.endswith(f"/features/{first}.html")
    check_axe(page)
    context = report.detail(first).groups[0].contexts[0]
    largest = next(one.value for one in context.tokens if one.value)
    page.locator("nav button").click()  # wrapped, so that no token is cut off
    for token, value in (
        (page.locator(".c b").first, largest),
        (page.locator(".c bdi:last-child b").first, context.value),
    ):
        token.hover()
        shown = token.evaluate("one => getComputedStyle(one, '::after').content")
        assert float(shown.strip('"')) == pytest.approx(value, rel=0.01)
    assert page.locator("p.c").first.evaluate("one => getComputedStyle(one).whiteSpace") == "pre-wrap"
    page.locator("nav button").click()
    assert page.locator("p.c").first.evaluate("one => getComputedStyle(one).whiteSpace") == "pre"
    assert page.locator(".c i").first.inner_text() == f"{context.value:.3g}"
    text = page.locator("p.c").first.evaluate(
        "one => [...one.querySelectorAll('bdi')].map(b => b.textContent).join('')"
    )
    assert text == "".join(visible(one.text) for one in context.tokens)
    page.keyboard.press("ArrowRight")
    page.wait_for_url(f"**/features/{first + 1}.html")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(f"**/features/{first}.html")
    other = page.locator("ol a").first
    number = other.inner_text()
    other.click()
    page.wait_for_url(f"**/features/{number}.html")
    page.go_back()
    page.go_back()
    page.go_back()
    page.go_back()
    assert page.locator("#search").input_value() == "label-12", "the table is as it was left"


@needs_browser
@pytest.mark.parametrize(
    ("where", "dark", "size"),
    [
        ("index.html#q=label-4", True, WIDE), ("index.html#q=label-4", False, PHONE), ("features/3.html", True, WIDE),
        ("features/3.html", False, PHONE), ("features/129.html", True, PHONE),
    ],
)  # fmt: skip
def test_pages_are_legible_in_the_dark_and_on_a_phone(
    index: Path, opened: Any, where: str, dark: bool, size: tuple[int, int]
) -> None:
    page = opened(f"{index.parent.as_uri()}/{where}", size, dark).page
    check_axe(page)
    assert not overflows(page)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == dark


@needs_browser
def test_hostile_text_is_shown_and_never_run(index: Path, report: DetailedReport, opened: Any) -> None:
    page = opened(index).page
    assert NAME in page.locator("h1").inner_text()
    labels = page.locator("td[data-key=label]").all_inner_texts()
    chips = set(page.locator("td code").all_text_contents())
    for text in HOSTILE:
        assert any(visible(text) in label or visible(text).strip() in label for label in labels), text
        assert visible(text) in chips, text
    assert page.locator("img").count() == 1, "the figure and nothing else"
    feature = next(i for i in range(120) if any("script" in token for token in report.features[i].fires_on))
    page = opened(index.parent / "features" / f"{feature}.html").page
    assert page.locator("img, script:not([src])").count() == 0
    assert "<script>alert(1)</script>" in page.locator("section").first.inner_text()
    assert "49" not in page.title()
    assert "\x1b" not in page.content()
    assert "\u202e" not in page.content()


@needs_browser
def test_it_opens_from_a_web_server(index: Path, opened: Any) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(index.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = opened(f"http://127.0.0.1:{server.server_port}/").page
        page.locator("#table tbody a").first.click()
        assert page.locator("h1").inner_text().startswith("Feature ")
    finally:
        server.shutdown()
        server.server_close()
