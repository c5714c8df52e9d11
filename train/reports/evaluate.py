"""`steersman eval`: how well an SAE rebuilds activations, and what its reconstruction does to the model.

With a model, the residual stream at the hook point is replaced by the SAE's reconstruction and the next-token loss is
compared with the unchanged model's and with that of the stream set to its mean (SAEBench's core metrics,
arXiv 2503.09532). BOS and padding are left as they are, as caching leaves them out.

Shape letters: B rows, S positions, D width, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.progress import progress
from steersman.sae import SAE
from steersman.sae.metrics import Reconstruction, measure_reconstruction
from steersman.train.reports.features import BATCH_ROWS
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
    """(ce_mean_ablated - ce_with_sae) / (ce_mean_ablated - ce_clean): 1 is perfect."""
    kl: float
    """KL(unchanged || with the reconstruction)."""
    n_predictions: int
    """Tokens predicted."""

    def record(self) -> dict[str, float]:
        """The figures as files and tables have them: under the names that they always had."""
        on_disk = {"ce_clean": "ce_unsteered", "ce_with_sae": "ce_spliced", "ce_loss_score": "ce_recovered"}
        return {on_disk.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which rows and texts an SAE is measured on, and how many at a time."""

    split: Literal["heldout", "train", "all"] = "heldout"
    """Which rows: those of the last documents, the others, or all."""
    heldout_fraction: float = 0.05
    """Fraction of the rows that is held out."""
    batch_size: int = 16
    """Texts of a forward pass."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate_sae`."""

    reconstruction: Reconstruction
    """On activations."""
    loss: SplicedLoss | None
    """On the model's predictions; None without a model."""

    def to_json(self) -> dict[str, Any]:
        """As `eval --out` writes it."""
        return {"reconstruction": self.reconstruction.record(), "loss": self.loss.record() if self.loss else None}

    def to_text(self) -> str:
        """A two-column table."""
        parts = self.to_json()
        rows = parts["reconstruction"] | (parts["loss"] or {})
        width = max(map(len, rows))
        return "\n".join(
            f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value:.4f}"
            for name, value in rows.items()
        )


def evaluate_sae(
    sae: SAE,
    store: ActivationStore,
    lm: LanguageModel | None = None,
    texts: list[str] | None = None,
    config: EvaluateConfig | None = None,
    **overrides: Any,
) -> Evaluation:
    """Measure `sae` on a split of `store` and, given a model and texts, on the model's next-token loss.

    Args:
        sae: the SAE.
        store: a store of its hook point.
        lm: its model; without one only the reconstruction is measured.
        texts: what to measure the model's loss on.
        config: an `EvaluateConfig`.
        overrides: fields of `EvaluateConfig`, over those of `config`.

    Raises:
        SteersmanError: SAE, store and model do not belong together; a model without texts.
    """
    config = merged(EvaluateConfig, config, overrides)
    hook = store.hook_of(sae)
    split: Any = {"split": config.split, "heldout_fraction": config.heldout_fraction, "drop_last": False}
    batches = store.batches(BATCH_ROWS, hook=hook, shuffle=False, **split)
    bar = progress(batches, desc="reconstruction", total=store.n_batches(BATCH_ROWS, **split), unit="batch")
    reconstruction = measure_reconstruction(sae, (batch.x for batch in bar))
    loss = None
    if lm is not None:
        if not texts:
            raise SteersmanError("measuring the model's loss needs texts: give --text")
        loss = spliced_loss(sae, lm, texts, store.stats(hook).mean, config.batch_size, hook)
    return Evaluation(reconstruction=reconstruction, loss=loss)


@torch.no_grad()
def spliced_loss(
    sae: SAE, lm: LanguageModel, texts: list[str], mean: Tensor, batch_size: int = 16, hook: str | None = None
) -> SplicedLoss:
    """The model's loss on `texts` with the stream as it is, rebuilt by `sae`, and set to `mean` [D].

    `hook` is needed only for an SAE that records no hook point.
    """
    hook = check_sae_fits(lm, sae, hook)

    def rebuilt(h: Tensor, fwd: Any) -> Tensor:
        return torch.where(editable(fwd), sae(h.float()).to(h), h)

    def flattened(h: Tensor, fwd: Any) -> Tensor:
        return torch.where(editable(fwd), mean.to(h), h)

    def editable(fwd: Any) -> Tensor:
        return (fwd.real & ~fwd.is_bos)[..., None]

    sums = torch.zeros(4, dtype=torch.float64, device=lm.device)
    n_predictions = 0
    starts = range(0, len(texts), batch_size)
    for start in progress(starts, desc="model loss", total=len(starts), unit="batch"):
        batch = lm.encode(texts[start : start + batch_size], max_length=lm.context_length)
        predicted = batch.attention_mask[:, 1:].bool()
        clean = lm.logits(batch.input_ids, batch.attention_mask)[:, :-1][predicted].float().log_softmax(-1)
        target = batch.input_ids[:, 1:][predicted]
        losses = [F.nll_loss(clean, target, reduction="sum")]
        divergence = torch.zeros((), device=lm.device)
        for replace in (rebuilt, flattened):
            with lm.edit(hook, replace):
                logits = lm.logits(batch.input_ids, batch.attention_mask)[:, :-1][predicted].float().log_softmax(-1)
            losses.append(F.nll_loss(logits, target, reduction="sum"))
            if replace is rebuilt:
                divergence = F.kl_div(logits, clean, reduction="sum", log_target=True)
        sums += torch.stack([*losses, divergence]).double()
        n_predictions += len(target)
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
