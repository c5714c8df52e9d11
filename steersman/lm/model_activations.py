"""The part of `LanguageModel` that reads features: what fires on a text."""

from typing import Any

import torch

from steersman.errors import SteersmanError
from steersman.lm.activations import Activations, TextActivations, Units, factors_of, labels_of, token_texts
from steersman.lm.hooks import HookName
from steersman.lm.model_passes import ModelPasses
from steersman.lm.model_text import ModelText
from steersman.lm.origin import check_sae_fits
from steersman.lm.tokens import Prompts, TokenBatch, as_prompts, bos_tokens
from steersman.progress import progress


class ModelActivations(ModelText, ModelPasses):
    """Texts read through a sparse autoencoder."""

    @torch.no_grad()
    def activations(
        self,
        sae: Any,
        texts: Prompts,
        *,
        hook: HookName | None = None,
        units: Units = "raw",
        max_density: float | None = None,
        include_bos: bool = False,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> Activations:
        """Which features fire on each token of each text, and of the text the strongest.

        Args:
            sae: an `SAE` of one of this model's hook points, or whatever else has its `cfg`, `device` and
                `encode_sparse`; labels and `units` max_act come from its `labels` and `feature_stats`.
            texts: one text or several, as for `encode`: strings, token ids, conversations.
            hook: where to read, for an SAE that records no hook point.
            units: raw activations, or max_act, shares of each feature's largest activation in training, which compare
                features of unlike scale; a feature that never fired there then counts for nothing.
            max_density: leave out features that fired on a larger share of the tokens in training, such as 0.1: they
                say little of one text.
            include_bos: whether features of the BOS count. It is an attention sink in most models: what fires there
                is strong and says nothing of the text.
            batch_size: texts a pass.
            max_length: cut texts to this many tokens, BOS included.

        Raises SteersmanError for an SAE that does not fit this model, a text longer than its context, states that are
        not finite, and an SAE without statistics where they are needed. Inside an edit the edited states are read.

        >>> [[found.feature for found in text.top(3)] for text in lm.activations(sae, "w7 w8")]  # doctest: +SKIP
        [[3, 4]]
        """
        where, factors = check_sae_fits(self, sae, hook), factors_of(sae, units, max_density)
        if batch_size < 1:
            raise SteersmanError(f"batch_size must be at least 1, got {batch_size}")
        given = as_prompts(texts)
        found: list[TextActivations] = []
        starts = range(0, len(given), batch_size)
        for start in progress(starts, desc="reading texts", total=len(starts), unit="batch", shown=len(starts) > 1):
            batch = self.encode(given[start : start + batch_size], max_length=max_length)
            self._check_length(batch, start)
            states = self.capture(batch, hooks=[where])[where]
            mask = batch.attention_mask.bool()
            counted = mask if include_bos else mask & ~bos_tokens(batch.input_ids, mask, self._texts().known_bos)
            for row in range(len(states)):
                real = mask[row]
                x = states[row][real].to(sae.device).float()
                if not bool(x[counted[row][real].to(x.device)].isfinite().all()):
                    raise SteersmanError(f"{self.name} gives NaN or infinite states at {where} on text {start + row}")
                kept = counted[row][real].cpu()
                code = sae.encode_sparse(x)
                values, indices = code.values.float().cpu(), code.indices.cpu()
                if factors is not None:
                    values = values * factors[indices]
                values = torch.where(kept[:, None], values, 0.0)
                ids = batch.input_ids[row][real].tolist()
                found.append(
                    TextActivations(
                        tokens=token_texts(self.tokenizer, ids), token_ids=ids, counted=kept, values=values,
                        indices=indices, hook_name=where, units=units,
                        labels=labels_of(sae, indices[values != 0].unique().tolist()),
                    )
                )  # fmt: skip
        return Activations(found)

    def _check_length(self, batch: TokenBatch, first: int) -> None:
        longest = int(batch.lengths.argmax())
        if self.context_length is not None and int(batch.lengths[longest]) > self.context_length:
            raise SteersmanError(
                f"text {first + longest} has {int(batch.lengths[longest])} tokens and the context of {self.name} is "
                f"{self.context_length}: shorten it or set max_length"
            )
