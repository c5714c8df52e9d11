"""Activations of every feature that are kept to be looked at: the largest, and a sample of all levels.

Shape letters: N tokens of a batch, L latents, K active latents a token, M kept a latent, W rows of a window, n entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from steersman.sae.base import SparseCode

LEVELS_PER_OCTAVE, LEVELS = 3, 15
"""Levels of the samples: a third of an octave each, the uppermost fifteen that a feature reaches, so down to 1/32 of
its largest activation."""


class Entries(NamedTuple):
    """Active entries of some tokens' code."""

    values: Tensor
    """[n] fp32 activations."""
    latents: Tensor
    """[n] int64 feature ids."""
    places: Tensor
    """[n] int64: places of their tokens among the rows of a `Stretch`."""


class Stretch:
    """Consecutive rows of a pass and their code, from which the activations around a token are read.

    Rows are given in batches, and every row is handed out once, when the `reach` rows after it are known.
    """

    def __init__(self, reach: int, n_latents: int) -> None:
        self.reach, self.n_latents = reach, n_latents
        self.code: SparseCode | None = None
        self.rows = torch.empty(0, dtype=torch.int64)
        self.large = torch.empty(0, dtype=torch.bool)
        self._first, self._stop = 0, 0
        self._keys: Tensor | None = None
        self._values = torch.empty(0)

    def add(self, code: SparseCode, rows: Tensor, large: Tensor) -> None:
        """Go on by the code [N, K] of the tokens at `rows` [N], of which some are `large`."""
        dropped = 0
        if self.code is not None:
            dropped = max(0, self._stop - self.reach)
            code = SparseCode(*(_joined(old[dropped:], new) for old, new in zip(self.code, code)))
            rows = torch.cat([self.rows[dropped:], rows])
            large = torch.cat([self.large[dropped:], large])
        self.code, self.rows, self.large = code, rows, large
        self._first = self._stop - dropped
        self._stop = max(self._first, len(rows) - self.reach)
        self._keys = None

    def end(self) -> None:
        """No rows follow: hand out the last ones."""
        self._first, self._stop = self._stop, len(self.rows)

    def entries(self, *, large: bool) -> Entries:
        """The active entries of the rows now handed out: of the ordinary or of the large ones."""
        assert self.code is not None
        part = slice(self._first, self._stop)
        code = SparseCode(self.code.values[part], self.code.indices[part])
        active = code.active & (self.large[part] == large)[:, None]
        places = torch.arange(self._first, self._stop, device=active.device)[:, None].expand_as(active)
        return Entries(code.values[active], code.indices[active], places[active])

    def windows(self, entries: Entries) -> Tensor:
        """The activations [n, 2 * reach + 1] fp16 of the entries' features on the rows around theirs: 0 where one is
        not active, and beyond the first and last of consecutive rows."""
        assert self.code is not None
        if self._keys is None:
            active = self.code.active
            places = torch.arange(len(self.rows), device=active.device)[:, None].expand_as(active)
            keys = places[active] * self.n_latents + self.code.indices[active]
            self._keys, order = keys.sort()
            self._values = self.code.values[active][order]
        offsets = torch.arange(-self.reach, self.reach + 1, device=self.rows.device)
        around = entries.places[:, None] + offsets
        inside = around.clamp(0, len(self.rows) - 1)
        consecutive = self.rows[inside] == self.rows[entries.places][:, None] + offsets
        wanted = inside * self.n_latents + entries.latents[:, None]
        found = torch.searchsorted(self._keys, wanted).clamp_(max=len(self._keys) - 1)
        hit = (self._keys[found] == wanted) & (inside == around) & consecutive
        limit = torch.finfo(torch.float16).max
        return torch.where(hit, self._values[found], 0.0).clamp_(-limit, limit).half()


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Two parts of a code [N, K] below each other, where batches differ in K."""
    wide = max(old.shape[1], new.shape[1])
    return torch.cat([torch.nn.functional.pad(part, (0, wide - part.shape[1])) for part in (old, new)])


class Kept:
    """Of each of L lists the M entries of the largest key: their activations, rows and, if asked for, windows."""

    def __init__(self, n_lists: int, n_kept: int, width: int, device: torch.device):
        self.keys = torch.full((n_lists, n_kept), -torch.inf, device=device)
        self.values = torch.zeros(n_lists, n_kept, device=device)
        self.rows = torch.full((n_lists, n_kept), -1, dtype=torch.int64, device=device)
        self.windows = torch.zeros(n_lists, n_kept, width, dtype=torch.float16, device=device)

    def add(self, entries: Entries, lists: Tensor, keys: Tensor, stretch: Stretch) -> None:
        """Merge in entries, each with the list [n] it is for and its key [n], finite."""
        M = self.keys.shape[1]
        # Only what beats a list's smallest kept key can matter: after the first batches, almost nothing.
        better = keys > self.keys[lists, -1]
        entries, lists, keys = Entries(*(part[better] for part in entries)), lists[better], keys[better]
        order = torch.argsort(keys, descending=True, stable=True)
        order = order[torch.argsort(lists[order], stable=True)]
        touched, counts = torch.unique_consecutive(lists[order], return_counts=True)
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        order, rank = order[rank < M], rank[rank < M]
        entries, lists, keys = Entries(*(part[order] for part in entries)), lists[order], keys[order]
        place = torch.searchsorted(touched, lists)
        new = {"keys": keys, "values": entries.values, "rows": stretch.rows[entries.places]}
        if self.windows.shape[2]:
            new["windows"] = stretch.windows(entries)
        best: Tensor | None = None
        for name, given in new.items():
            kept = getattr(self, name)
            fresh = torch.zeros(len(touched), *kept.shape[1:], dtype=kept.dtype, device=kept.device)
            if name == "keys":
                fresh.fill_(-torch.inf)
            fresh[place, rank] = given
            both = torch.cat([kept[touched], fresh], dim=1)
            if best is None:  # the keys come first
                best = torch.sort(both, dim=1, descending=True, stable=True).indices[:, :M]
            at = best if both.dim() == 2 else best[..., None].expand(-1, -1, both.shape[2])
            kept[touched] = both.gather(1, at)
        self.rows[self.keys == -torch.inf] = -1


class TopExamples(Kept):
    """The M activations of largest magnitude of every feature."""

    def merge(self, entries: Entries, stretch: Stretch) -> None:
        """Merge in entries of the stretch."""
        self.add(entries, entries.latents, entries.values.abs(), stretch)


class LevelSamples(Kept):
    """Activations drawn at random of each level of every feature, so that those below the largest can be seen too.

    A level is a third of an octave of magnitude. Which levels a feature reaches is known only at the end, so the lists
    are a ring: level l is kept in list l modulo `LEVELS`, and an activation of a higher level replaces those of a lower
    one there. Within a level the entries with the largest random keys are kept: a uniform sample without replacement.
    """

    def __init__(self, n_latents: int, per_level: int, unit: float, width: int, device: torch.device):
        super().__init__(n_latents * LEVELS, per_level, width, device)
        self.unit = unit
        self._generator = torch.Generator(device).manual_seed(0)

    def merge(self, entries: Entries, stretch: Stretch) -> None:
        """Merge in entries of the stretch."""
        level = ((entries.values.abs() / self.unit).log2() * LEVELS_PER_OCTAVE).floor().clamp(-1000, 1000)
        draw = torch.rand(len(level), generator=self._generator, device=level.device)
        lists = entries.latents * LEVELS + level.long() % LEVELS
        self.add(entries, lists, level + draw * (1 - 2**-10), stretch)

    def of_features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values [L, S], rows [L, S] and windows [L, S, W] of what was drawn, S = `LEVELS` * per_level."""
        shape = (-1, LEVELS * self.keys.shape[1])
        return self.values.view(shape), self.rows.view(shape), self.windows.view(*shape, self.windows.shape[2])
