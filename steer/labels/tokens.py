"""Labels with no language model to ask: what a feature fires on and what it writes, as tokens.

The output side are the two lists of `steersman.steer.scores.output_tokens` (VocabProj, TokenChange: arXiv 2501.08319);
the input side are the tokens of the feature's top contexts, which come in as plain text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.lens import lens_tokens
from steersman.lm.origin import check_sae_fits
from steersman.progress import progress
from steersman.sae import SAE
from steersman.sae.feature_labels import FeatureLabel, FeatureLabels
from steersman.steer.effects.measured import sae_identity
from steersman.steer.labels.combine import both_sides
from steersman.steer.labels.journal import LabelJournal, digest
from steersman.steer.scores.output_tokens import token_change, vocab_projection

SOURCES = ("contexts", "vocab", "change")
"""What a label of tokens comes from, as its source names them, joined by +."""
_CLAMPED = 10.0
"""Where no largest activation is known: what the paper's code clamps to."""
_TOGETHER = 16
"""Features labelled between two steps of the progress bar, at most."""


@dataclass(frozen=True, kw_only=True)
class TokenLabelConfig:
    """How labels are made of tokens."""

    sources: tuple[str, ...] = ()
    """What labels are made from, of what is given: contexts (the input side), vocab, change (the output side); all if
    none is named."""
    words: int = 3
    """Words of each side that a label shows, at most."""
    n_tokens: int = 20
    """Tokens read from each source of the output side."""
    max_length: int = 32
    """Tokens of each text on which features are clamped."""
    null_directions: int = 256
    """Random directions whose strongest token a decoder row must exceed to be believed; 0 believes every row."""
    level: float = 0.95
    """Quantile of the random directions' strongest tokens that counts."""
    seed: int = 0
    """Seed of the random directions."""

    def __post_init__(self) -> None:
        check_types(self)
        if min(self.words, self.n_tokens, self.max_length) < 1 or self.null_directions < 0:
            raise SteersmanError("words, n_tokens and max_length must be at least 1, null_directions at least 0")
        for source in self.sources:
            if source not in SOURCES:
                raise SteersmanError(f"unknown source {source!r}: there are {', '.join(SOURCES)}")
        if not 0 < self.level < 1:
            raise SteersmanError(f"level must lie between 0 and 1, got {self.level}")


def label_features(
    lm: LanguageModel,
    sae: SAE,
    features: Sequence[int] | None = None,
    *,
    fires_on: Mapping[int, Sequence[str]] | None = None,
    texts: Sequence[str] = (),
    hook: str | None = None,
    journal: LabelJournal | None = None,
    config: TokenLabelConfig | None = None,
    **overrides: Any,
) -> FeatureLabels:
    """A short label for each of `features` (all of them by default) from the tokens it fires on and those it writes.

    Args:
        lm: the SAE's model.
        sae: the SAE.
        features: feature ids.
        fires_on: the tokens at each feature's top contexts, strongest first, as `steersman features` finds them;
            without them a label has an output side alone.
        texts: texts on which each feature is clamped to its largest activation (TokenChange), a pass over all of them
            a feature; without any the output side is the decoder row's alone (VocabProj).
        hook: hook point, for an SAE that records none.
        journal: where what clamping changes is kept as it comes, and found again by a later call.
        config: a `TokenLabelConfig`.
        overrides: fields of it, over those of `config`.

    Returns:
        A label for every feature of which anything is known. Its scores are `agreement`, the share of the words it
        fires on that are among those it writes, and `output_clarity`, the strongest token of its decoder row over what
        random directions of its length reach (below 1 the row is not believed, and left out of the label).

    Raises SteersmanError for an SAE of another model, a feature out of range, a transcoder.
    """
    config = merged(TokenLabelConfig, config, overrides)
    check_sae_fits(lm, sae, hook)
    sae.check_residual("labels by what a feature writes")
    ids = list(range(sae.cfg.d_sae)) if features is None else [int(feature) for feature in features]
    for feature in ids:
        sae.check_feature(feature)
    sources = config.sources or SOURCES
    clarity = row_clarity(lm, sae, ids, config)
    run = digest(sae_identity(sae)["hash"], lm.digest(), list(texts), config.n_tokens, config.max_length)
    found: dict[int, FeatureLabel] = {}
    with progress(desc="labels", total=len(ids), unit="feature") as bar:
        for start in range(0, len(ids), _TOGETHER):
            part = ids[start : start + _TOGETHER]
            by_row = {one.feature: one.raised for one in vocab_projection(lm, sae, part, n_tokens=config.n_tokens)}
            clamps = bool(texts) and "change" in sources
            changed = _changed(lm, sae, part, texts, hook, config, journal, run) if clamps else {}
            for feature in part:
                raised = {"vocab": by_row[feature]} if clarity[feature] >= 1 and "vocab" in sources else {}
                raised |= {"change": changed[feature]} if feature in changed else {}
                reads = (fires_on or {}).get(feature, ()) if "contexts" in sources else ()
                sides = both_sides(reads, list(raised.values()), max(5, config.words))
                if text := sides.text(config.words):
                    scores = {"output_clarity": clarity[feature]} if config.null_directions else {}
                    scores |= {} if sides.agreement is None else {"agreement": sides.agreement}
                    source = "+".join([*(["contexts"] if sides.reads else []), *raised])
                    found[feature] = FeatureLabel(text=text, source=source, scores=scores)
            bar.update(len(part))
    return FeatureLabels(found).of(sae.cfg)


def _changed(
    lm: LanguageModel,
    sae: SAE,
    features: Sequence[int],
    texts: Sequence[str],
    hook: str | None,
    config: TokenLabelConfig,
    journal: LabelJournal | None,
    run: str,
) -> dict[int, Sequence[str]]:
    """The tokens that clamping each of `features` raises: those that the journal has, the others measured."""
    keys = {feature: digest("change", run, feature) for feature in features}
    known = {feature: journal.get(key) for feature, key in keys.items() if key in journal} if journal else {}
    values = {feature: clamp_value(sae, feature) for feature in features if feature not in known}
    if values:
        how: dict[str, Any] = {"n_tokens": config.n_tokens, "max_length": config.max_length, "hook": hook}
        for one in token_change(lm, sae, list(values), texts, value=values, **how):
            known[one.feature] = list(one.raised)
            if journal is not None:
                journal.put(keys[one.feature], known[one.feature])
    return known


@torch.no_grad()
def row_clarity(lm: LanguageModel, sae: SAE, features: Sequence[int], config: TokenLabelConfig) -> dict[int, float]:
    """The strongest token of each feature's decoder row by the logit lens, over the `level` quantile of the same of
    random directions of its length; 1 for all where no random directions are asked for."""
    rows = sae.W_dec.detach()[torch.tensor(list(features), device=sae.device)].float()
    if not config.null_directions or not len(rows):
        return dict.fromkeys(features, 1.0)
    generator = torch.Generator().manual_seed(config.seed)
    random = torch.randn(config.null_directions, rows.shape[1], generator=generator)
    random /= random.norm(dim=1, keepdim=True)
    by_chance = lens_tokens(lm, random, 1).raised_by[:, 0].double().quantile(config.level)
    strongest = lens_tokens(lm, rows, 1).raised_by[:, 0] / rows.norm(dim=1).cpu().clamp_min(1e-12)
    return dict(zip(features, (strongest.double() / by_chance).tolist()))


def clamp_value(sae: SAE, feature: int) -> float:
    """What a feature is clamped to: its largest activation; for one that never fired the median of the others', and
    10 where no statistics are known."""
    if sae.feature_stats is None:
        return _CLAMPED
    largest = sae.feature_stats.max_act
    own = float(largest[feature])
    alive = largest[largest > 0]
    return own if own > 0 else float(alive.median()) if len(alive) else _CLAMPED
