"""The README's table of the study, between two marks, from the results of the parts that have any."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from study import detection, features
from study.report import cell, number
from study.steering_page import BEST, NAMES, Found

BEGIN, END = "<!-- study -->", "<!-- /study -->"
HEAD = """\
| on SmolLM2-135M-Instruct, layer 12 | |
|---|---|"""
PEERS = ("eai-sparsify", "sae-lens")

Results = Mapping[str, Any]


def write(found: Mapping[str, Results], path: Path) -> None:
    """Put the table of the parts' results in place of the one between the marks of the file."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}")


def table(found: Mapping[str, Results]) -> str:
    """The table."""
    rows = [row for name, make in ROWS.items() if name in found for row in make(found[name])]
    return "\n".join(
        [HEAD, *(f"| {what} ([results](docs/results/{page}.md)) | {value} |" for page, what, value in rows)]
    )


def of_saes(results: Results) -> Iterator[tuple[str, str, str]]:
    """Quality and speed of training beside other libraries at the best of their rates."""
    rows = results["rows"]
    made = [row for row in rows.values() if isinstance(row, dict) and "library" in row]
    alike = [row for row in made if (row["layer"], row["architecture"], row["seed"]) == (12, "topk", 0)]
    alike = [row for row in alike if (row["d_sae"], row["l0_asked"]) == (8192, 32)]
    best = {name: min(r["fvu_ordinary"] for r in alike if r["library"] == name) for name in ("steersman", *PEERS)
            if any(r["library"] == name for r in alike)}  # fmt: skip
    told = ", ".join(f"{name} {number(value)}" for name, value in best.items() if name != "steersman")
    yield "saes", "FVU of TopK, 8,192 features, equal tokens", f"{number(best['steersman'])} ({told})"
    parts = []
    for threads in (n for n in (1, 2) if f"speed {n}" in rows):
        speed = {name: row["rows_per_second"] for name, row in rows[f"speed {threads}"]["wall"].items()}
        told = ", ".join(f"{name} {number(speed[name])}" for name in PEERS if name in speed)
        parts.append(f"{number(speed['steersman'])} ({told})")
    if parts:
        yield "saes", "training rows a second, one thread; two", "; ".join(parts)


def of_features(results: Results) -> Iterator[tuple[str, str, str]]:
    """How far labels of tokens hold."""
    found = {name: features.averages(results["rows"][name]["features"])["strongest"] for name in ("sae", "random")}
    told = f"{cell(found['sae'], percent=True)} (random directions {cell(found['random'], percent=True)})"
    yield "features", "strongest firings that a label of tokens covers, other documents", told


def of_steering(results: Results) -> Iterator[tuple[str, str, str]]:
    """Overall scores at each way's best scale, and SAE-TS against the plain feature at equal KL."""
    found = Found(results)
    scores = {name: found.of(name, BEST) for name in ("prompting", "diffmean", "feature", "sae_ts", "random")}
    told = ", ".join(f"{NAMES[name]} {number(one.mean)}" for name, one in scores.items() if one)
    if (plain := found.plain()) is not None:
        told += f", unsteered {number(plain.mean)}"
    yield "steering", f"steering score of {len(found.topics)} goals and concepts, 0 to 2, best scale", told
    less = {budget: found.less("sae_ts", "feature", budget) for budget in found.budgets}
    told = "; ".join(f"{cell(one, signed=True)} at {budget}" for budget, one in less.items() if one)
    if told:
        yield "steering", "SAE-TS less the plain feature, at equal KL", told


def of_detection(results: Results) -> Iterator[tuple[str, str, str]]:
    """AUROC of concepts in texts."""
    rows = {name: row for name, row in results["rows"].items() if "methods" in row}
    means = {name: detection.estimate(detection.column(rows, name, "auroc")) for name in
             ("diffmean", "probe", "feature", "random")}  # fmt: skip
    told = ", ".join(f"{detection.TITLES[name]} {number(one.mean)}" for name, one in means.items())
    yield "detection", f"AUROC of {len(rows)} AxBench concepts", told


ROWS = {"saes": of_saes, "features": of_features, "steering": of_steering, "detection": of_detection}
"""Rows (page, what, figures) by part."""
