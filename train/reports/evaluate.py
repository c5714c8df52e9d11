"""`steersman eval`: how well an SAE rebuilds activations, and what its reconstruction does to the model.

With a model, the residual stream at the hook point (of a transcoder, what is where it writes) is replaced by the SAE's
reconstruction and the next-token loss is compared with the unchanged model's and with that of the stream set to its
mean (SAEBench's core metrics, arXiv 2503.09532). BOS and padding are left as they are, as caching leaves them out.

How alike features are to one another, which fire on many tokens, and how well rows of rare tokens are rebuilt stand
beside it, since a good reconstruction alone says little (`docs/concepts/judging-saes.md`).

Shape letters: B rows, S positions, D width, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.html import card
from steersman.lm import LanguageModel, TokenBatch
from steersman.lm.origin import canonical_hook, written_at
from steersman.progress import progress
from steersman.sae import SAE
from steersman.sae.metrics import DENSE, GroupedSums, Reconstruction, ReconstructionSums, defined, large_rows
from steersman.sae.neighbours import crowding
from steersman.train.reports.features import BATCH_ROWS
from steersman.train.reports.frequency import TokenFrequency
from steersman.train.store.batch import ActivationBatch
from steersman.train.store.store import ActivationStore


@dataclass(frozen=True, kw_only=True)
class SplicedLoss:
    """What replacing the residual stream by its reconstruction does to the model, in nats per predicted token."""

    ce_clean: float
    """Cross-entropy of the unchanged model."""
    ce_with_sae: float
    """With the SAE's reconstruction in place of the stream."""
    ce_mean_ablated: float
    """With the mean activation in place of the stream."""
    ce_loss_score: float
    """(ce_mean_ablated - ce_with_sae) / (ce_mean_ablated - ce_clean): 1 is perfect. NaN where setting the stream to its
    mean changes nothing."""
    kl: float
    """KL(unchanged || with the reconstruction)."""
    n_predictions: int
    """Tokens predicted."""

    def record(self) -> dict[str, float | None]:
        """The figures as files and tables have them: under the names that they always had, None for what is not
        defined."""
        on_disk = {"ce_clean": "ce_unsteered", "ce_with_sae": "ce_spliced", "ce_loss_score": "ce_recovered"}
        return {on_disk.get(name, name): defined(value) for name, value in asdict(self).items()}


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
        baselines: other SAEs by name, such as those of `random_baselines`, measured in the same way.
        overrides: fields of `EvaluateConfig`, over those of `config`.

    Raises:
        SteersmanError: SAE, store and model do not belong together; a model without texts; a model given where there is
            no next-token loss to measure, as `no_loss` says.
    """
    config = merged(EvaluateConfig, config, overrides)
    hook = store.hook_of(sae)
    if lm is not None and (obstacle := no_loss(sae, lm)):
        raise SteersmanError(f"{obstacle}: leave out the model to measure the reconstruction alone")
    if lm is not None and not texts:
        raise SteersmanError("measuring the model's loss needs texts: give --text")
    split: Any = {"split": config.split, "heldout_fraction": config.heldout_fraction, "drop_last": False}
    hooks = [hook, canonical_hook(sae.cfg.hook_name_out)] if sae.cfg.transcoder else [hook]
    batches = store.batches(BATCH_ROWS, hook=hooks, shuffle=False, **split)
    bar = progress(batches, desc="reconstruction", total=store.n_batches(BATCH_ROWS, **split), unit="batch")
    sums, by_frequency = _measured(sae, store, hooks, bar, TokenFrequency(store, config.heldout_fraction))
    reconstruction = sums.result()
    loss = None
    if lm is not None and texts:
        length = store.manifest.config.get("context_length")
        loss = spliced_loss(
            sae,
            lm,
            texts,
            store.stats(hooks[-1]).mean,
            config.batch_size,
            hooks[-1],
            max_tokens=config.model_tokens,
            context_length=length if isinstance(length, int) else None,
        )
    alike, density = crowding(sae), sums.density()
    often = density.argsort(descending=True, stable=True)[: int((density > DENSE).sum())]
    return Evaluation(
        reconstruction=reconstruction,
        loss=loss,
        dictionary=Dictionary(
            decoder_cosine=alike.mean_abs, nearest_cosine=alike.nearest, dense_features=tuple(often.tolist())
        ),
        by_frequency=by_frequency,
        baselines={name: evaluate_sae(one, store, lm, texts, config) for name, one in (baselines or {}).items()},
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


def no_loss(sae: SAE, lm: LanguageModel) -> str:
    """Why there is no next-token loss to measure; nothing where there is one."""
    if not lm.can_generate:
        return f"{lm.name} is an encoder, which sees the next token and does not predict it"
    return ""


@torch.no_grad()
def spliced_loss(
    sae: SAE,
    lm: LanguageModel,
    texts: list[str],
    mean: Tensor,
    batch_size: int = 16,
    hook: str | None = None,
    *,
    max_tokens: int | None = None,
    context_length: int | None = None,
) -> SplicedLoss:
    """The model's loss on `texts` with the stream as it is, rebuilt by `sae`, and set to `mean` [D]. A transcoder's
    prediction takes the place of what stands where it writes, such as an MLP's output.

    `hook`, where the SAE writes, is needed only for one that records no hook point. Each text is cut to
    `context_length` tokens or the model's own limit; no further text is read once they have `max_tokens` tokens.
    """
    hook = written_at(lm, sae, hook)
    read_at = lm.resolve_hook(sae.cfg.hook_name) if sae.cfg.transcoder else hook
    if obstacle := no_loss(sae, lm):
        raise SteersmanError(obstacle)
    length = min((n for n in (context_length, lm.context_length) if n is not None), default=None)

    def look(h: Tensor, fwd: Any) -> Tensor:
        fwd.memo[sae] = h
        return h

    def rebuilt(h: Tensor, fwd: Any) -> Tensor:
        read = h if read_at == hook else fwd.memo[sae]
        return torch.where(editable(fwd), sae(read.float()).to(h), h)

    def flattened(h: Tensor, fwd: Any) -> Tensor:
        return torch.where(editable(fwd), mean.to(h), h)

    def editable(fwd: Any) -> Tensor:
        return (fwd.real & ~fwd.is_bos)[..., None]

    sums = torch.zeros(4, dtype=torch.float64, device=lm.device)
    n_predictions = 0
    batches = _within_budget(lm, texts, batch_size, length, max_tokens)
    bar = progress(desc="model loss", total=sum(int(batch.attention_mask.sum()) for batch in batches), unit="tok")
    for batch in batches:
        predicted = batch.attention_mask[:, 1:].bool()
        clean = lm.logits(batch.input_ids, batch.attention_mask)[:, :-1][predicted].float().log_softmax(-1)
        target = batch.input_ids[:, 1:][predicted]
        losses = [F.nll_loss(clean, target, reduction="sum")]
        divergence = torch.zeros((), device=lm.device)
        for replace in (rebuilt, flattened):
            with ExitStack() as edits:
                if read_at != hook:
                    edits.enter_context(lm.edit(read_at, look))
                edits.enter_context(lm.edit(hook, replace))
                logits = lm.logits(batch.input_ids, batch.attention_mask)[:, :-1][predicted].float().log_softmax(-1)
            losses.append(F.nll_loss(logits, target, reduction="sum"))
            if replace is rebuilt:
                divergence = F.kl_div(logits, clean, reduction="sum", log_target=True)
        sums += torch.stack([*losses, divergence]).double()
        n_predictions += len(target)
        bar.update(int(batch.attention_mask.sum()))
    bar.close()
    if n_predictions == 0:
        raise SteersmanError("the texts are too short: no token of them is predicted from another")
    clean_loss, with_sae, ablated, kl = (sums / n_predictions).tolist()
    return SplicedLoss(
        ce_clean=clean_loss,
        ce_with_sae=with_sae,
        ce_mean_ablated=ablated,
        ce_loss_score=(ablated - with_sae) / (ablated - clean_loss) if ablated != clean_loss else float("nan"),
        kl=kl,
        n_predictions=n_predictions,
    )


def _within_budget(
    lm: LanguageModel, texts: list[str], batch_size: int, length: int | None, max_tokens: int | None
) -> list[TokenBatch]:
    """The texts in batches of token ids, up to the one that reaches `max_tokens`."""
    batches, n_tokens = [], 0
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        batch = lm.encode(part, max_length=length)
        reached = n_tokens + batch.attention_mask.sum(dim=1).cumsum(0)
        if max_tokens is not None and int(reached[-1]) >= max_tokens:
            n = int((reached < max_tokens).sum()) + 1
            return [*batches, lm.encode(part[:n], max_length=length)]
        batches.append(batch)
        n_tokens = int(reached[-1])
    return batches
