"""Write the site: all of it, under another name first, or nothing.

    index.html  features.js  site.js        the table
    features/0.html ...  page.js            a page for each feature
    site.css  site.json                     what both share; what the site is of

A folder is a site of ours when its `site.json` says so, and everything in it has a name that we give.
"""

import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from steersman.errors import SteersmanError
from steersman.files import make_folder
from steersman.folders import remove_folder
from steersman.html import FOLDER as TEMPLATES
from steersman.html import render, style
from steersman.progress import progress
from steersman.reading import read_json_object
from steersman.sae.feature_labels import FeatureLabels
from steersman.train.reports.detailed import DetailedReport
from steersman.ui.site.pages import feature_page
from steersman.ui.site.table import ScoreColumn, columns, plot_table, table_script
from steersman.version import __version__
from steersman.visible import visible

__all__ = ["check_site", "write_site"]

log = logging.getLogger(__name__)

FORMAT, VERSION = "steersman.site", 1
ABOUT, PAGES = "site.json", "features"
SCRIPTS = ("site.js", "page.js")
_FILES = ("index.html", "features.js", "site.css", ABOUT, *SCRIPTS)
_PAGE = re.compile(r"\d+\.html")


def write_site(
    report: DetailedReport,
    folder: str | os.PathLike[str],
    *,
    name: str,
    labels: FeatureLabels | None = None,
    scores: Mapping[str, ScoreColumn] | None = None,
    only: Collection[int] = (),
) -> Path:
    """Write the site of `report` to `folder`, in place of one of ours that is there, and return its first page.

    Args:
        report: the features in full.
        folder: where; made if it is not there.
        name: what the SAE is called.
        labels: what the features stand for.
        scores: scores of the features by name, columns of the table.
        only: the features that have a row in the table and a page; all of them if none are given.

    Raises:
        SteersmanError: a feature that the SAE does not have; a folder that holds anything else than a site of ours, or cannot be written. Whatever is raised,
            and when the process is killed, what was in `folder` before stays as it was.
    """
    check_site(folder)
    shown = sorted(set(only)) or list(range(len(report)))
    if not 0 <= shown[0] <= shown[-1] < len(report):
        raise SteersmanError(f"features {shown[0]} to {shown[-1]} asked for of an SAE of {len(report)}")
    folder = Path(os.path.abspath(folder))
    labels, scores = labels or FeatureLabels(), scores or {}
    made, old = (folder.with_name(f".{folder.name}.{word}.tmp") for word in ("new", "old"))
    make_folder(folder.parent)
    try:
        for left in (made, old):  # by a process that was killed
            _remove(left)
        _write(report, made, name, labels, scores, shown)
        os.sync()
        if folder.exists():
            folder.rename(old)
        try:
            made.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        _remove(old)
    except OSError as error:
        raise SteersmanError(f"{folder} could not be written: {error.strerror or error}") from error
    finally:
        _remove(made)
    return folder / "index.html"


def check_site(folder: str | os.PathLike[str]) -> None:
    """Raise SteersmanError where `folder` is there and is neither empty nor a site of ours and nothing else."""
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise SteersmanError(f"{folder} is no folder of its own: name one to write the site to")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    about = folder / ABOUT
    if not about.is_file() or read_json_object(about).get("format") != FORMAT:
        raise SteersmanError(f"{folder} holds something else than a site of ours: name an empty or a new folder")
    if others := _others(folder):
        raise SteersmanError(
            f"{folder / others[0]} is no part of the site, which is written anew as a whole: move it elsewhere first"
        )


def _others(folder: Path) -> list[str]:
    """What is in a site's folder and has no name that we give."""
    found = [entry.name for entry in folder.iterdir() if entry.name not in (*_FILES, PAGES)]
    pages = folder / PAGES
    inside = list(pages.iterdir()) if pages.is_dir() else []
    return sorted(found) + sorted(f"{PAGES}/{entry.name}" for entry in inside if not _PAGE.fullmatch(entry.name))


def _remove(folder: Path) -> None:
    """Remove a folder with a site in it, whole or not, and nothing that we did not write."""
    pages = folder / PAGES
    if pages.is_dir() and not folder.is_symlink() and not pages.is_symlink():
        remove_folder(pages, [entry.name for entry in pages.iterdir() if _PAGE.fullmatch(entry.name)])
    remove_folder(folder, _FILES)


def _write(
    report: DetailedReport, folder: Path, name: str, labels: FeatureLabels, scores: Mapping[str, ScoreColumn],
    shown: list[int],
) -> None:  # fmt: skip
    (folder / PAGES).mkdir(parents=True)
    features = report.features
    alive = sum(one.max_act > 0 or bool(one.contexts) for one in features)
    about = {
        "name": visible(name),
        "model": visible(report.model_name),
        "hook": visible(report.hook_name),
        "features": len(features),
        "pages": len(shown),
        "alive": alive,
        "tokens": report.stats.n_tokens,
        "pairs_share": report.details.share,
        "version": __version__,
    }
    identity = {"format": FORMAT, "format_version": VERSION, **about}
    (folder / ABOUT).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    for script in SCRIPTS:
        (folder / script).write_bytes((TEMPLATES / script).read_bytes())
    (folder / "site.css").write_text(style() + style("site.css"), encoding="utf-8")
    (folder / "features.js").write_text(table_script(report, labels, scores, shown), encoding="utf-8")
    index = render(
        "site_index.html",
        root="",
        about=about,
        ends=(shown[0], shown[-1]),
        columns=columns(scores, labelled=bool(labels)),
        figure=plot_table(report),
    )
    (folder / "index.html").write_text(index, encoding="utf-8")
    there, around = set(shown), zip([None, *shown[:-1]], [*shown[1:], None])
    for detail, (before, after) in zip(progress(map(report.detail, shown), desc="pages", total=len(shown)), around):
        known = {score: float(column.values[detail.feature.id]) for score, column in scores.items()}
        page = feature_page(detail, features, labels, known, report.details.share)
        html = render("site_feature.html", root="../", page=page, before=before, after=after, there=there)
        (folder / PAGES / f"{page.id}.html").write_text(html, encoding="utf-8")
