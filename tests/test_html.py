"""Pages' shared pieces: text of others is shown and never run; colours; a page in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.browser import PHONE, Opened, browser, check_axe, needs_browser, overflows

from steersman import html
from steersman.html import Token, fragment, render, shown

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = [
    "<script>alert(1)</script>",
    "' onmouseover=alert(1) x='",
    "שלום",
    "\u202eevil\x1b[2J",
    "👩‍🚀",
    "{{ 7 * 7 }}",
]

PAGE = """{% extends "base.html" %}
{% import "pieces.html" as pieces %}
{% block main %}
<h1>{{ name | shown }}</h1>
{{ pieces.tokens(tokens, 2.0) }}
{{ pieces.table(["token", "value"], rows, "values") }}
{{ pieces.keyvalues([(name, 3)]) }}
{{ pieces.figure(image, name) }}
{% endblock %}
"""
ONE_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000a49444154789c6300010000050001"
    "0d0a2db40000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


def page(folder: Path, name: str) -> Path:
    (folder / "page.html").write_text(PAGE)
    tokens = [Token(text, i - 1.0, title=text) for i, text in enumerate(HOSTILE)]
    made = render("page.html", folder, name=name, tokens=tokens, rows=[[t, 0.5] for t in HOSTILE], image=ONE_PIXEL)
    (folder / "made.html").write_text(made)
    return folder / "made.html"


def test_controls_are_written_out_and_markup_is_text() -> None:
    assert str(shown("\u202e<i>\x1b")) == "<bdi>\\u202e&lt;i&gt;\\x1b</bdi>"


def test_a_value_that_a_template_lacks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("{{ missing }}")
    with pytest.raises(Exception, match="missing"):
        render("page.html", tmp_path)


def test_a_cell_of_a_notebook_brings_its_styles(tmp_path: Path) -> None:
    (tmp_path / "cell.html").write_text("<p>{{ text | shown }}</p>")
    cell = fragment("cell.html", tmp_path, text="<x>")
    assert cell.startswith("<style>")
    assert "<div class=steersman><p><bdi>&lt;x&gt;</bdi></p></div>" in cell


def test_every_level_has_a_colour() -> None:
    css = html.style()
    for value in (1.0, -1.0):
        names = {html.level(value * i / html.LEVELS, 1.0) for i in range(1, html.LEVELS + 1)}
        assert len(names) == html.LEVELS
        assert all(f".{name} " in css for name in names)


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_hostile_text_is_text_and_the_page_is_accessible(chromium: Browser, tmp_path: Path, dark: bool) -> None:
    opened = Opened(chromium, page(tmp_path, HOSTILE[0]), dark=dark)
    assert HOSTILE[0] in opened.page.inner_text("h1")
    cells = opened.page.locator("tbody td:first-child").all_inner_texts()
    assert [cells[i] for i in (0, 1, 2, 4, 5)] == [HOSTILE[i] for i in (0, 1, 2, 4, 5)]
    assert cells[3] == "\\u202eevil\\x1b[2J"
    assert opened.page.locator(".tokens .a9").first.get_attribute("title") == HOSTILE[3]
    check_axe(opened.page)
    opened.check()
    opened.close()


@needs_browser
def test_a_phone_need_not_scroll_sideways(chromium: Browser, tmp_path: Path) -> None:
    opened = Opened(chromium, page(tmp_path, "x" * 200), size=PHONE)
    assert not overflows(opened.page)
    opened.close()
