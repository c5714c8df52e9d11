"""What the probes are fitted on: states, codes and labels of samples, which are texts or tokens.

Shape letters: N samples, D width, L features, C labels, K active features a token, M chosen features, S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.progress import progress
from steersman.sae import SAE, SAEConfig
from steersman.steer.probing.config import Pooling
from steersman.steer.probing.labels import LabelledTexts
from steersman.steer.scores.reading import states_of

_BLOCK = 1 << 22  # products in memory at once
_TOKENS = 4096  # encoded at once


class Codes:
    """The codes of N samples, kept sparse: the entries that are not 0, by feature."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor, Tensor]], n_samples: int, n_features: int) -> None:
        """From parts (sample, feature, value), each [entries]."""
        sample, feature, value = (torch.cat([part[i] for part in parts]) for i in range(3))
        order = feature.argsort(stable=True)
        self.sample, self.feature, self.value = sample[order], feature[order], value[order]
        self.n_samples, self.n_features = n_samples, n_features
        self._starts = torch.searchsorted(self.feature, torch.arange(n_features + 1))

    @classmethod
    def of(cls, dense: Tensor) -> "Codes":
        """From dense codes [N, L]."""
        sample, feature = dense.nonzero(as_tuple=True)
        return cls([(sample, feature, dense[sample, feature])], *dense.shape)

    def columns(self, features: Sequence[int]) -> Tensor:
        """[N, M] fp32: the activations of some features."""
        found = torch.zeros(self.n_samples, len(features))
        for column, feature in enumerate(features):
            entries = slice(int(self._starts[feature]), int(self._starts[feature + 1]))
            found[self.sample[entries], column] = self.value[entries]
        return found

    def sums(self, weights: Tensor) -> Tensor:
        """The sum over samples of activation times weight: weights [N, C] -> [C, L] float64."""
        found = torch.zeros(self.n_features, weights.shape[1], dtype=torch.float64)
        for entries in torch.arange(len(self.value)).split(max(1, _BLOCK // max(weights.shape[1], 1))):
            products = self.value[entries, None].double() * weights[self.sample[entries]].double()
            found.index_add_(0, self.feature[entries], products)
        return found.T

    def mean_active(self, of: Tensor) -> Tensor:
        """[L] float64: the mean size of each feature over the samples in `of` [N] bool that it is active on; 0 where
        it is on none."""
        chosen = of[self.sample]
        feature = self.feature[chosen]
        total = torch.bincount(feature, self.value[chosen].abs().double(), self.n_features)
        return total / torch.bincount(feature, minlength=self.n_features).clamp_min(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeRows:
    """Samples with their labels, states and codes."""

    states: dict[str, Tensor]
    """Name of a way of pooling -> [N, D] fp32. Several are candidates for the probe on raw activations."""
    codes: dict[str, Codes]
    """Name of an SAE -> codes; that which is probed is "sae"."""
    has: Tensor
    """[N, C] bool."""
    unit: Tensor
    """[N] int64: the text that a sample is of."""
    classes: list[str]
    """The labels."""

    def __post_init__(self) -> None:
        n = {len(x) for x in (*self.states.values(), self.has, self.unit)} | {c.n_samples for c in self.codes.values()}
        if len(n) != 1 or self.has.shape[1] != len(self.classes):
            raise SteersmanError(f"labels {tuple(self.has.shape)} do not fit samples ({sorted(n)}) and labels' names")


@torch.no_grad()
def read_rows(
    lm: LanguageModel,
    hook: str,
    given: LabelledTexts,
    saes: dict[str, SAE],
    *,
    pool: Pooling,
    random_sae: bool,
    batch_size: int,
    max_length: int | None,
    seed: int,
) -> ProbeRows:
    """Read the texts once and encode them with each SAE; with `random_sae` also with one that learned nothing, which
    has as many active features a token as "sae" has on the first text."""
    saes = dict(saes)
    pool = "last" if given.level == "token" else pool  # a token is a sample as it is
    kinds = ("mean", "max") if pool == "max" else (pool,)
    states: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    n = 0
    has, unit = [], []
    reading = states_of(lm, [hook], [one.text for one in given.texts], batch_size=batch_size, max_length=max_length)
    for i, (x,) in progress(reading, desc="reading texts", total=len(given.texts), unit="text"):
        if random_sae and "random_sae" not in saes:
            saes["random_sae"] = random_like(saes["sae"], x, seed)
        if given.level == "token":
            keep = given.texts[i].known[: len(x)]
            x, labels = x[keep.to(x.device)], given.texts[i].has[: len(keep)][keep]
        else:
            x, labels = (x[-1:] if pool == "last" else x), given.texts[i].has
        pooled = given.level == "text" and pool != "last"
        for kind in states:
            part = x if not pooled else x.mean(0, keepdim=True) if kind == "mean" else x.amax(0, keepdim=True)
            states[kind].append(part.cpu())
        for name, sae in saes.items():
            parts.setdefault(name, []).append(_entries(sae, x, n, pool if pooled else None))
        has.append(labels)
        unit.append(torch.full((len(labels),), i))
        n += len(labels)
    return ProbeRows(
        states={kind: torch.cat(found) for kind, found in states.items()},
        codes={name: Codes(found, n, saes[name].cfg.d_sae) for name, found in parts.items()},
        has=torch.cat(has), unit=torch.cat(unit), classes=given.classes,
    )  # fmt: skip


def _entries(sae: SAE, x: Tensor, first: int, pool: Pooling | None) -> tuple[Tensor, Tensor, Tensor]:
    """The entries (sample, feature, value) of the tokens x [S, D], which are samples from number `first` on or, with a
    `pool`, one sample."""
    found = []
    for start, chunk in zip(range(0, len(x), _TOKENS), x.split(_TOKENS)):
        code = sae.encode_sparse(chunk.to(sae.device))
        row, column = code.active.nonzero(as_tuple=True)
        found.append((row + start, code.indices[row, column], code.values[row, column]))
    sample, feature, value = (torch.cat([part[i] for part in found]).cpu() for i in range(3))
    if pool is None:
        return sample + first, feature, value
    whole = torch.zeros(sae.cfg.d_sae)
    if pool == "max":
        whole.scatter_reduce_(0, feature, value, "amax")
    else:
        whole.index_add_(0, feature, value).div_(max(len(x), 1))
    feature = whole.nonzero()[:, 0]
    return torch.full_like(feature, first), feature, whole[feature]


def random_like(sae: SAE, x: Tensor, seed: int) -> SAE:
    """An SAE that learned nothing but the mean of the states: random directions, of which the K largest are active, K
    being what `sae` has active on tokens x [S, D] on average."""
    k = round(float(sae.encode_sparse(x.to(sae.device)).active.sum(1).double().mean()))
    cfg = SAEConfig(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, k=max(1, k), hook_name=sae.cfg.hook_name)
    made = SAE(cfg, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.b_dec.copy_(x.mean(0))
    return made.to(sae.device)
