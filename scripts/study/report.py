"""A page of the study's results: its sections, numbers and tables in Markdown, and the plots that the parts share."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from steersman.figures import svg
from steersman.steer import Estimate
from study.common import PAPERS

COLOURS = ("#0969da", "#e8710a", "#1a7f37", "#8250df", "#cf222e", "#9a6700", "#0e7490", "#bf3989")
"""Told apart by those who see colours otherwise too, on the white that every plot brings along."""
INK, GREY = "#1f2328", "#6e7781"
STYLE: Any = {
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlesize": 10, "font.size": 9, "text.color": INK, "xtick.color": GREY, "xtick.labelcolor": INK,
    "ytick.color": GREY, "ytick.labelcolor": INK, "legend.frameon": False, "axes.prop_cycle": cycler(color=COLOURS),
}  # fmt: skip
Interval: TypeAlias = Estimate | Mapping[str, float]
"""An estimate, or what JSON has of one: `mean`, `low`, `high`, `n`."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of strings; `cell` and `number` make them of figures."""

    caption: str
    """What its rows and columns are, with units, and over what the intervals are."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot, drawn when the page is written."""

    name: str
    """The file is PART-NAME.svg beside the page."""
    alt: str
    """What it shows, for those who do not see it."""
    draw: Callable[[], Drawing]
    """The matplotlib figure: of `intervals` or `curves`, or another, drawn under `STYLE`."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page of one part. Every figure in its texts comes from the results."""

    name: str
    """The part's."""
    title: str
    asked: str
    """What was asked, Markdown."""
    how: str
    """How it was measured: enough to do it again, with the settings that matter."""
    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    means: str
    """What the figures mean, in words that they choose."""
    change: str
    """What would change it: other settings, models, data that were not tried."""
    answer: str = ""
    """The answer in one sentence, for the index; by default the first paragraph of `means`."""
    not_run: Sequence[str] = field(default_factory=tuple)
    """What else was not run, beside the rows that `Results.planned` names and the file lacks."""


def number(value: float | None, digits: int = 3, *, signed: bool = False, percent: bool = False) -> str:
    """A number to some digits, without an exponent where it is not tiny; a dash for what was not measured.

    >>> number(0.04567), number(12345.6), number(0.5, signed=True), number(0.1234, percent=True), number(None)
    ('0.0457', '12,346', '+0.5', '12.3 %', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    value = 100 * value if percent else value
    large = abs(value) >= 10 ** (digits - 1)
    text = format(value, ("+" if signed else "") + (",.0f" if large else f".{digits}g"))
    return f"{text} %" if percent else text


def cell(estimate: Interval | None, *, signed: bool = False, percent: bool = False) -> str:
    """A mean with its interval, to as many decimals as the interval's width has two digits.

    >>> cell({"mean": 0.12345, "low": 0.1012, "high": 0.1519, "n": 9}), cell(None)
    ('0.123 [0.101, 0.152]', '-')
    """
    if estimate is None:
        return "-"
    mean, low, high = (100 * value if percent else value for value in bounds(estimate))
    if not all(map(math.isfinite, (mean, low, high))):
        return "-"
    scale = (high - low) / 2 or abs(mean) / 10 or 1.0
    decimals = min(6, max(0, 1 - math.floor(math.log10(scale))))
    shown = [format(value, f"{'+' if signed else ''},.{decimals}f") for value in (mean, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" + (" %" if percent else "")


def bounds(estimate: Interval) -> tuple[float, float, float]:
    """(mean, low, high)."""
    value = asdict(estimate) if isinstance(estimate, Estimate) else estimate
    return value["mean"], value["low"], value["high"]


def side(estimate: Interval | None, of: float = 0.0) -> int:
    """1 where the whole interval is above `of`, -1 where it is below, else 0: to choose the words by."""
    if estimate is None:
        return 0
    _, low, high = bounds(estimate)
    return (low > of) - (high < of)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def intervals(
    rows: Mapping[str, Interval] | Mapping[str, Mapping[str, Interval]], label: str, *, at: float | None = None
) -> Drawing:
    """Means with their intervals, a line for each name from the top: of one series, or of {series: {name: estimate}}.

    `label` is the x axis's; `at` marks a value, such as that of no effect.
    """
    given = list(rows.values())
    several = bool(given) and isinstance(given[0], Mapping) and "mean" not in given[0]
    series: dict[str, Any] = dict(rows) if several else {"": rows}
    names = list(dict.fromkeys(name for one in series.values() for name in one))
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.2, 0.9 + 0.24 * len(names) * max(1.0, 0.6 * len(series))), layout="constrained")
        axes = figure.subplots()
        if at is not None:
            axes.axvline(at, color=GREY, linewidth=0.8, linestyle=":")
        for i, (title, found) in enumerate(series.items()):
            shift = 0.7 * ((i + 0.5) / len(series) - 0.5)
            shown = [(names.index(name) + shift, bounds(one)) for name, one in found.items() if one is not None]
            y = [place for place, _ in shown]
            axes.hlines(y, [v[1] for _, v in shown], [v[2] for _, v in shown], color=COLOURS[i % 8], linewidth=1.6)
            axes.plot([v[0] for _, v in shown], y, "o", color=COLOURS[i % 8], markersize=4, label=title)
        axes.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        if several:
            figure.legend(loc="outside right upper", fontsize=8)
    return figure


def curves(
    series: Mapping[str, Sequence[tuple[float, float | Interval]]], x: str, y: str, *, log: bool = False,
    at: float | None = None,
) -> Drawing:  # fmt: skip
    """Lines through (x, value) or (x, estimate), whose intervals are shaded. `log`: of the x axis."""
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.2, 3.4), layout="constrained")
        axes: Axes = figure.subplots()
        if at is not None:
            axes.axhline(at, color=GREY, linewidth=0.8, linestyle=":")
        for i, (name, points) in enumerate(series.items()):
            places = [float(place) for place, _ in points]
            values = [(v, v, v) if isinstance(v, int | float) else bounds(v) for _, v in points]
            style = ("o", "s", "^", "D")[i // 8 % 4]
            axes.plot(places, [v[0] for v in values], f"{style}-", color=COLOURS[i % 8], markersize=4, label=name)
            if any(v[1] != v[2] for v in values):
                low, high = [v[1] for v in values], [v[2] for v in values]
                axes.fill_between(places, low, high, color=COLOURS[i % 8], alpha=0.13, linewidth=0)
        axes.set(xlabel=x, ylabel=y, xscale="log" if log else "linear")
        ticks = sorted({float(place) for points in series.values() for place, _ in points})
        if log and len(ticks) <= 8:
            axes.set_xticks(ticks, [number(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
        if len(series) > 1:
            figure.legend(loc="outside right upper", fontsize=8)
    return figure


def markdown(page: Page, results: Mapping[str, Any]) -> str:
    """The page as Markdown, with how its results came about at its end."""
    parts = [f"# {page.title}", GENERATED, "## What was asked", page.asked, "## How", page.how, "## Results"]
    for table in page.tables:
        parts += [table.caption, table_text(table)]
    parts += [f"![{figure.alt}]({page.name}-{figure.name}.svg)" for figure in page.figures]
    parts += ["## What it means", page.means, "## What would change it", page.change]
    return "\n\n".join(part.strip() for part in [*parts, *footer(page, results)]) + "\n"


GENERATED = "<!-- Written by `python scripts/study pages` from docs/results/json; nothing here is typed. -->"


def table_text(table: Table) -> str:
    """A Markdown table."""
    wrong = [row for row in table.rows if len(row) != len(table.header)]
    if wrong:
        raise ValueError(f"a row of {len(wrong[0])} cells under {len(table.header)} columns: {wrong[0]}")
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def footer(page: Page, results: Mapping[str, Any]) -> list[str]:
    """How the results came about, and what was not run."""
    settings, seconds = results["settings"], results["seconds"].values()
    wall, used = (sum(one[kind] for one in seconds) for kind in ("wall", "processor"))
    told = [
        f"Model {settings['model']}, seed {settings['seed']}; {places(results)}.",
        f"{len(results['rows'])} rows in {duration(wall)} ({duration(used)} of the processor), beside what is shared.",
        f"[The results as JSON](json/{page.name}.json).",
    ]
    missing = not_run(page, results)
    said = f"Not run: {', '.join(missing)}." if missing else "Every row that was planned was run."
    block = f"<!-- not run: it takes long -->\n```bash\n{command(results)}\n```"
    return ["## How it was run", block, " ".join(told), said]


def places(results: Mapping[str, Any]) -> str:
    """Devices and versions, each with its number of rows where there are several."""
    rows = Counter(results.get("made", {}).get(name, 0) for name in results["rows"])
    told = []
    for i, about in enumerate(results["about"]):
        versions = ", ".join(f"{name} {about[name]}" for name in about if name not in ("device", "threads"))
        threads = f"{about['threads']} thread" + "s" * (about["threads"] != 1)
        many = f"{rows[i]} row{'s' * (rows[i] != 1)} on " if len(rows) > 1 else ""
        told += [f"{many}{about['device']}, {threads}, {versions}"] if rows[i] else []
    return "; ".join(told)


def not_run(page: Page, results: Mapping[str, Any]) -> list[str]:
    """What the part's page says that was not run."""
    missing = [f"`{name}`" for name in results.get("planned", ()) if name not in results["rows"]]
    if len(missing) > MOST_NAMED:
        missing = [*missing[: MOST_NAMED // 2], f"{len(missing) - MOST_NAMED // 2} more rows, up to {missing[-1]}"]
    return [*page.not_run, *missing]


MOST_NAMED = 8
"""Missing rows that are all named; of more the first ones are."""


def answer(page: Page) -> str:
    """What the index says of a part."""
    return page.answer or page.means.strip().split("\n\n")[0]


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(42.3), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def command(results: Mapping[str, Any]) -> str:
    """The command of a part: its settings where they are not the default."""
    words = [f"python scripts/study {results['part']}"]
    settings, config = results["settings"], import_module(f"study.{results['part']}").Config
    if settings["model"] != config.model:
        words.append(f"--model runs/{settings['model']}")
    if settings["data"] == PAPERS:
        words.append("--data DATA")
    for one in fields(config):
        value = settings.get(one.name)
        if one.name not in settings or one.name in ("model", "data") or value == plain(one.default):
            continue
        flag = one.name.replace("_", "-")
        shown = [str(part) for part in value] if isinstance(value, list) else [str(value)]
        words.append(
            f"--no-{flag}" if value is False else f"--{flag}" if value is True else " ".join([f"--{flag}", *shown])
        )
    return " ".join(words)


def plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def write(page: Page, results: Mapping[str, Any], out: Path) -> None:
    """Write PART.md and PART-NAME.svg for each figure."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{page.name}.md").write_text(markdown(page, results), encoding="utf-8")
    for figure in page.figures:
        if not re.fullmatch(r"[a-z0-9_]+", figure.name):
            raise ValueError(f"{figure.name}: a figure's name is of small letters, digits and _")
        with mpl.rc_context(STYLE):
            (out / f"{page.name}-{figure.name}.svg").write_bytes(svg(figure.draw()))
