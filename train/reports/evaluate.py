"""`steersman eval`: how well an SAE rebuilds activations, and what its reconstruction does to the model.

With a model, its next-token loss with the reconstruction in place of the residual stream is measured (`spliced.py`).

How alike features are to one another, which fire on many tokens, and how well rows of rare tokens are rebuilt stand
beside it, since a good reconstruction alone says little (`docs/concepts/judging-saes.md`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.html import card
from steersman.lm import LanguageModel
from steersman.lm.origin import canonical_hook
from steersman.progress import progress
from steersman.sae import SAE
from steersman.sae.metrics import DENSE, GroupedSums, Reconstruction, ReconstructionSums, defined, large_rows
from steersman.sae.neighbours import crowding
from steersman.train.reports.features import BATCH_ROWS
from steersman.train.reports.frequency import TokenFrequency
from steersman.train.reports.spliced import SplicedLoss, no_loss, spliced_losses
from steersman.train.store.batch import ActivationBatch
from steersman.train.store.store import ActivationStore


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which rows and texts an SAE is measured on, and how many at a time."""

    split: Literal["heldout", "train", "all"] = "heldout"
    """Which rows: those of the last documents, the others, or all."""
    heldout_fraction: float = 0.05
    """Fraction of the rows that is held out."""
    batch_size: int = 16
    """Texts of a forward pass."""
    model_tokens: int = 20_000
    """Tokens of the texts on which the model's loss is measured, about: with the text that reaches it, no more."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.batch_size < 1 or self.model_tokens < 2:
            raise SteersmanError("batch_size must be at least 1 and model_tokens at least 2")


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """What an SAE's features are like as a dictionary."""

    decoder_cosine: float
    """Mean |cosine| of decoder rows over all pairs: lowest near the right L0 (arXiv 2508.16560)."""
    nearest_cosine: float
    """Mean over the features of the largest cosine of their decoder row to another's."""
    dense_features: tuple[int, ...]
    """The features that fired on more than `dense_above` of the tokens, those that did most often first."""
    dense_above: float = DENSE
    """A fraction of the tokens."""


@dataclass(frozen=True, kw_only=True)
class FrequencyBucket:
    """The reconstruction of rows whose tokens are about equally frequent; rows of huge norm are in none."""

    at_least: float
    """Least share of the training rows that a token of the bucket has; that of the bucket before is the bound above."""
    n_tokens: int
    """Rows measured."""
    fvu: float
    """Their squared error over their squared distance from the mean of all ordinary rows; NaN where there is none."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate_sae`."""

    reconstruction: Reconstruction
    """On activations."""
    loss: SplicedLoss | None
    """On the model's predictions; None without a model."""
    dictionary: Dictionary | None = None
    """Of the features, whatever they rebuild."""
    by_frequency: tuple[FrequencyBucket, ...] = ()
    """On rows of frequent and of rare tokens, the most frequent first; empty where the store knows no tokens."""
    baselines: Mapping[str, "Evaluation"] = field(default_factory=dict)
    """The same of what else was measured, by name."""

    def figures(self) -> dict[str, float | None]:
        """All figures of one number each, under the names of files and tables; None for what is not defined."""
        of_dictionary = {} if self.dictionary is None else asdict(self.dictionary)
        numbers = {name: of_dictionary[name] for name in ("decoder_cosine", "nearest_cosine") if name in of_dictionary}
        return self.reconstruction.record() | numbers | (self.loss.record() if self.loss else {})

    def _repr_html_(self) -> str:
        header, *rows = self._figures_table("not defined")
        tables = [(header, rows)] if self.baselines else []
        if self.by_frequency:
            header, *buckets = self._frequency_table()
            tables.append((header, buckets))
        facts = [] if self.baselines else [(row[0], row[1]) for row in rows]
        return card("Evaluation", facts, tables=tables, text=self._dense_line())

    def to_json(self) -> dict[str, Any]:
        """As `eval --out` writes it."""
        record: dict[str, Any] = {
            "reconstruction": self.reconstruction.record(),
            "loss": self.loss.record() if self.loss else None,
        }
        if self.dictionary is not None:
            record["dictionary"] = asdict(self.dictionary) | {"dense_features": list(self.dictionary.dense_features)}
        record["by_frequency"] = [asdict(one) | {"fvu": defined(one.fvu)} for one in self.by_frequency]
        if self.baselines:
            record["baselines"] = {name: one.to_json() for name, one in self.baselines.items()}
        return record

    def to_text(self) -> str:
        """The figures, one a line, with a column for each baseline; the dense features; FVU by frequency."""
        tables = [_aligned(self._figures_table("not defined"))]
        tables += [line] if (line := self._dense_line()) else []
        if self.by_frequency:
            tables.append(f"FVU by how frequent a row's token is in training\n{_aligned(self._frequency_table())}")
        return "\n\n".join([*tables, *filter(None, [self.reconstruction.undefined])])

    def _figures_table(self, undefined: str) -> list[list[str]]:
        columns = [self.figures(), *(one.figures() for one in self.baselines.values())]
        head = ["", "this SAE", *self.baselines] if self.baselines else []
        return [head, *([name, *(_shown(c.get(name), undefined) for c in columns)] for name in columns[0])]

    def _frequency_table(self) -> list[list[str]]:
        rows = [["share of rows", "rows", *(["this SAE", *self.baselines] if self.baselines else ["FVU"])]]
        above = float("inf")
        for number, bucket in enumerate(self.by_frequency):
            low, high = f"{bucket.at_least:.3%}", f"{above:.3%}"
            low, high = (text.rstrip("%").rstrip("0").rstrip(".") + " %" for text in (low, high))
            what = f"below {high}" if not bucket.at_least else f"{low} or more" if number == 0 else f"{low} to {high}"
            same = [self.by_frequency, *(one.by_frequency for one in self.baselines.values())]
            rows.append([what, f"{bucket.n_tokens:,}", *(_shown(defined(one[number].fvu), "-") for one in same)])
            above = bucket.at_least
        return rows

    def _dense_line(self, shown: int = 20) -> str:
        if self.dictionary is None or not self.dictionary.dense_features:
            return ""
        ids, above = self.dictionary.dense_features, self.dictionary.dense_above
        more = f" and {len(ids) - shown:,} more" if len(ids) > shown else ""
        return f"features on more than {100 * above:g} % of the tokens: {' '.join(map(str, ids[:shown]))}{more}"


def _shown(value: float | None, undefined: str) -> str:
    return undefined if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, all but the first to the right where there are more than two."""
    rows = [row for row in rows if row]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = rest if len(rest) == 1 else [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def evaluate_sae(
    sae: SAE,
    store: ActivationStore,
    lm: LanguageModel | None = None,
    texts: list[str] | None = None,
    config: EvaluateConfig | None = None,
    *,
    baselines: Mapping[str, SAE] | None = None,
    **overrides: Any,
) -> Evaluation:
    """Measure `sae` on a split of `store` and, given a model and texts, on the model's next-token loss.

    Args:
        sae: the SAE.
        store: a store of its hook point.
        lm: its model; without one only the reconstruction is measured.
        texts: what to measure the model's loss on, each cut to the store's context length.
        config: an `EvaluateConfig`.
        baselines: other SAEs by name, such as those of `random_baselines`, measured in the same way: the passes of the
            model without any SAE serve all of them.
        overrides: fields of `EvaluateConfig`, over those of `config`.

    Raises:
        SteersmanError: SAE, store and model do not belong together; a model without texts; a model given where there is
            no next-token loss to measure, as `no_loss` says.
    """
    config = merged(EvaluateConfig, config, overrides)
    saes = [sae, *(baselines or {}).values()]
    hooks = [_hooks(one, store) for one in saes]
    if lm is not None and (obstacle := no_loss(lm)):
        raise SteersmanError(f"{obstacle}: leave out the model to measure the reconstruction alone")
    if lm is not None and not texts:
        raise SteersmanError("measuring the model's loss needs texts: give --text")
    found = [_evaluated(one, store, of, config) for one, of in zip(saes, hooks)]
    if lm is not None and texts:
        length = store.manifest.config.get("context_length")
        losses = spliced_losses(
            [(one, of[-1]) for one, of in zip(saes, hooks)],
            lm,
            texts,
            {of[-1]: store.stats(of[-1]).mean for of in hooks},
            config.batch_size,
            max_tokens=config.model_tokens,
            context_length=length if isinstance(length, int) else None,
        )
        found = [replace(one, loss=loss) for one, loss in zip(found, losses)]
    return replace(found[0], baselines=dict(zip(baselines or {}, found[1:])))


def _hooks(sae: SAE, store: ActivationStore) -> list[str]:
    """Where it reads and, of a transcoder, where it writes."""
    hook = store.hook_of(sae)
    return [hook, canonical_hook(sae.cfg.hook_name_out)] if sae.cfg.transcoder else [hook]


def _evaluated(sae: SAE, store: ActivationStore, hooks: list[str], config: EvaluateConfig) -> Evaluation:
    """All but the loss."""
    split: Any = {"split": config.split, "heldout_fraction": config.heldout_fraction, "drop_last": False}
    batches = store.batches(BATCH_ROWS, hook=hooks, shuffle=False, **split)
    bar = progress(batches, desc="reconstruction", total=store.n_batches(BATCH_ROWS, **split), unit="batch")
    sums, by_frequency = _measured(sae, store, hooks, bar, TokenFrequency(store, config.heldout_fraction))
    alike, density = crowding(sae), sums.density()
    often = density.argsort(descending=True, stable=True)[: int((density > DENSE).sum())]
    return Evaluation(
        reconstruction=sums.result(),
        loss=None,
        dictionary=Dictionary(
            decoder_cosine=alike.mean_abs, nearest_cosine=alike.nearest, dense_features=tuple(often.tolist())
        ),
        by_frequency=by_frequency,
    )


@torch.no_grad()
def _measured(
    sae: SAE, store: ActivationStore, hooks: list[str], batches: Iterable[ActivationBatch], frequency: TokenFrequency
) -> tuple[ReconstructionSums, tuple[FrequencyBucket, ...]]:
    """The one pass over the rows of one hook point, or of two side by side."""
    sums = ReconstructionSums(sae.cfg.out_width, sae.cfg.d_sae, sae.device)
    groups = GroupedSums(frequency.n_buckets, sae.cfg.out_width, sae.device)
    for batch, (x, target, large) in _read_and_wanted(store, hooks, batches):
        rebuilt, code = sae.reconstruct(x.to(sae.device))
        target = target.to(sae.device)
        sums.add(target, rebuilt, code, large.to(sae.device))
        if frequency.known:
            kept = (~large).nonzero()[:, 0]
            bucket, kept = frequency.bucket(batch.token_ids)[kept].to(sae.device), kept.to(sae.device)
            groups.add(target[kept], rebuilt[kept], bucket)
    if not frequency.known:
        return sums, ()
    return sums, tuple(
        FrequencyBucket(at_least=bound, n_tokens=n, fvu=fvu)
        for bound, (n, fvu) in zip((*frequency.bounds, 0.0), groups.result())
    )


def _read_and_wanted(
    store: ActivationStore, hooks: list[str], batches: Iterable[ActivationBatch]
) -> Iterator[tuple[ActivationBatch, tuple[Tensor, Tensor, Tensor]]]:
    """Of rows of one hook point, or of two side by side: what is read, what is to be given for it, which are large."""
    widths = [store.width(hook) for hook in hooks]
    norms = [store.stats(hook).large_norm for hook in hooks]
    for batch in batches:
        parts = batch.x.split(widths, dim=1)
        large = torch.stack([large_rows(part, norm) for part, norm in zip(parts, norms)]).any(0)
        yield batch, (parts[0], parts[-1], large)
