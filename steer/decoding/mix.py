"""Mixtures of next-token distributions: experts and amateurs, negative prompts, guidance, lens layers.

log p^ = sum_k w_k log p_k, normalised, over tokens that the main source finds plausible: log p_main >= max log p_main +
log `plausible`. Where a weight is negative the mask is needed: a token that the others find nearly impossible would
gain without bound.

| name | weights | source |
|---|---|---|
| `Mix.experts` | 1 base, g expert, -g anti-expert | DExperts, arXiv 2105.03023 |
| `Mix.contrastive` | 1 expert, -1 amateur | contrastive decoding, arXiv 2210.15097 |
| `Mix.steer` | 1 + g fine-tuned, -g base, -eta fine-tuned with a negative prompt | STEER, arXiv 2308.07645 |
| `Mix.negative_prompt` | 1 + g, -g the negative prompt | as classifier-free guidance |
| `Mix.guidance` | g with the prompt, 1 - g without | classifier-free guidance, arXiv 2306.17806 |
| `Mix.lens` | 1 - g, g / L for each of L lens layers | VISTA's token augmentation, arXiv 2502.03628 |

Shape letters: B rows, V vocabulary, K sources.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm import Generation, LanguageModel
from steersman.lm.hooks import HookName
from steersman.lm.lens import check_lens
from steersman.lm.tokens import Prompt, TokenBatch, as_prompts
from steersman.steer.decoding.streams import Chooser, Stream, check_same_tokenizer, continue_rows, encoded
from steersman.steer.edits.base import PerRow, common_rows, per_row

IMPOSSIBLE = -1e4
"""log p of what a source other than the main one rules out, so that no weight makes it infinite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MixSource:
    """Where next-token distributions come from. `MixSource()` is the model itself, with its prompts, as it is."""

    prompts: str | Sequence[Prompt] | None = None
    """Other prompts: one for all rows, or a list with one for each. The tokens that are written follow them too."""
    steering: AbstractContextManager[Any] | None = None
    """What steers it, such as `st.vector(v)`; what is open around the decoding steers every source of its model."""
    layer: HookName | None = None
    """Read the logit lens here (final norm and output layer), not the output; a number means what its block returns."""
    lm: LanguageModel | None = None
    """Another model with the same tokenizer."""


@dataclass(frozen=True, eq=False)
class Mix:
    """A mixture of sources, of which the first is the main one. `generate` decodes from it.

    Sources of one model, prompts and steering share their passes, and models their weights; each stream has a KV cache
    of its own and is fed the same tokens. With a weight of 1 on the main source and 0 on all others it is plain
    generation, bit for bit. Beams are not covered: a mixture is decoded greedily or by sampling.

    >>> mix = Mix([(1.5, MixSource()), (-0.5, MixSource(prompts="Write badly."))], plausible=0.1)
    """

    sources: Sequence[tuple[PerRow, MixSource]]
    """(weight, source): a number, or one per prompt."""
    plausible: float | None = 0.1
    """Tokens below this part of the main source's largest probability are left out; None leaves out none."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise SteersmanError("a mixture needs at least one source")
        if self.plausible is not None and not 0 < self.plausible <= 1:
            raise SteersmanError(f"plausible must lie in (0, 1], or be None for no mask, got {self.plausible}")

    # The systems that are mixtures

    @classmethod
    def experts(cls, expert: MixSource, anti: MixSource, *, g: PerRow = 1.0, plausible: float | None = None) -> "Mix":
        """p p_expert^g / p_anti^g (DExperts; the source has no mask)."""
        return cls([(1.0, MixSource()), (g, expert), (_times(g, -1), anti)], plausible)

    @classmethod
    def contrastive(cls, amateur: MixSource, *, g: PerRow = 1.0, plausible: float | None = 0.1) -> "Mix":
        """p / p_amateur^g among the plausible tokens (contrastive decoding, with its mask)."""
        return cls([(1.0, MixSource()), (_times(g, -1), amateur)], plausible)

    @classmethod
    def steer(
        cls,
        base: MixSource,
        negative: str | Sequence[Prompt],
        *,
        g: PerRow = 0.2,
        eta: PerRow = 0.2,
        plausible: float | None = 0.1,
    ) -> "Mix":
        """p^(1 + g) / (p_base^g p(. | negative prompt)^eta) with the model itself as the fine-tuned one (STEER).

        The source has no mask (`plausible=None`), and in one version its negative branch never sees what is written.
        """
        against = MixSource(prompts=negative)
        return cls([(_plus(g, 1), MixSource()), (_times(g, -1), base), (_times(eta, -1), against)], plausible)

    @classmethod
    def negative_prompt(
        cls, prompts: str | Sequence[Prompt], *, g: PerRow = 0.5, plausible: float | None = 0.1
    ) -> "Mix":
        """p^(1 + g) / p(. | negative prompt)^g."""
        return cls([(_plus(g, 1), MixSource()), (_times(g, -1), MixSource(prompts=prompts))], plausible)

    @classmethod
    def guidance(
        cls, unconditional: str | Sequence[Prompt], *, g: PerRow = 1.5, plausible: float | None = None
    ) -> "Mix":
        """p(. | prompt)^g p(. | unconditional)^(1 - g), with no mask: transformers' `guidance_scale=g`."""
        return cls([(g, MixSource()), (_plus(_times(g, -1), 1), MixSource(prompts=unconditional))], plausible)

    @classmethod
    def lens(cls, layers: Sequence[HookName], *, g: PerRow = 0.3) -> "Mix":
        """p^(1 - g) prod_l p_l^(g / L) with the logit lens at each of L layers (VISTA: g = .3 over layers 25 to 30 of
        32). The final norm is applied to every layer, which theirs leaves out of all but the last."""
        share = _times(g, 1 / len(layers)) if layers else g
        return cls(
            [(_plus(_times(g, -1), 1), MixSource()), *((share, MixSource(layer=layer)) for layer in layers)], None
        )

    # Decoding

    def mixed(self, logits: Sequence[Tensor]) -> Tensor:
        """[B, V] fp32 from the logits [B, V] of every source; rows in which only the main one weighs are its own."""
        weights = self._weights(logits[0].device)
        B = len(logits[0])
        rows = [w if len(w) == 1 else w.repeat_interleave(B // len(w)) for w in weights]
        main = logits[0].float()
        total = torch.zeros_like(main)
        for w, given in zip(rows, logits):
            if bool((w == 0).all()):
                continue
            logp = given.to(main.device)[:, : main.shape[1]].float().log_softmax(-1).clamp(min=IMPOSSIBLE)
            total = total + w[:, None] * logp
        if self.plausible is not None:
            least = main.amax(-1, keepdim=True) + math.log(self.plausible)
            total = total.masked_fill(main < least, -torch.inf)
        total = total.masked_fill(main == -torch.inf, -torch.inf)
        alone = rows[0] == 1
        for w in rows[1:]:
            alone = alone & (w == 0)
        return torch.where(alone[:, None], main, total)

    def _weights(self, device: torch.device) -> list[Tensor]:
        found = [per_row(weight, "weight", device) for weight, _ in self.sources]
        common_rows(**{f"source {k}": len(w) for k, w in enumerate(found)})
        return found

    @torch.no_grad()
    def generate(
        self,
        lm: LanguageModel,
        prompts: str | Sequence[Prompt] | Tensor,
        *,
        max_new_tokens: int = 40,
        do_sample: bool | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        num_return_sequences: int = 1,
        bos: bool = True,
    ) -> Generation:
        """Continue each prompt from the mixture; settings as for `LanguageModel.generate`.

        Raises SteersmanError for weights or prompts of another number of rows, a model with another tokenizer, and a
        layer whose logit lens is not the model's output layer.
        """
        steps = whole_number(max_new_tokens, "max_new_tokens", at_least=1)
        chooser = Chooser(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        given, batch = encoded(lm, prompts, bos)
        rows = {len(w) for w in self._weights(lm.device)} - {1, len(given)}
        if rows:
            raise SteersmanError(f"a weight has {rows.pop()} rows and there are {len(given)} prompts")
        with self.opened(lm, batch, num_return_sequences, max_new_tokens=steps, bos=bos) as streams:
            total = len(given) * num_return_sequences
            return continue_rows(lm, given, batch, total, streams.logits, streams.feed, chooser, steps)

    @contextmanager
    def opened(
        self, lm: LanguageModel, batch: TokenBatch, copies: int, *, max_new_tokens: int, bos: bool = True
    ) -> Iterator["MixStreams"]:
        """The streams of the mixture, each having read its prompts, while the context is open: `copies` rows for each
        prompt of `batch`, left-padded. What `generate` decodes from, and what particles take as a guide."""
        plans = self._plans(lm, batch, len(batch.input_ids), bos)
        for plan in plans:
            plan.lm.check_room(plan.batch.input_ids.shape[1], max_new_tokens)
        with ExitStack() as stack:
            for plan in plans:
                stack.enter_context(plan.open(copies))
            order = {k: (plan, layer) for plan in plans for k, layer in plan.members}
            yield MixStreams(self._chosen(sorted(order)), plans, [order[k] for k in sorted(order)])

    def _chosen(self, numbers: Sequence[int]) -> "Mix":
        return self if len(numbers) == len(self.sources) else Mix([self.sources[k] for k in numbers], self.plausible)

    def _plans(self, lm: LanguageModel, batch: TokenBatch, rows: int, bos: bool) -> list["_Plan"]:
        """The streams to run: one for each model, prompts and steering; sources that weigh nothing have none."""
        plans: dict[tuple[int, int, int], _Plan] = {}
        for k, (weight, source) in enumerate(self.sources):
            if k and not bool(per_row(weight, "weight", torch.device("cpu")).any()):
                continue
            own = source.lm or lm
            check_same_tokenizer(lm, own)
            if source.layer is not None:
                check_lens(own)
            key = (id(own), id(source.prompts), id(source.steering))
            if key not in plans:
                tokens = batch if source.prompts is None else _others(lm, source.prompts, rows, bos)
                plans[key] = _Plan(own, tokens.to(own.device), source.steering)
            plans[key].members.append((k, None if source.layer is None else own.resolve_hook(source.layer)))
        return list(plans.values())


class _Plan:
    """A stream to be opened, and the sources that read it."""

    def __init__(self, lm: LanguageModel, batch: TokenBatch, steering: AbstractContextManager[Any] | None) -> None:
        self.lm, self.batch, self.steering = lm, batch, steering
        self.members: list[tuple[int, HookName | None]] = []
        self.stream: Stream

    def open(self, copies: int) -> Stream:
        layers = list(dict.fromkeys(layer for _, layer in self.members if layer is not None))
        self.stream = Stream(self.lm, self.batch, copies=copies, steering=self.steering, layers=layers)
        return self.stream


class MixStreams:
    """The opened streams of a mixture, fed the same tokens; a `Source` of next-token distributions."""

    def __init__(self, mix: Mix, plans: list[_Plan], members: list[tuple[_Plan, HookName | None]]) -> None:
        self.mix, self.plans, self.members = mix, plans, members
        self.passes, self.rows = len(plans), sum(len(plan.batch.input_ids) for plan in plans)

    def logits(self) -> Tensor:
        """[B, V] fp32: of the mixture, for the next token of each row."""
        return self.mix.mixed([plan.stream.logits(layer) for plan, layer in self.members])

    def log_probs(self) -> Tensor:
        """[B, V] fp32: the same as log-probabilities."""
        return self.logits().log_softmax(-1)

    def feed(self, tokens: Tensor) -> None:
        """Continue each row by one of `tokens` [B]."""
        for plan in self.plans:
            plan.stream.feed(tokens)
        self.passes, self.rows = self.passes + len(self.plans), self.rows + len(self.plans) * len(tokens)

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        """Row i becomes row `parents[i]` as it was, followed by `tokens[i]`."""
        for plan in self.plans:
            plan.stream.session.reorder(parents)
        self.feed(tokens)


def _others(lm: LanguageModel, prompts: Any, rows: int, bos: bool) -> TokenBatch:
    others = as_prompts(prompts)
    if len(others) not in (1, rows):
        raise SteersmanError(f"a source has {len(others)} prompts and there are {rows}: give one for each, or one")
    return encoded(lm, others * (rows // len(others)), bos)[1]


def _times(value: PerRow, factor: float) -> PerRow:
    return per_row(value, "weight", torch.device("cpu")) * factor


def _plus(value: PerRow, term: float) -> PerRow:
    return per_row(value, "weight", torch.device("cpu")) + term
