"""`probe_features`: what few features tell about labelled texts, beside raw activations and what knows nothing."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.config import merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.progress import progress
from steersman.sae import SAE
from steersman.steer.probing.absorption import LabelAbsorption, absorption, main_features
from steersman.steer.probing.config import ProbingConfig
from steersman.steer.probing.labels import LabelledTexts, Labelling, labelled_texts
from steersman.steer.probing.report import TITLES, LabelProbe, ProbedFeatures, ProbeScore
from steersman.steer.probing.rows import Codes, ProbeRows, read_rows
from steersman.steer.probing.sparse import Fitted, HeldOut, Measured, averaged, class_differences, fit
from steersman.steer.probing.split import Parts, check_counts, split


def probe_features(
    lm: LanguageModel,
    sae: SAE,
    texts: Sequence[Any],
    labels: Sequence[Labelling],
    config: ProbingConfig | None = None,
    *,
    beside: Mapping[str, SAE] | None = None,
    **overrides: Any,
) -> ProbedFeatures:
    """Fit probes of few features for each label against the rest, and measure them on texts held out.

    Args:
        lm: the model.
        sae: its SAE.
        texts: the texts; also (prompt, answer) pairs and conversations, of which the answer counts.
        labels: one for each text: a word, a number or a bool; one for each of its tokens but the BOS, None where it is
            not known; or spans (start, end, label) in characters.
        config: a `ProbingConfig`; `overrides` are fields of it, over those of `config`.
        beside: further SAEs of the same hook point, by name, to be probed on the same samples.

    Raises SteersmanError, before the model reads anything, for labels that do not fit the texts and labels that too few
    texts have, and for SAEs of another model, hook point or width.
    """
    config = merged(ProbingConfig, config, overrides)
    hook = check_sae_fits(lm, sae)
    if taken := TITLES.keys() & (beside or {}).keys():
        raise SteersmanError(f"an SAE beside is named {min(taken)!r}, as what else is probed is: give another name")
    saes = {"sae": sae, **(beside or {})}
    for name, one in saes.items():
        if check_sae_fits(lm, one, hook) != hook:
            raise SteersmanError(f"the SAE {name!r} beside is of {one.cfg.hook_name}, not of {hook}")
        if max(config.ks) > one.cfg.d_sae:
            raise SteersmanError(f"a probe of {max(config.ks)} features needs more than the {one.cfg.d_sae} of {name}")
    if config.absorption:
        sae.check_residual("measuring absorption")
        if sae.cfg.input_norm != "none":
            raise SteersmanError(
                f"absorption compares features with the states they were read from, and this SAE normalises each state "
                f"({sae.cfg.input_norm}): probe it without absorption"
            )
    given = labelled_texts(lm, texts, labels, config.level)
    _check_given(given, config)
    rows = read_rows(
        lm, hook, given, saes, pool=config.pool, random_sae=config.random_sae, batch_size=config.batch_size,
        max_length=config.max_length, seed=config.seed,
    )  # fmt: skip
    return probe_rows(rows, sae, config, level=given.level, hook=hook)


def _check_given(given: LabelledTexts, config: ProbingConfig) -> None:
    if config.absorption and given.level == "text" and config.pool != "last":
        raise SteersmanError(
            f"absorption is measured on states, and the {config.pool} over a text's tokens is none: label tokens or "
            "spans, or pool by the last token"
        )
    unit = torch.cat([torch.full((int(one.known.sum()),), i) for i, one in enumerate(given.texts)])
    has = torch.cat([one.has[one.known] for one in given.texts])
    check_counts(has, unit, given.classes)
    split(has, unit, given.classes, config.heldout, config.seed)


def probe_rows(
    rows: ProbeRows, sae: SAE, config: ProbingConfig, *, level: Literal["text", "token"] = "token", hook: str = ""
) -> ProbedFeatures:
    """`probe_features` on samples that have been read."""
    parts = split(rows.has, rows.unit, rows.classes, config.heldout, config.seed)
    held = HeldOut(parts.heldout, rows.unit, config.draws, config.seed)
    differences = {name: class_differences(codes, rows.has, parts.training) for name, codes in rows.codes.items()}
    random = _random_sets(rows.codes["sae"], parts, config)
    probes: list[LabelProbe] = []
    measured: dict[tuple[str, int | None], list[Measured]] = {}
    absorbed: list[LabelAbsorption] = []
    for at, label in enumerate(progress(rows.classes, desc="probing", unit="label")):
        y = rows.has[:, at]
        positives = int((y & parts.heldout).sum())

        def keep(of: str, k: int | None, found: Measured, features: Sequence[int], l2: float) -> None:
            measured.setdefault((of, k), []).append(found)
            probes.append(
                LabelProbe(
                    of=of, k=k, auroc=held.estimate(found.auroc, found.drawn), accuracy=found.accuracy, f1=found.f1,
                    label=label, features=tuple(features), l2=l2, positives=positives,  # noqa: B023 (called at once)
                )
            )  # fmt: skip

        for name, codes in rows.codes.items():
            order = differences[name][at].abs().topk(max(config.ks)).indices.tolist()
            for k in config.ks:
                probe = fit(codes.columns(order[:k]), y, parts, config.penalties)
                keep(name, k, held.measure(probe, y), order[:k], probe.l2)
            if name == "sae":
                for k, sets in random.items():
                    tried = [fit(codes.columns(chosen), y, parts, config.penalties) for chosen in sets]
                    found = averaged([held.measure(probe, y) for probe in tried])
                    keep("random_features", k, found, (), tried[0].l2)
        if config.raw or config.absorption:
            raw, states = _raw(rows, y, parts, config)
            if config.raw:
                keep("raw", None, held.measure(raw, y), (), raw.l2)
            if config.absorption:
                features, probe = main_features(
                    rows.codes["sae"], y, parts, config.penalties, rise=config.split_rise, most=config.max_features
                )
                f1 = held.measure(probe, y).f1
                absorbed.append(
                    absorption(
                        label, features, f1, codes=rows.codes["sae"], states=states, W_dec=sae.W_dec.detach().cpu(),
                        b_dec=sae.b_dec.detach().cpu(), y=y, heldout=parts.heldout, raw=raw,
                    )
                )  # fmt: skip
    means = []
    for (of, k), found in measured.items():
        mean = averaged(found)
        auroc = held.estimate(mean.auroc, mean.drawn)
        means.append(ProbeScore(of=of, k=k, auroc=auroc, accuracy=mean.accuracy, f1=mean.f1))
    return ProbedFeatures(
        probes=probes, means=means, absorption=absorbed if config.absorption else None, classes=rows.classes,
        hook_name=hook, level=level, pool="" if level == "token" else config.pool,
        n_training=len(rows.unit[parts.training].unique()), n_heldout=held.n_texts, feature_labels=sae.labels,
    )  # fmt: skip


def _raw(rows: ProbeRows, y: Tensor, parts: Parts, config: ProbingConfig) -> tuple[Fitted, Tensor]:
    """The probe of the states, pooled in the way that does best on the samples that choose, and those states."""
    several = len(rows.states) > 1
    tried = [(fit(states, y, parts, config.penalties, score=several), states) for states in rows.states.values()]
    return max(tried, key=lambda one: one[0].choosing_auroc)


def _random_sets(codes: Codes, parts: Parts, config: ProbingConfig) -> dict[int, list[list[int]]]:
    """For each k sets of features that are active on some training sample, the same for all labels."""
    alive = codes.mean_active(parts.training).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(config.seed)
    return {
        k: [
            alive[torch.randperm(len(alive), generator=generator)[:k]].tolist() for _ in range(config.random_draws)
        ]
        for k in config.ks
        if config.random_draws and len(alive) >= k
    }  # fmt: skip
