"""Average feature activations over texts that a steered model writes (arXiv 2411.02193, sec. 3).

The texts are read by the UNSTEERED model up to the SAE's hook point. Where the steering is at or above that hook point,
the states of the generating pass before the edit are just those: what is added to the residual stream changes later
layers only. So they are encoded as they pass, and no text is read twice. Steering below the hook point makes
the second reading necessary, and then it is done.

Shape letters: G vectors, R rollouts of each, r of them in a batch, P prompts of one length, T new tokens, L latents,
D width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steersman.lm import LanguageModel
from steersman.lm.kv_buffers import RowBuffers
from steersman.lm.sampler import Sampler
from steersman.lm.tokens import TokenBatch, bos_tokens
from steersman.sae import SAE
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.steerer import Steerer

_CODES = 1 << 26
"""Numbers of one batch's table of activations, rows x latents, at most: 256 MiB of fp32."""
BASE = -1
"""The number that stands for the unsteered rollouts where others have their vector's."""


class Averages(NamedTuple):
    """Averages over the rollouts of each of G vectors."""

    mean: Tensor
    """[G, L] float64: average activation of each feature over the counted positions of all rollouts."""
    standard_error: Tensor
    """[G, L] float64: of that average, with rollouts as the independent units."""
    positions: Tensor
    """[G] int64: counted positions."""


class Sums:
    """Running sums over rollouts, of which averages and their standard errors are made.

    The average is a ratio, sum of activations s_r over sum of positions n_r, since texts may end early; its
    squared standard error is R / (R - 1) sum_r (s_r - mean n_r)^2 / (sum_r n_r)^2.
    """

    def __init__(self, n_vectors: int, n_latents: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.s, self.ss, self.sn = (zeros(n_vectors, n_latents) for _ in range(3))
        self.n, self.nn, self.rows = (zeros(n_vectors, 1) for _ in range(3))

    def add(self, vector: int, sums: Tensor, counts: Tensor) -> None:
        """Take in rollouts of one vector: sums [R, L] of activations and counts [R] of positions."""
        s, n = sums.double(), counts.double()[:, None]
        self.s[vector] += s.sum(0).cpu()
        self.ss[vector] += s.square().sum(0).cpu()
        self.sn[vector] += (s * n).sum(0).cpu()
        self.n[vector] += n.sum().cpu()
        self.nn[vector] += n.square().sum().cpu()
        self.rows[vector] += len(n)

    def averages(self) -> Averages:
        """What they come to. A vector whose texts all end at once has the average 0 and an infinite error."""
        total = self.n.clamp_min(1)
        mean = self.s / total
        spread = (self.ss - 2 * mean * self.sn + mean.square() * self.nn).clamp_min(0)
        error = (spread * self.rows / (self.rows - 1).clamp_min(1)).sqrt() / total
        error[self.n[:, 0] == 0] = float("inf")
        return Averages(mean, error, self.n[:, 0].long())


def uniforms(seed: int, vector: int, rollouts: int, new_tokens: int) -> Tensor:
    """The random numbers [R, T] of one vector's rollouts: they depend on nothing but these arguments."""
    state = np.random.SeedSequence([seed, vector + 1]).generate_state(2, np.uint32)
    g = torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
    return torch.rand(rollouts, new_tokens, generator=g)


class PromptGroup(NamedTuple):
    """The prompts of one length: together they need no padding, which makes attention twice as fast on a CPU."""

    members: Tensor
    """[P] int64, rising: which of the configuration's openings."""
    prompts: TokenBatch
    """Their tokens."""
    sampler: Sampler
    """Continues them."""
    sums: Tensor
    """[P, L]: activations over the counted positions of each prompt itself."""
    counts: Tensor
    """[P]: number of those."""


class RolloutMeter:
    """Samples texts under steering vectors and averages the SAE's features over them."""

    def __init__(self, lm: LanguageModel, sae: SAE, hook: str, config: EffectsConfig) -> None:
        self.lm, self.sae, self.hook, self.config = lm, sae, hook, config
        self.read_at = lm.resolve_hook(sae.cfg.hook_name)
        # What is edited no earlier than it is read leaves the reading as it is.
        self.read_again = lm.hook_point(hook) < lm.hook_point(self.read_at)
        self.steerer = Steerer(lm)
        self.most_rows = max(1, min(config.batch_rows, _CODES // sae.cfg.d_sae))
        lengths = lm.encode(config.apply(config.openings)).lengths.tolist()
        self.buffers = RowBuffers(max(lengths) + config.new_tokens)
        self.groups = [self._group(length, lengths) for length in sorted(set(lengths))]

    def _group(self, length: int, lengths: list[int]) -> "PromptGroup":
        members = [p for p, found in enumerate(lengths) if found == length]
        prompts = self.lm.encode(self.config.apply([self.config.openings[p] for p in members]))
        sampler = Sampler(self.lm, prompts, self.config.sampling, self.config.new_tokens, self.buffers)
        return PromptGroup(torch.tensor(members), prompts, sampler, *self._read_prompts(prompts))

    @torch.no_grad()
    def _read_prompts(self, prompts: TokenBatch) -> tuple[Tensor, Tensor]:
        """What prompts themselves add to a rollout's sums [P, L] and counts [P]: the same under every vector."""
        P, L, device = len(prompts.input_ids), self.sae.cfg.d_sae, self.lm.device
        counted = prompts.attention_mask.bool().clone()
        if self.config.positions == "generated":
            return torch.zeros(P, L, device=device), torch.zeros(P, dtype=torch.long, device=device)
        if self.config.positions == "text":
            counted &= ~bos_tokens(prompts.input_ids, prompts.attention_mask, self.lm.bos_token_id)
        h = self.lm.capture(prompts.input_ids, prompts.attention_mask, hooks=[self.read_at])[self.read_at]
        code = self.sae.encode_sparse(h.flatten(0, 1))
        sums = torch.zeros(P, L, device=device)
        rows = torch.arange(P, device=device).repeat_interleave(h.shape[1])
        values = code.values.to(device) * counted.flatten()[:, None]
        sums.index_put_((rows[:, None].expand_as(code.indices), code.indices.to(device)), values, accumulate=True)
        return sums, counted.sum(1)

    def measure(self, vectors: Tensor, scales: Tensor, numbers: Sequence[int], rollouts: int, seed: int) -> Averages:
        """Averages under `scales` [G] times `vectors` [G, D]; the vector's `numbers` and `seed` fix its texts."""
        G, R = len(vectors), rollouts
        sums = Sums(G, self.sae.cfg.d_sae)
        drawn = torch.stack([uniforms(seed, v, R, self.config.new_tokens) for v in numbers])
        for group in self.groups:
            mine = self.rollouts_of(group, R)
            if not len(mine):
                continue
            together = max(1, self.most_rows // len(mine))
            for start in range(0, G, together):
                part = slice(start, start + together)
                for rows in mine.split(self.most_rows):
                    table, counts, _ = self._batch(group, vectors[part], scales[part], rows, drawn[part][:, rows])
                    for i in range(len(table)):
                        sums.add(start + i, table[i], counts[i])
        return sums.averages()

    def rollouts_of(self, group: "PromptGroup", rollouts: int) -> Tensor:
        """Which of a vector's rollouts continue a prompt of the group: rollout r has prompt r modulo P."""
        r = torch.arange(rollouts)
        return r[torch.isin(r % len(self.config.openings), group.members)]

    def unsteered(
        self, group: "PromptGroup", nothing: Tensor, rows: Tensor, drawn: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """As `_batch`, of texts that are not steered: `nothing` is [1, D] of zeros."""
        return self._batch(group, nothing, torch.zeros(1), rows, drawn)

    def base(self) -> tuple[Averages, float]:
        """Averages over the unsteered rollouts (G = 1), and the median norm of their states where vectors are added."""
        config = self.config
        nothing = torch.zeros(1, self.lm.hook_width(self.hook))
        averages = self.measure(nothing, torch.zeros(1), [BASE], config.n_base, config.seed)
        drawn = uniforms(config.seed, BASE, config.n_base, config.new_tokens)[None]
        norms = []
        for group in self.groups:
            rows = self.rollouts_of(group, min(config.n_base, 256))[: self.most_rows]
            if len(rows):
                _, _, (tokens, mask) = self._batch(group, nothing, torch.zeros(1), rows, drawn[:, rows])
                h = self.lm.capture(tokens, mask, hooks=[self.hook])[self.hook][:, -config.new_tokens :]
                norms.append(h[mask[:, -config.new_tokens :].bool()].float().norm(dim=-1))
        return averages, float(torch.cat(norms).median())

    def steering(self, vectors: Tensor) -> AbstractContextManager[Any]:
        """Vectors [B, D] added where the configuration steers, one to each row of the passes within."""
        return self.steerer.vector(
            vectors, hook=self.hook, scope=self.config.scope, include_bos=self.config.include_bos
        )

    @torch.no_grad()
    def _batch(
        self, group: "PromptGroup", vectors: Tensor, scales: Tensor, rows: Tensor, drawn: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Sums [G, r, L] and counts [G, r] of the rollouts `rows` [r] of each vector, with `drawn` [G, r, T] their
        random numbers; and all texts with their mask, [G * r, S].
        """
        G, r, T = drawn.shape
        P, L, device = len(group.members), self.sae.cfg.d_sae, self.lm.device
        which = torch.searchsorted(group.members, rows % len(self.config.openings))
        delta = (scales[:, None] * vectors).to(device)
        # With scope 'generation' prompts are read unsteered, the same for all; otherwise once for each vector.
        shared = self.config.scope == "generation" or not bool(scales.any())
        Q = 1 if shared else G
        prefix = torch.arange(P).repeat(Q)
        owner = torch.zeros(G, dtype=torch.long) if shared else torch.arange(G)
        index = (owner[:, None] * P + which).flatten()
        prompt = which.repeat(G).to(device)
        table = torch.zeros(G * r, L, device=device)
        counts = torch.zeros(G * r, dtype=torch.long, device=device)

        def count(h: Tensor, going: Tensor) -> None:
            code = self.sae.encode_sparse(h)
            table.scatter_add_(1, code.indices.to(device), code.values.to(device) * going[:, None])
            counts.add_(going)

        tokens, real = group.sampler.run(
            prefix,
            index,
            drawn.flatten(0, 1),
            prefix_context=None if shared else self.steering(delta.repeat_interleave(P, 0)),
            row_context=self.steering(delta.repeat_interleave(r, 0)) if bool(scales.any()) else None,
            observe=None if self.read_again else (self.read_at, lambda _, h, going: count(h, going)),
        )
        texts = torch.cat([group.prompts.input_ids[prompt], tokens], dim=1)
        mask = torch.cat([group.prompts.attention_mask[prompt], real], dim=1)
        if self.read_again:
            h = self.lm.capture(texts, mask, hooks=[self.read_at])[self.read_at]
            on = real.bool()
            for stop in group.sampler.stop_ids:
                on = on & (tokens != stop)
            for step in range(T):
                count(h[:, -T + step], on[:, step])
        table += group.sums[prompt]
        counts += group.counts[prompt]
        return table.view(G, r, L), counts.view(G, r), (texts, mask)
