"""What a crosscoder says of its hook points, such as those of two models: which features they share and which only one
has, how well each is rebuilt, and whether a feature of one alone is really absent from the others.

A feature is at a hook point where its decoder row there is at least `present` times as long as at the hook point where
it is longest, and absent where it is at most `absent` times as long, in units of unit variance. (Of two models these
are the bounds 0.4 to 0.6 and 0.1 to 0.9 of the relative norm of Minder et al., arXiv 2504.02922, sec. 2.)

Latent scaling (the same, sec. 3) tests a feature j that is at hook point r alone. The factor beta by which its
contribution f_j d_r explains y_m at another one m is found by least squares,

    beta_m = sum_i f_ij <d_r, y_m,i> / (sum_i f_ij^2 |d_r|^2),

once with y_m what all other features leave unexplained there (`error`) and once with y_m the reconstruction there
(`rebuilt`). beta_m / beta_r near 1 says that the feature is there after all: in the error, because its decoder row was
shrunk, or in the reconstruction, because other features stand for it.

Shape letters: N tokens, L latents, D width of one hook point, K active latents a token, M hook points.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.html import card
from steersman.lm.origin import canonical_hook, same_model
from steersman.progress import progress
from steersman.sae import SAE, CrosscoderSAE, Side
from steersman.sae.architectures.crosscoder import SIDE_FVUS
from steersman.sae.config import side_letter
from steersman.sae.metrics import ReconstructionSums, defined
from steersman.train.reports.features import BATCH_ROWS
from steersman.train.store.batch import ActivationSource
from steersman.train.store.side_by_side import sides_of

SHARED, BETWEEN, DEAD = "shared", "between", "dead"
REAL_ERROR, REAL_REBUILT = 0.2, 0.5
"""Latent scaling below which a feature counts as really absent from a hook point: in the error, in what is rebuilt."""
_PRODUCTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig:
    """Where a feature counts as present, and on which rows a crosscoder is measured."""

    present: float = 0.8
    """Length of the decoder row, as a share of the feature's largest, from which it is at a hook point."""
    absent: float = 0.2
    """Length up to which it is not."""
    latent_scaling: bool = False
    """Whether to test the features of one hook point by latent scaling, which reads `tokens` rows of the source."""
    tokens: int = 200_000
    """Rows of the training split that latent scaling reads, at most."""
    split: Literal["heldout", "train", "all"] = "heldout"
    """Rows on which FVU is measured: those of the last documents, the others, or all."""
    heldout_fraction: float = 0.05
    """Fraction of the rows that is held out."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.absent < self.present <= 1:
            raise SteersmanError(
                f"absent = {self.absent} and present = {self.present} are shares of a length: 0 to 1, absent the lower"
            )
        if self.tokens < 1:
            raise SteersmanError(f"tokens = {self.tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """beta_m / beta_r of every feature, r the hook point where it is longest: 1 there, NaN for one that never fired."""

    error: Tensor
    """[L, M]: by what the other features leave unexplained."""
    rebuilt: Tensor
    """[L, M]: by the reconstruction."""
    n_tokens: int
    """Rows read."""

    def really_absent(self) -> Tensor:
        """[L, M] bool: neither in the error nor in the reconstruction of that hook point (below `REAL_ERROR` and
        `REAL_REBUILT`)."""
        return (self.error < REAL_ERROR) & (self.rebuilt < REAL_REBUILT)


@dataclass(frozen=True, kw_only=True)
class CrosscoderReport:
    """The result of `crosscoder_report`: hook points are called A, B, ... in their order."""

    sides: tuple[Side, ...]
    """The hook points."""
    kinds: tuple[str, ...]
    """Of every feature: "shared" (at all hook points), the letters of those it is at ("A", "A+C"), "between" where it
    is neither clearly present nor absent at one, "dead" where it never fired."""
    relative_norms: Tensor
    """[L, M]: length of the decoder row as a share of the feature's largest."""
    cosines: Tensor
    """[L]: the least cosine of its decoder rows at two hook points; NaN where their widths differ."""
    density: Tensor | None
    """[L]: the fraction of the tokens on which it is active; None where the crosscoder has no statistics."""
    fvu: tuple[float, ...]
    """FVU at every hook point; NaN where it is not known."""
    scaling: LatentScaling | None = None
    """Latent scaling, where it was asked for."""

    @property
    def counts(self) -> dict[str, int]:
        """How many features are of each kind: shared, of one hook point, of several, then the others."""
        found = Counter(self.kinds)
        known = [SHARED, *(side_letter(number) for number in range(len(self.sides)))]
        several = sorted(found.keys() - {*known, BETWEEN, DEAD})
        return {kind: found[kind] for kind in [*known, *several, BETWEEN, DEAD]}

    def of_kind(self, kind: str) -> list[int]:
        """The features of a kind, those that fire most often first."""
        ids = [feature for feature, one in enumerate(self.kinds) if one == kind]
        density = self.density
        return ids if density is None else sorted(ids, key=lambda feature: -float(density[feature]))

    def confirmed(self, kind: str) -> list[int]:
        """Of the features at one hook point alone ("A"), those that latent scaling finds really absent elsewhere."""
        if self.scaling is None:
            raise SteersmanError("this report has no latent scaling: make it with latent_scaling=True")
        letters = [side_letter(number) for number in range(len(self.sides))]
        if kind not in letters:
            raise SteersmanError(f"latent scaling tests the features of one hook point, {' or '.join(letters)}")
        absent = self.scaling.really_absent()
        absent[:, letters.index(kind)] = True
        return [feature for feature in self.of_kind(kind) if bool(absent[feature].all())]

    def feature(self, feature: int) -> dict[str, Any]:
        """What is known of a feature, by name; None for what is not defined."""
        record: dict[str, Any] = {
            "id": feature,
            "kind": self.kinds[feature],
            "relative_norms": self.relative_norms[feature].tolist(),
            "cosine": defined(float(self.cosines[feature])),
            "density": None if self.density is None else float(self.density[feature]),
        }
        if self.scaling is not None:
            for name in ("error", "rebuilt"):
                record[f"scaling_{name}"] = [defined(one) for one in getattr(self.scaling, name)[feature].tolist()]
        return record

    def to_json(self, top: int | None = None) -> dict[str, Any]:
        """The figures, and the `top` features of each kind (None: all)."""
        record: dict[str, Any] = {
            "sides": {
                side_letter(number): {
                    "hook_name": side.hook_name, "model_name": side.model_name, "width": side.width, "fvu": defined(fvu)
                }
                for number, (side, fvu) in enumerate(zip(self.sides, self.fvu))
            },
            "counts": self.counts,
        }  # fmt: skip
        if self.scaling is not None:
            record["scaling_tokens"] = self.scaling.n_tokens
            record["confirmed"] = {kind: len(self.confirmed(kind)) for kind in record["sides"]}
        shown = (feature for kind in self.counts for feature in self.of_kind(kind)[:top])
        return record | {"features": [self.feature(feature) for feature in shown]}

    def _tables(self, top: int) -> list[tuple[list[str], list[list[Any]]]]:
        letters = [side_letter(number) for number in range(len(self.sides))]
        named = zip(letters, self.sides, self.fvu)
        tables = [(["", "hook point", "FVU"], [[letter, str(side), _number(fvu)] for letter, side, fvu in named])]
        header, rows = ["features", "number"], [[kind, str(n)] for kind, n in self.counts.items()]
        if self.scaling is not None:
            header += ["really absent elsewhere"]
            rows = [[*row, str(len(self.confirmed(row[0]))) if row[0] in letters else ""] for row in rows]
        tables.append((header, rows))
        header = ["feature", "kind", *(f"|d_{letter}|" for letter in letters), "cosine", "density"]
        header += (
            []
            if self.scaling is None
            else [f"{name} in {letter}" for letter in letters for name in ("error", "rebuilt")]
        )
        ids = [feature for kind in (*letters, SHARED) for feature in self.of_kind(kind)[:top]]
        tables.append((header, [self._row(feature) for feature in ids]))
        return tables

    def _row(self, feature: int) -> list[str]:
        known = self.feature(feature)
        row = [str(feature), known["kind"], *map(_number, known["relative_norms"]), _number(known["cosine"])]
        row.append("" if known["density"] is None else f"{100 * known['density']:.2f} %")
        if self.scaling is not None:
            row += [_number(one) for pair in zip(known["scaling_error"], known["scaling_rebuilt"]) for one in pair]
        return row

    def to_text(self, top: int = 10) -> str:
        """The hook points with FVU, the number of features of each kind, and the `top` ones of each hook point alone
        and of all."""
        return "\n\n".join(_aligned([header, *rows]) for header, rows in self._tables(top))

    def _repr_html_(self) -> str:
        return card("CrosscoderReport", tables=self._tables(5))


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


@torch.no_grad()
def crosscoder_report(
    sae: SAE, source: ActivationSource | None = None, config: CrosscoderConfig | None = None, **overrides: Any
) -> CrosscoderReport:
    """Which features the hook points of a crosscoder share and which only some of them have.

    Args:
        sae: the crosscoder.
        source: a `SideBySide` or `HookView` of its hook points, for FVU and latent scaling. Without one FVU is that of
            the end of its training.
        config: a `CrosscoderConfig`.
        overrides: fields of `CrosscoderConfig`, over those of `config`.

    Raises:
        SteersmanError: an SAE that is no crosscoder; a source of other hook points or models; latent scaling without a
            source, or between hook points of different widths.
    """
    config = merged(CrosscoderConfig, config, overrides)
    if not isinstance(sae, CrosscoderSAE):
        raise SteersmanError(f"this is a {sae.cfg.architecture} SAE of one hook point: only a crosscoder has several")
    if source is not None:
        check_sides(sae, source)
    recorded = sae.cfg.metadata.get(SIDE_FVUS) or [None] * len(sae.cfg.sides)
    fvu = tuple(float("nan") if one is None else float(one) for one in recorded)
    scaling = None
    if config.latent_scaling:
        if source is None:
            raise SteersmanError("latent scaling reads activations: give the stores too")
        scaling = latent_scaling(sae, source, config)
    cosines, n = sae.decoder_cosines(), len(sae.cfg.sides)
    pairs = torch.stack([cosines[:, a, b] for a in range(n) for b in range(a)], dim=1)
    least = pairs.nan_to_num(nan=float("inf")).amin(dim=1).cpu()
    density = None if sae.feature_stats is None else sae.feature_stats.density
    norms = sae.relative_norms().cpu()
    return CrosscoderReport(
        sides=sae.cfg.sides,
        kinds=_kinds(norms, None if density is None else density > 0, config),
        relative_norms=norms,
        cosines=torch.where(least.isinf(), torch.full_like(least, float("nan")), least),
        density=density,
        fvu=fvu if source is None else side_fvus(sae, source, config),
        scaling=scaling,
    )


def _kinds(norms: Tensor, fired: Tensor | None, config: CrosscoderConfig) -> tuple[str, ...]:
    kinds = []
    present, absent = (norms >= config.present).tolist(), (norms <= config.absent).tolist()
    for feature, (here, not_here) in enumerate(zip(present, absent)):
        if not any(here) or (fired is not None and not bool(fired[feature])):
            kinds.append(DEAD)
        elif all(here):
            kinds.append(SHARED)
        elif all(a or b for a, b in zip(here, not_here)):
            kinds.append("+".join(side_letter(number) for number, one in enumerate(here) if one))
        else:
            kinds.append(BETWEEN)
    return tuple(kinds)


def check_sides(sae: CrosscoderSAE, source: ActivationSource) -> None:
    """Raise a SteersmanError, naming both, unless a source has a crosscoder's hook points in their order."""
    wanted, there = sae.cfg.sides, sides_of(source)
    fits = len(wanted) == len(there) and all(
        a.width == b.width
        and canonical_hook(a.hook_name) == canonical_hook(b.hook_name)
        and same_model(a.model_name, b.model_name)
        for a, b in zip(wanted, there)
    )
    if not fits:
        both = [", ".join(f"{side} [{side.width}]" for side in sides) for sides in (wanted, there)]
        raise SteersmanError(f"the crosscoder reads {both[0]}, in this order; given are {both[1]}")


def side_fvus(sae: CrosscoderSAE, source: ActivationSource, config: CrosscoderConfig) -> tuple[float, ...]:
    """FVU at every hook point over a split of `source`."""
    split: Any = {"split": config.split, "heldout_fraction": config.heldout_fraction, "drop_last": False}
    sums = ReconstructionSums(sae.cfg.d_in, sae.cfg.d_sae, sae.device, by_column=True)
    batches = source.batches(BATCH_ROWS, shuffle=False, **split)
    for batch in progress(batches, desc="reconstruction", total=source.n_batches(BATCH_ROWS, **split), unit="batch"):
        x = batch.x.to(sae.device)
        sums.add(x, *sae.reconstruct(x))
    return tuple(sums.fvu_of(start, stop) for start, stop in pairwise(sae.cuts))


def latent_scaling(sae: CrosscoderSAE, source: ActivationSource, config: CrosscoderConfig) -> LatentScaling:
    """beta_m / beta_r of all features, from one pass over rows of the training split."""
    if len({side.width for side in sae.cfg.sides}) > 1:
        raise SteersmanError("latent scaling compares one direction at all hook points: they need one width")
    blocks = torch.stack([part.float() * s for part, s in zip(sae.split(sae.W_dec), sae.side_scale)])  # [M, L, D]
    M, L, D = blocks.shape
    longest = sae.decoder_norms().argmax(dim=1)
    own = blocks[longest, torch.arange(L, device=sae.device)]
    error, rebuilt = (torch.zeros(M, L, dtype=torch.float64, device=sae.device) for _ in range(2))
    squares = torch.zeros(L, dtype=torch.float64, device=sae.device)
    n_tokens, size = 0, min(BATCH_ROWS, config.tokens)
    batches = source.batches(size, split="train", heldout_fraction=config.heldout_fraction, drop_last=False)
    n_batches = -(-config.tokens // size)
    for batch in progress(islice(batches, n_batches), desc="latent scaling", total=n_batches, unit="batch"):
        x = batch.x.to(sae.device).float()
        x_hat, code = sae.reconstruct(x)
        for part in range(0, len(x), max(1, _PRODUCTS // (D * code.values.shape[1]))):
            rows = slice(part, part + max(1, _PRODUCTS // (D * code.values.shape[1])))
            values, ids = code.values[rows], code.indices[rows]
            squares.index_add_(0, ids.flatten(), values.double().square().flatten())
            directions = own[ids]  # [n, K, D]
            pairs = zip(sae.split(x[rows] - x_hat[rows]), sae.split(x_hat[rows] - sae.b_dec), sae.side_scale)
            for m, (left, there, scale) in enumerate(pairs):
                for total, y in ((error, left), (rebuilt, there)):
                    along = torch.einsum("nkd,nd->nk", directions, y * scale)
                    total[m].index_add_(0, ids.flatten(), (values * along).double().flatten())
        n_tokens += len(x)
    error += (own * blocks).sum(dim=2).double() * squares  # what the feature itself gives there is not the others'
    of_own = [total.gather(0, longest[None])[0] for total in (error, rebuilt)]
    ratios = [(total / one).T.float().cpu() for total, one in zip((error, rebuilt), of_own)]
    return LatentScaling(error=ratios[0], rebuilt=ratios[1], n_tokens=n_tokens)
