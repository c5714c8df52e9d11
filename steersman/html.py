"""Pages and notebook cells: Jinja2 templates that escape what is put into them, and the pieces they share.

`templates/base.html` is the frame of a page, `templates/pieces.html` the macros (tables, coloured tokens, figures),
`templates/base.css` the one set of colours, light and dark. Text of others, such as tokens, labels, prompts and file
names, goes in as plain strings and comes out as text, with control characters written out (`shown`).
"""

import base64
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from steersman.figures import png
from steersman.visible import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LEVELS", "Token", "card", "fragment", "level", "picture", "render", "shown", "style"]

FOLDER = Path(__file__).with_name("templates")
LEVELS = 9
"""Depths of colour of a token."""


class Token(NamedTuple):
    """A token as `pieces.tokens` shows it."""

    text: str
    value: float
    """Its activation: 0 is no colour, negative another."""
    title: str = ""
    """What hovering shows; the value where empty."""


@cache
def environment(*folders: Path) -> Environment:
    """The templates of `folders`, then those shared by all."""
    made = Environment(
        loader=FileSystemLoader([*folders, FOLDER]), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {"shown": shown, "number": number, "level": level}
    made.globals |= {"style": style, "picture": picture}
    return made


def render(template: str, *folders: Path, **values: Any) -> str:
    """The page that a template makes of `values`; templates of `folders` come before the shared ones."""
    return environment(*folders).get_template(template).render(**values)


def fragment(template: str, *folders: Path, **values: Any) -> str:
    """What a notebook shows of `values`: the styles and the template, inside an element of its own."""
    inside = Markup(render(template, *folders, **values))
    return str(Markup("<style>{}</style><div class=steersman>{}</div>").format(style(), inside))


def card(
    title: object,
    facts: Iterable[tuple[str, object]] = (),
    *,
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[object]]]] = (),
    text: str = "",
    figures: "Sequence[tuple[Figure, str]]" = (),
) -> str:
    """How an object shows itself in a notebook: its line, facts by name, tables (header, rows), text that keeps its
    lines, and figures with the words that stand for them."""
    return fragment("card.html", title=title, facts=list(facts), tables=tables, text=text, figures=figures)


@cache
def style(name: str = "base.css") -> Markup:
    """A stylesheet of the shared templates, to stand inside a page."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def shown(text: object, newline: str = "↵") -> Markup:
    """Text of others as HTML that shows it and does nothing else: escaped, control characters and directions of writing
    written out, and set apart from its neighbours, so that right-to-left text turns none of them around.

    >>> str(shown("<b>one\\n"))
    '<bdi>&lt;b&gt;one↵</bdi>'
    """
    return Markup("<bdi>{}</bdi>").format(visible(str(text), newline=newline))


def number(value: object) -> str:
    """A number for a table cell: thousands apart, four digits of a fraction; other values as they are.

    >>> number(12345), number(0.123456), number("-")
    ('12,345', '0.1235', '-')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def level(value: float, largest: float) -> str:
    """The CSS class of a token's colour: a1 to a9 by its share of `largest`, n1 to n9 where negative, none for 0.

    >>> level(0.0, 2.0), level(2.0, 2.0), level(-0.1, 2.0), level(1e-9, 2.0)
    ('', 'a9', 'n1', 'a1')
    """
    if not value or not largest:
        return ""
    share = min(abs(value) / abs(largest), 1.0)
    return f"{'a' if value > 0 else 'n'}{max(1, round(share * LEVELS))}"


def picture(source: "Figure | bytes", alt: str) -> Markup:
    """A matplotlib figure, or a PNG file's bytes, inside the page, with the text that stands for it."""
    if not isinstance(source, bytes):
        source = png(source)
    return Markup("<img alt='{}' src='data:image/png;base64,{}'>").format(
        escape(alt), base64.b64encode(source).decode()
    )
