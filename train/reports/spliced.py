"""What SAEs' reconstructions do to a model: its next-token loss with the residual stream at the hook point (of a
transcoder, what is where it writes) as it is, replaced by each reconstruction, and set to its mean (SAEBench's core
metrics, arXiv 2503.09532). BOS and padding are left as they are, as caching leaves them out.

Shape letters: B rows, S positions, D width, V vocabulary.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel, TokenBatch
from steersman.lm.origin import written_at
from steersman.progress import progress
from steersman.sae import SAE
from steersman.sae.metrics import defined


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


def no_loss(lm: LanguageModel) -> str:
    """Why there is no next-token loss to measure; nothing where there is one."""
    if not lm.can_generate:
        return f"{lm.name} is an encoder, which sees the next token and does not predict it"
    return ""


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
    """`spliced_losses` of one SAE. `hook`, where it writes, is needed only for one that records no hook point, and
    `mean` [D] is the mean there."""
    hook = written_at(lm, sae, hook)
    (loss,) = spliced_losses(
        [(sae, hook)], lm, texts, {hook: mean}, batch_size, max_tokens=max_tokens, context_length=context_length
    )
    return loss


@torch.no_grad()
def spliced_losses(
    saes: Sequence[tuple[SAE, str]],
    lm: LanguageModel,
    texts: list[str],
    means: Mapping[str, Tensor],
    batch_size: int = 16,
    *,
    max_tokens: int | None = None,
    context_length: int | None = None,
) -> list[SplicedLoss]:
    """The model's loss on `texts` with the stream as it is, rebuilt by each SAE, and set to the mean. A transcoder's
    prediction takes the place of what stands where it writes, such as an MLP's output.

    The pass of the unchanged model serves all SAEs, that with the mean all that write at one hook point: n SAEs of one
    take n + 2 passes.

    Args:
        saes: SAEs, each with the hook point where it writes.
        lm: their model.
        texts: each is cut to `context_length` tokens or the model's own limit; no further text is read once they have
            `max_tokens` tokens.
        means: the mean [D] at each of the hook points.

    Raises SteersmanError for an SAE that does not belong to the model, and for texts without a token to predict.
    """
    if obstacle := no_loss(lm):
        raise SteersmanError(obstacle)
    length = min((n for n in (context_length, lm.context_length) if n is not None), default=None)
    places = list(dict.fromkeys(hook for _, hook in saes))
    edits = [
        *(_rebuilding(lm, sae, written_at(lm, sae, hook)) for sae, hook in saes),
        *(_edit(lm, hook, lambda h, fwd, mean=means[hook]: mean.to(h)) for hook in places),
    ]
    sums = torch.zeros(1 + len(edits), 2, dtype=torch.float64, device=lm.device)
    """Of the unchanged model and of each edit the loss, and of each SAE the divergence."""
    n_predictions = 0
    batches = _within_budget(lm, texts, batch_size, length, max_tokens)
    bar = progress(desc="model loss", total=sum(int(batch.attention_mask.sum()) for batch in batches), unit="tok")
    for batch in batches:
        predicted = batch.attention_mask[:, 1:].bool()
        target = batch.input_ids[:, 1:][predicted]
        clean = None
        for i, edit in enumerate([nullcontext, *edits]):
            with edit():
                logits = lm.logits(batch.input_ids, batch.attention_mask)[:, :-1][predicted].float().log_softmax(-1)
            clean = logits if clean is None else clean
            sums[i, 0] += F.nll_loss(logits, target, reduction="sum")
            if 0 < i <= len(saes):
                sums[i, 1] += F.kl_div(logits, clean, reduction="sum", log_target=True)
        n_predictions += len(target)
        bar.update(int(batch.attention_mask.sum()))
    bar.close()
    if n_predictions == 0:
        raise SteersmanError("the texts are too short: no token of them is predicted from another")
    (clean_loss, _), *found = (sums / n_predictions).tolist()
    ablated = {hook: loss for hook, (loss, _) in zip(places, found[len(saes) :])}
    return [
        SplicedLoss(
            ce_clean=clean_loss,
            ce_with_sae=with_sae,
            ce_mean_ablated=ablated[hook],
            ce_loss_score=_recovered(clean_loss, with_sae, ablated[hook]),
            kl=kl,
            n_predictions=n_predictions,
        )
        for (_, hook), (with_sae, kl) in zip(saes, found)
    ]


def _recovered(clean: float, with_sae: float, ablated: float) -> float:
    return (ablated - with_sae) / (ablated - clean) if ablated != clean else float("nan")


_Entered = Callable[[], Any]
"""Makes a context manager in which passes of the model are edited."""


def _edit(lm: LanguageModel, hook: str, put: Callable[[Tensor, Any], Tensor]) -> _Entered:
    """What `put` gives for the states [B, S, D] takes the place of those that are neither BOS nor padding."""

    def replace(h: Tensor, fwd: Any) -> Tensor:
        return torch.where((fwd.real & ~fwd.is_bos)[..., None], put(h, fwd), h)

    return lambda: lm.edit(hook, replace)


def _rebuilding(lm: LanguageModel, sae: SAE, hook: str) -> _Entered:
    """The SAE's reconstruction takes the place of the states."""
    if not sae.cfg.transcoder:
        return _edit(lm, hook, lambda h, fwd: sae(h.float()).to(h))

    def look(h: Tensor, fwd: Any) -> Tensor:
        fwd.memo[sae] = h
        return h

    writing = _edit(lm, hook, lambda h, fwd: sae(fwd.memo[sae].float()).to(h))

    @contextmanager
    def both() -> Generator[None]:
        with lm.edit(lm.resolve_hook(sae.cfg.hook_name), look), writing():
            yield

    return both


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
