"""The quickstart's report: texts told apart and never run, line ends seen, tables that scroll, figures in words."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import PHONE, WIDE, Opened, browser, check_axe, needs_browser, overflows

from steersman.demo.concept_features import ConceptFeature
from steersman.demo.report import FIGURES, write_report
from steersman.demo.results import Dose, Results, SteeredTarget
from steersman.demo.targets import Target
from steersman.demo.vectors import Targeted, Way
from steersman.sae import FeatureLabel, FeatureLabels
from steersman.sae.metrics import Reconstruction
from steersman.train.reports.evaluate import Evaluation
from steersman.train.reports.feature import Context, Feature
from steersman.train.reports.spliced import SplicedLoss

EVIL = "<img src=x onerror=alert(1)>"


def results(run: Path) -> Results:
    """Everything that a report may show, but for a vector taken apart, with text of others that is hostile."""
    plain, steered = ("a day", f"{EVIL} \u202ea \x1b[2Jday"), ("the rain\n<b>fell\x1b[2J", "the day")
    doses = [Dose(strength=strength, rate=rate, nll=1.0, texts=texts) for strength, rate, texts in
             ((0.0, 1.0, plain), (0.8, 30.0, steered))]  # fmt: skip
    target = Target(name=f"rain {EVIL}", words=("rain", "<b>"), candidates=(3,))
    way = Way(name="unsteered", norm=0.0, kl=0.0, rate=1.0, nll=2.0, texts=plain)
    ways = [way, *(dataclasses.replace(way, name=name, texts=steered) for name in ("feature direction", "SAE-TS"))]
    targeted = Targeted(target=target, feature=3, signal=9.0, n_texts=4, cosine=0.5, ways=ways)
    context = Context(activation=3.0, before="", token=EVIL, after="", document=0, position=0)
    features = [
        Feature(id=i, density=0.1, max_act=3.0, typical_act=2.0, p999=3.0, fires_on=[EVIL, "\n"], promotes=["שלום"],
                suppresses=[], contexts=[context])
        for i in range(30)
    ]  # fmt: skip
    figures = {field.name: 1 for field in dataclasses.fields(Reconstruction)}
    loss = {field.name: 1 for field in dataclasses.fields(SplicedLoss)}
    return Results(
        model_name=EVIL, hook_name="blocks.1.hook_resid_post", run=run,
        evaluation=Evaluation(reconstruction=Reconstruction(**figures), loss=SplicedLoss(**loss)),
        concepts=[ConceptFeature(concept="rain", feature=3, auroc=0.99, n_tokens=7)], features=features,
        steered=[SteeredTarget(target=target, feature=3, strength=0.8, doses=doses)], targeted=targeted, contrast=None,
        seconds=1.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    labels = FeatureLabels({3: FeatureLabel(text=f"rainy {EVIL}")})
    write_report(results(folder), folder / "report.html", labels, site="site")
    return folder / "report.html"


def test_each_text_stands_under_its_name(report: Path) -> None:
    page = report.read_text()
    assert page.count("<b>unsteered</b>") == page.count("<b>steered</b>") == 2
    shown = "<bdi>the <mark>rain</mark>↵&lt;b&gt;fell\\x1b[2J</bdi>"
    assert f'<div class="box steered"><b>steered</b><p>{shown}</p></div>' in page
    assert page.count('<div class="pair">') == 4


def test_tables_scroll_and_dark_mode_is_there(report: Path) -> None:
    page = report.read_text()
    assert page.count("<table>") == page.count('<div class="scroll"') == 4
    assert "overflow-x: auto" in page
    assert "prefers-color-scheme: dark" in page


def test_every_figure_has_words() -> None:
    for kind in (Reconstruction, SplicedLoss):
        assert set(kind(**{field.name: 0 for field in dataclasses.fields(kind)}).record()) <= set(FIGURES)


def test_features_lead_to_their_pages(report: Path, tmp_path: Path) -> None:
    assert report.read_text().count("site/features/3.html") == 3
    write_report(results(tmp_path), tmp_path / "report.html")
    assert "features/3.html" not in (tmp_path / "report.html").read_text(), "there is no site"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@needs_browser
@pytest.mark.parametrize(("dark", "size"), [(False, WIDE), (True, PHONE)])
def test_it_is_read_in_a_browser(report: Path, chromium: Any, dark: bool, size: tuple[int, int]) -> None:
    opened = Opened(chromium, report, size, dark)
    check_axe(opened.page)
    assert not overflows(opened.page)
    text = opened.page.locator("body").inner_text()
    assert text.count(EVIL) > 30
    assert "\\u202ea \\x1b[2Jday" in text
    alts = opened.page.locator("img").evaluate_all("all => all.map(one => one.alt)")
    assert all(alts), "a picture without words"
    assert not re.search("[\x1b\u202e]", opened.page.content())
    opened.check()
    opened.close()
