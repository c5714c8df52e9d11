"""2: labels of features, and a look at every k-th by id, chosen before anything of them was seen.

    python scripts/study features --model runs/smollm2 --data DATA

The measures were fixed before they were read. Documents of even number make a feature's label, those of odd number hold
it to account. The label's tokens are those at the feature's largest activations, as `steersman features` chooses them;
of the tokens that the feature fires on, in the other documents:

    recall      share that is the label's, by number
    strongest   the same of the tenth with the largest activations
    null        the same, with the label's tokens of the next feature
    precision   of the occurrences of the label's tokens, the share on which the feature fires
    effective tokens   exp of the entropy of activation by token: how many tokens share what it does, all documents

Beside them the same of an SAE of the same shape whose directions are random. Pages of the browser for these features
are written to WORK/results/features.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman import SAE, SAEConfig
from steersman.steer import bootstrap, label_features, words_fired_on
from steersman.train import detail_features
from steersman.ui.site import write_site
from study.common import Results, Study, StudyConfig, chosen
from study.report import COLOURS, GREY, Drawing, Figure, Page, Table, cell, intervals, number, side

DENSE = 0.1
"""Density from which on a feature is called dense."""
FEW = 100
"""Firing tokens below which a feature is not judged."""
LARGEST, TOKENS = 30, 5
"""Activations that a label is made from, and its tokens at most."""
KINDS = ("dead", "rare", "dense", "one label", "its words, in places", "spread")
OURS, NULL = "the SAE", "random directions"
PASS, RANDOM, BROWSER = "sae", "random", "browser"


@dataclass(frozen=True, kw_only=True)
class Config(StudyConfig):
    """Settings of the look at features."""

    looked_at: int = 50
    """Features that are looked at: of ids 0, n, 2 n, ... with n the width over this number."""
    change_texts: int = 4
    """Texts that each feature is clamped on, for what its label says it writes."""


def main(config: Config) -> None:
    """Measure, label, and write the site of the features that are looked at."""
    config = replace(config, **chosen(config, looked_at=20))
    results = Results(config, "features")
    results.planned([PASS, RANDOM, BROWSER])
    study = Study(config)
    sae = study.sae()
    ids = every(sae.cfg.d_sae, config.looked_at)
    results.row(PASS, lambda: look(study, sae, ids))
    results.row(RANDOM, lambda: look(study, random_sae(study, sae), ids))
    results.row(BROWSER, lambda: browse(study, sae, ids, study.material.held_out[: config.change_texts]))


def every(d_sae: int, n: int) -> list[int]:
    """The ids that are looked at."""
    return list(range(0, d_sae, max(1, d_sae // n)))[:n]


def random_sae(study: Study, sae: SAE) -> SAE:
    """An SAE of the same shape whose directions are random, about the mean of the rows."""
    config = SAEConfig(
        d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, k=study.config.k, hook_name=study.hook(), model_name=study.lm.name
    )
    made = SAE(config, torch.Generator().manual_seed(study.config.seed))
    with torch.no_grad():
        made.b_dec.copy_(study.store().stats(study.hook()).mean)
    return made


@dataclass(frozen=True)
class Fired:
    """Activations of one feature on ordinary rows, [n] each."""

    values: Tensor
    tokens: Tensor
    """Ids."""
    odd: Tensor
    """Whether the document's number is odd."""


@torch.no_grad()
def read(study: Study, sae: SAE, ids: list[int]) -> tuple[list[Fired], Tensor, Tensor]:
    """What the features `ids` fire on, how often each feature fires [L], and how often each token occurs in documents
    of even and of odd number [2, V]. One pass."""
    store, hook = study.store(), study.hook()
    largest = store.stats(hook).large_norm
    place = torch.full((sae.cfg.d_sae,), -1)
    place[ids] = torch.arange(len(ids))
    fires, occurs = torch.zeros(sae.cfg.d_sae), torch.zeros(2, len(study.lm.tokenizer), dtype=torch.int64)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for batch in store.batches(8192, hook=hook, split="all", shuffle=False, drop_last=False):
        x = batch.x.float()
        ordinary = x.norm(dim=1) <= largest
        code = sae.encode_sparse(x.to(sae.device))
        values, indices = code.values.cpu(), code.indices.cpu().long()
        active = (values > 0) & ordinary[:, None]
        fires += torch.bincount(indices[active], minlength=len(fires))
        tokens, odd = batch.token_ids.long(), batch.doc_ids % 2
        for half in (0, 1):
            occurs[half] += torch.bincount(tokens[ordinary & (odd == half)], minlength=occurs.shape[1])
        row, slot = (active & (place[indices] >= 0)).nonzero(as_tuple=True)
        parts.append((place[indices[row, slot]], values[row, slot], tokens[row], odd[row] == 1))
    of, values, tokens, odd = (torch.cat(one) for one in zip(*parts))
    found = [Fired(values[of == i], tokens[of == i], odd[of == i]) for i in range(len(ids))]
    return found, fires, occurs


def look(study: Study, sae: SAE, ids: list[int]) -> dict[str, Any]:
    """The measures of the features `ids`, and how often all of them fire."""
    found, fires, occurs = read(study, sae, ids)
    n = int(occurs.sum())
    labels = [label_tokens(one) for one in found]
    rows = [
        measures(one, label, other, occurs[1], n) | {"id": i, "tokens": study.lm.tokenizer.batch_decode(label[:, None])}
        for i, one, label, other in zip(ids, found, labels, [*labels[1:], labels[0]])
    ]
    density = (fires / n).tolist()
    shares = {"dead": sum(d == 0 for d in density), "dense": sum(d >= DENSE for d in density)}
    quantiles = torch.tensor(density).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    everything = {name: count / len(density) for name, count in shares.items()} | {"density": quantiles}
    return {
        "rows": n,
        "d_sae": sae.cfg.d_sae,
        "k": sae.cfg.k,
        "hook": study.hook(),
        "all": everything,
        "features": rows,
    }


def label_tokens(fired: Fired) -> Tensor:
    """The tokens at the largest activations in documents of even number, those with the largest sum."""
    values, tokens = fired.values[~fired.odd], fired.tokens[~fired.odd]
    top = values.topk(min(LARGEST, len(values))).indices
    if not len(top):
        return tokens
    distinct, at = tokens[top].unique(return_inverse=True)
    sums = torch.zeros(len(distinct)).index_add_(0, at, values[top])
    return distinct[sums.argsort(descending=True, stable=True)[:TOKENS]]


def measures(fired: Fired, label: Tensor, other: Tensor, occurs: Tensor, n: int) -> dict[str, Any]:
    """The measures of one feature; None where there is nothing to measure."""
    values, tokens = fired.values[fired.odd], fired.tokens[fired.odd]
    measured: dict[str, Any] = {"density": len(fired.values) / n, "fired": len(fired.values)}
    if len(fired.values) < FEW or not len(values) or not len(label):
        return measured | {"kind": "dead" if not len(fired.values) else "rare"}
    mass = torch.zeros(len(occurs)).index_add_(0, fired.tokens, fired.values)
    share = mass[mass > 0] / mass.sum()
    strongest = tokens[values.topk(max(1, len(values) // 10)).indices]
    named = torch.isin(tokens, label)
    measured |= {
        "effective": math.exp(float(-(share * share.log()).sum())),
        "recall": float(named.float().mean()),
        "strongest": float(torch.isin(strongest, label).float().mean()),
        "null": float(torch.isin(strongest, other).float().mean()),
        "precision": float(named.sum() / occurs[label].sum()) if occurs[label].sum() else None,
    }
    return measured | {"kind": kind(measured)}


def kind(measured: Mapping[str, Any]) -> str:
    """What a feature that fires often enough looks like."""
    if measured["density"] >= DENSE:
        return "dense"
    if measured["strongest"] < 0.5:
        return "spread"
    one = measured["recall"] >= 0.5 and (measured["precision"] or 0) >= 0.5
    return "one label" if one else "its words, in places"


def browse(study: Study, sae: SAE, ids: list[int], texts: list[str]) -> dict[str, Any]:
    """Label the features and write the browser's pages of them: the labels, and how large the pages are."""
    out, name = study.config.work / "results" / "features", Path(study.config.model).name
    report = replace(detail_features(sae, study.store(), study.lm), model_name=name)
    fires_on = words_fired_on(asdict(report.features[i]) for i in ids)
    sae.labels = label_features(study.lm, sae, ids, fires_on=fires_on, texts=texts)
    title = f"{name}, layer {study.layer}, {sae.cfg.architecture} of {sae.cfg.d_sae:,} features"
    write_site(report, out, name=title, labels=sae.labels, only=ids)
    files = [path for path in out.rglob("*") if path.is_file()]
    scores = {i: dict(sae.labels[i].scores) for i in ids if i in sae.labels}
    labels = [{"id": i, "label": sae.labels.text(i)} | scores.get(i, {}) for i in ids]
    return {
        "files": len(files), "kilobytes": round(sum(path.stat().st_size for path in files) / 1e3), "labels": labels,
    }  # fmt: skip


# The page


def page(results: dict[str, Any]) -> Page:
    """The page of the results."""
    found, random = results["rows"][PASS], results["rows"].get(RANDOM)
    labels = {one["id"]: one for one in results["rows"].get(BROWSER, {}).get("labels", [])}
    groups = {OURS: found} | ({NULL: random} if random else {})
    means = {name: averages(group["features"]) for name, group in groups.items()}
    return Page(
        name="features",
        title="Features, chosen before looking",
        asked=(
            "What do the features of an SAE of a real model look like when nobody picks the ones to show? Do labels "
            "made of tokens, which cost nothing, hold on text that they were not made from?"
        ),
        how=HOW.format(
            n=len(found["features"]), step=found["features"][1]["id"], d_sae=number(found["d_sae"]), k=found["k"],
            hook=found["hook"], rows=number(found["rows"]), dense=number(DENSE, percent=True), few=FEW,
            largest=LARGEST, tokens=TOKENS,
        ),
        tables=[
            Table(
                caption="Features of each kind, and means over those that fire often enough, with 95 % intervals over "
                "features. *All features* are of the whole SAE.",
                header=["", *groups],
                rows=summary(groups, means),
            ),
            Table(
                caption="Each feature of the SAE. Its number leads to its page, with contexts from every level of "
                "activation ([all of them](features/index.html)). Labels have two sides: what it fires on, and behind "
                "the arrow what it writes.",
                header=["feature", "label", "kind", "density", "effective tokens", "recall", "strongest", "precision"],
                rows=[line(one, labels) for one in found["features"]],
            ),
        ],
        figures=[
            Figure(
                name="spread",
                alt="Density of each feature against the number of tokens that share its activation, beside random "
                "directions",
                draw=lambda: scatter({name: group["features"] for name, group in groups.items()}),
            ),
            Figure(
                name="labels",
                alt="Recall, recall at the strongest activations, the same of another feature's label, and precision",
                draw=lambda: intervals(shares(means), "share (mean over features)"),
            ),
        ],
        means="\n\n".join(meaning(means, [one["kind"] for one in found["features"]])),
        change=CHANGE,
        answer=" ".join(meaning(means, [one["kind"] for one in found["features"]])[:2]),
    )  # fmt: skip


HOW = """\
The SAE that the study steers with (`{hook}`, TopK, {d_sae} features, {k} active). {n} of its features: ids 0, {step},
{step} x 2 and so on, fixed before any was seen, as were these measures. All {rows} ordinary rows of the study's store
are read. Documents of even number make a label: the up to {tokens} tokens at the feature's {largest} largest
activations. Documents of odd number hold it to account: *recall* is the share of the tokens it fires on there that are
the label's, *strongest* the same of the tenth with the largest activations, *another's label* the same with the next
feature's tokens, *precision* the share of all occurrences of the label's tokens on which it fires. *Effective tokens*
is exp of the entropy of its activation by token. A feature is *dead* that never fires; *rare* below {few} tokens, and
not judged; *dense* from a density of {dense}; *one label* where strongest, recall and precision are at least a half;
*its words, in places* where strongest alone is: it fires on these words, but on few of their occurrences or weakly on
many others; *spread* where the label's tokens are less than half of the strongest. The comparison is an SAE of the same
shape with random directions about the rows' mean. Labels in the table are `label_features`' of tokens, with what
clamping the feature on a few held-out texts writes."""
CHANGE = """\
The measures see tokens alone: a feature of a topic, which fires on many words of one kind of text, is *spread* here
whether or not a person would name it at once; its page shows. A language model's labels, or an SAE that is wider or
trained on more tokens, would find more features to be about one thing. Half of a feature's activations may be of a kind
that its largest ones do not show, which recall over all of them says."""
MEANS = (
    ("recall", "recall", True), ("strongest", "recall, strongest tenth", True),
    ("null", "the same, another's label", True), ("precision", "precision", True),
    ("effective", "effective tokens", False),
)  # fmt: skip


def averages(features: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over features, with intervals."""
    return {key: bootstrap([one[key] for one in features if one.get(key) is not None]) for key, _, _ in MEANS}


def summary(groups: Mapping[str, Any], means: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The rows of the first table."""
    kinds = {name: [one["kind"] for one in group["features"]] for name, group in groups.items()}
    rows = [[name, *(str(kinds[group].count(name)) for group in groups)] for name in KINDS]
    rows += [[text, *(cell(means[name][key], percent=share) for name in groups)] for key, text, share in MEANS]
    every = [group["all"] for group in groups.values()]
    for name in ("dead", "dense"):
        rows.append([f"all features: {name}", *(number(one[name], percent=True) for one in every)])
    return [*rows, ["all features: median density", *(number(one["density"][1], percent=True) for one in every)]]


def shares(means: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The means that are shares, by group and name."""
    known = [(key, text) for key, text, share in MEANS if share]
    return {name: {text: found[key] for key, text in known if found[key]} for name, found in means.items()}


def line(one: dict[str, Any], labels: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """A feature's line of the table."""
    i = one["id"]
    label = str(labels[i]["label"]) if i in labels else ", ".join(token.strip() for token in one["tokens"])
    shown = f"`{' '.join(label.replace('`', chr(39)).split())}`" if label.strip() else ""
    return [
        f"[{i}](features/features/{i}.html)" if labels else str(i), shown, one["kind"],
        number(one["density"], 2, percent=True), number(one.get("effective")),
        *(number(one.get(key), 2, percent=True) for key in ("recall", "strongest", "precision")),
    ]  # fmt: skip


def scatter(groups: Mapping[str, list[dict[str, Any]]]) -> Drawing:
    """Effective tokens over density."""
    figure = Drawing(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, features), colour in reversed(list(zip(groups.items(), (COLOURS[0], GREY)))):
        known = [one for one in features if one.get("effective")]
        x, y = [one["density"] for one in known], [one["effective"] for one in known]
        axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.8, markeredgewidth=0, label=name)
    axes.set(xlabel="density", ylabel="effective tokens")
    if any(one.get("effective") for features in groups.values() for one in features):
        axes.set(xscale="log", yscale="log")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def meaning(means: Mapping[str, Mapping[str, Any]], kinds: list[str]) -> list[str]:
    """What the figures say, by paragraph."""
    ours, random = means[OURS], means.get(NULL)
    parts = [
        f"Of {len(kinds)} features chosen by id: dead {kinds.count('dead')}, too rare to judge {kinds.count('rare')}, "
        f"dense {kinds.count('dense')}, one label in and out {kinds.count('one label')}, strongest on a label's words "
        f"but not on all of them or not on them alone {kinds.count('its words, in places')}, spread over more words "
        f"than a label has {kinds.count('spread')}."
    ]
    if ours["strongest"]:
        apart = side(ours["strongest"], ours["null"].high) > 0
        parts.append(
            f"A label of at most {TOKENS} tokens, made from one half of the documents, covers "
            f"{cell(ours['strongest'], percent=True)} of the strongest firings in the other half, another feature's "
            f"{cell(ours['null'], percent=True)}: "
            + ("labels of tokens are about their feature." if apart else "tokens do not tell these features apart.")
        )
    if ours["recall"] and side(ours["recall"], ours["strongest"].low) < 0:
        parts[-1] += (
            f" Of all firings they cover {cell(ours['recall'], percent=True)}: weak activations are of other words, "
            "which a label from the strongest does not name."
        )
    if random and random["strongest"] and ours["strongest"]:
        covered = side(ours["strongest"], random["strongest"].high) > 0
        narrower = side(ours["effective"], random["effective"].low) < 0
        parts.append(
            f"Of an SAE whose directions are random labels cover {cell(random['strongest'], percent=True)} of the "
            f"strongest firings, and the mean feature has {cell(random['effective'])} effective tokens, of this one "
            f"{cell(ours['effective'])}. "
            + ("Training is seen where features fire most strongly" if covered else "Training is not seen in labels")
            + (", and in how few tokens they fire on." if narrower else ", and not in how many tokens they fire on.")
        )
    return parts
