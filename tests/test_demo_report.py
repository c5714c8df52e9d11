"""The report's pieces: texts told apart, line ends seen, tables that scroll, figures in words."""

import dataclasses

from steersman.demo.report import FIGURES, STYLE, _pairs, _table
from steersman.sae.metrics import Reconstruction
from steersman.train.reports.evaluate import SplicedLoss


def test_each_text_stands_under_its_name() -> None:
    page = _pairs(("unsteered", "steered"), [("a day", "the rain\n<b>fell\x1b[2J")], ("rain",))
    assert page.count("<b>unsteered</b>") == page.count("<b>steered</b>") == 1
    assert "<div class='box steered'><b>steered</b><p>the <mark>rain</mark>↵&lt;b&gt;fell\\x1b[2J</p>" in page


def test_tables_scroll_and_dark_mode_is_there() -> None:
    assert _table(["a"], [[1]]).startswith("<div class=scroll><table>")
    assert "overflow-x: auto" in STYLE
    assert "prefers-color-scheme: dark" in STYLE


def test_every_figure_has_words() -> None:
    for kind in (Reconstruction, SplicedLoss):
        assert set(kind(**{field.name: 0 for field in dataclasses.fields(kind)}).record()) <= set(FIGURES)
