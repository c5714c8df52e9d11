"""Measured effects, in memory or as a folder.

The folder holds

- `manifest.json`: what was measured and how, written once at the start; nothing in it changes afterwards;
- `baseline.safetensors`: `mean`, `standard_error` [L] of the unsteered rollouts, `median_norm`, `typical_scale`;
- `00000.safetensors`, ...: for the vectors (or texts) of a shard `vectors` [n, D], `scale`, `achieved` [n], `reached`
  [n], `effect`, `standard_error` [n, L], `positions` [n].

A file exists only when it is whole, so the folder itself says what is done. Each carries the manifest's fingerprint and
a checksum of itself, compared when it is read, and nothing in any of them depends on when, in how many attempts or by
how many processes they were written. Files of other names are never looked at.
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import temporary_path
from steersman.lm.digest import tensor_hash
from steersman.sae import SAE
from steersman.steer.effects.map import EffectMap
from steersman.steer.effects.measured import (
    FORMAT,
    MANIFEST,
    Baseline,
    EffectShard,
    EffectsManifest,
    sae_identity,
)
from steersman.tensor_files import load_tensors, save_tensors

BASELINE = "baseline.safetensors"


class Effects:
    """The measured effects of steering vectors: what `collect_effects` returns.

    `manifest` says what was measured; `baseline` holds the unsteered rollouts; `iterate()` gives the shards one after
    the other, read from disk where they are on disk, so that memory does not grow with the number of vectors.
    """

    def __init__(
        self,
        manifest: EffectsManifest,
        baseline: Baseline,
        *,
        folder: Path | None = None,
        shards: Iterable[EffectShard] = (),
    ) -> None:
        self.manifest, self.baseline, self.folder = manifest, baseline, folder
        self._shards: list[EffectShard] = list(shards)
        self._checked: set[int] = set()

    @classmethod
    def open(cls, folder: str | Path) -> "Effects":
        """Effects that `collect_effects(out=...)` wrote. Raises SteersmanError when some are not there yet."""
        folder = Path(folder)
        manifest = EffectsManifest.load(folder)
        missing = manifest.n_shards - len(finished_shards(folder, manifest))
        if missing or not os.path.lexists(folder / BASELINE):
            raise SteersmanError(
                f"{folder}: {missing} of {manifest.n_shards} shards are not measured yet; run the same command again "
                "to resume"
            )
        return cls(manifest, read_baseline(folder, manifest), folder=folder)

    @classmethod
    def from_tensors(
        cls, vectors: Tensor, effect: Tensor, standard_error: Tensor | None = None, *, sae: SAE, **known: Any
    ) -> "Effects":
        """Effects measured elsewhere: unit vectors [n, D] and effects [n, L]; `known` may give `model_name`,
        `hook_name`, `scale` [n] and `baseline`."""
        n, L = effect.shape
        if vectors.ndim != 2 or len(vectors) != n or sae.cfg.d_sae != L:
            raise SteersmanError(
                f"vectors {tuple(vectors.shape)} and effects {tuple(effect.shape)} do not fit: [n, D] and "
                f"[n, {sae.cfg.d_sae}] for this SAE"
            )
        manifest = EffectsManifest(
            model_name=known.get("model_name", sae.cfg.model_name),
            hook_name=known.get("hook_name", sae.cfg.hook_name),
            sae=sae_identity(sae),
            n_vectors=n,
            vectors_hash=tensor_hash(vectors),
            texts_hash="",
            settings={"shard_vectors": max(1, n), "seed": 0},
        )
        shard = EffectShard(
            vectors,
            torch.as_tensor(known.get("scale", torch.ones(n))),
            torch.full((n,), float("nan")),
            torch.ones(n, dtype=torch.bool),
            effect,
            torch.zeros_like(effect) if standard_error is None else standard_error,
            torch.ones(n, dtype=torch.long),
        )
        return cls(manifest, known.get("baseline", Baseline(torch.zeros(L), torch.zeros(L), 1.0)), shards=[shard])

    def __len__(self) -> int:
        return self.manifest.n_vectors

    def __repr__(self) -> str:
        m = self.manifest
        return f"Effects({m.n_vectors} vectors at {m.hook_name} of {m.model_name} on {m.sae['d_sae']} features)"

    def iterate(self) -> Iterator[EffectShard]:
        """The shards, in order. Raises SteersmanError for one that is missing, damaged or of other settings."""
        if self.folder is None:
            yield from self._shards
            return
        width = None
        for number in range(self.manifest.n_shards):
            shard = read_shard(self.folder, number, self.manifest, width, checked=number in self._checked)
            self._checked.add(number)
            width = shard.vectors.shape[1]
            yield shard

    def column(self, name: str) -> Tensor:
        """One of the small fields over all vectors, such as `scale`, `reached` or `positions`: [n]."""
        if self.folder is None:
            return torch.cat([getattr(shard, name) for shard in self._shards])
        parts = []
        for number in range(self.manifest.n_shards):
            checked = number in self._checked
            parts.append(_read_fields(self.folder, number, self.manifest, [name], None, checked=checked)[name])
            self._checked.add(number)
        return torch.cat(parts)

    def fit(self, **options: Any) -> EffectMap:
        """The effect map of these effects: see `EffectMap.fit`."""
        return EffectMap.fit(self, **options)

    def to_text(self) -> str:
        """What was measured, in a few lines."""
        m, scale, reached = self.manifest, self.column("scale"), self.column("reached")
        if m.by_gradients:
            return (
                f"{m.n_vectors} unsteered texts and their gradients at {m.hook_name} of {m.model_name}, "
                f"{m.sae['d_sae']} features; {int(self.column('positions').sum()):,} positions"
            )
        lines = [
            f"{m.n_vectors} vectors at {m.hook_name} of {m.model_name}, {m.sae['d_sae']} features; "
            f"{int(self.column('positions').sum()):,} positions",
            f"scale: median {float(scale.median()):.4g} ({float(scale.median()) / self.baseline.median_norm:.2f} of "
            f"the median norm), from {float(scale.min()):.4g} to {float(scale.max()):.4g}",
        ]
        if not bool(reached.all()):
            lines.append(f"{int((~reached).sum())} of {m.n_vectors} vectors did not reach the target: left out of maps")
        return "\n".join(lines)


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"{number:05d}.safetensors"


def finished_shards(folder: Path, manifest: EffectsManifest) -> list[int]:
    """The shards that are there, rising."""
    there = set(os.listdir(folder))
    stems = (name.partition(".")[0] for name in there)
    numbers = {int(stem) for stem in stems if stem.isdecimal()}
    return sorted(n for n in numbers if n < manifest.n_shards and shard_path(folder, n).name in there)


def check_folder(folder: Path) -> None:
    """Raise SteersmanError unless effects can be written to `folder`: it holds some, holds nothing, or is not there."""
    try:
        if not os.path.lexists(folder):
            return
        names = set(os.listdir(folder))
    except OSError as error:
        raise SteersmanError(f"{folder} cannot be used for effects: {error.strerror}") from error
    begun = {temporary_path(Path(MANIFEST)).name, f"{MANIFEST}.tmp"}  # a process was killed while it began
    if MANIFEST not in names and names - begun:
        raise SteersmanError(f"{folder}: exists and holds no effects; choose an empty or new folder")


def write_tensors(path: Path, tensors: dict[str, Tensor], manifest: EffectsManifest) -> None:
    """Write one file of the folder, whole or not at all."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_tensors(path, tensors, {FORMAT: manifest.fingerprint})
    except SteersmanError as error:
        done = len(finished_shards(path.parent, manifest))
        raise SteersmanError(
            f"{error}; {done} of {manifest.n_shards} shards are finished and kept: make room and run the same command "
            "again to resume"
        ) from error


def _read(
    path: Path,
    manifest: EffectsManifest,
    shapes: dict[str, tuple[int | None, ...]],
    kinds: dict[str, torch.dtype],
    *,
    checked: bool = False,
) -> dict[str, Tensor]:
    """The tensors of `shapes`, in which None is any size; those that `kinds` does not name are fp32."""
    try:
        tensors, header = load_tensors(path, shapes, checked=checked)
    except SteersmanError as error:
        raise SteersmanError(f"{error}; delete this file and run the same command to measure it again") from error
    if header.get(FORMAT) != manifest.fingerprint:
        raise SteersmanError(f"{path} was measured with other settings than its manifest names; delete it")
    for name, shape in shapes.items():
        found = tensors[name]
        fits = found.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape))
        if not fits or found.dtype != kinds.get(name, torch.float32):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise SteersmanError(
                f"{path}: {name} is {found.dtype} {list(found.shape)}, the manifest asks for [{wanted}]; delete this "
                "file and run the same command to measure it again"
            )
    return tensors


def read_baseline(folder: Path, manifest: EffectsManifest) -> Baseline:
    """The folder's `baseline.safetensors`. Raises SteersmanError when it is missing, damaged or of other settings."""
    L = manifest.sae["d_sae"]
    shapes: dict[str, tuple[int | None, ...]] = {"mean": (L,), "standard_error": (L,)}
    shapes |= {"median_norm": (), "typical_scale": ()}
    tensors = _read(folder / BASELINE, manifest, shapes, dict.fromkeys(("median_norm", "typical_scale"), torch.float64))
    numbers = {name: float(tensors[name]) for name in ("median_norm", "typical_scale")}
    if not bool(tensors["mean"].isfinite().all()) or not math.isfinite(numbers["median_norm"]):
        raise SteersmanError(f"{folder / BASELINE} holds values that are not finite; delete it and measure again")
    return Baseline(tensors["mean"], tensors["standard_error"], **numbers)


def write_baseline(folder: Path, baseline: Baseline, manifest: EffectsManifest) -> None:
    """Write the folder's `baseline.safetensors`."""
    tensors = {"mean": baseline.mean, "standard_error": baseline.standard_error}
    tensors |= {n: torch.tensor(getattr(baseline, n), dtype=torch.float64) for n in ("median_norm", "typical_scale")}
    write_tensors(folder / BASELINE, tensors, manifest)


def read_shard(
    folder: Path, number: int, manifest: EffectsManifest, width: int | None = None, *, checked: bool = False
) -> EffectShard:
    """A finished shard, of vectors of `width` where that is known; `checked`: its checksum was compared before.

    Raises SteersmanError when it is missing, damaged or of other settings.
    """
    fields = _read_fields(folder, number, manifest, list(EffectShard._fields), width, checked=checked)
    shard = EffectShard(**fields)
    if not bool(shard.vectors.isfinite().all()) or not bool(shard.effect.isfinite().all()):
        raise SteersmanError(
            f"{shard_path(folder, number)} holds values that are not finite; delete it and run the same command to "
            "measure it again"
        )
    return shard


def _read_fields(
    folder: Path, number: int, manifest: EffectsManifest, names: list[str], width: int | None, *, checked: bool
) -> dict[str, Tensor]:
    first, end = manifest.shard(number)
    n, L = end - first, manifest.sae["d_sae"]
    wide: dict[str, tuple[int | None, ...]] = {"vectors": (n, width), "effect": (n, L), "standard_error": (n, L)}
    shapes = {name: wide.get(name, (n,)) for name in names}
    kinds = {"reached": torch.bool, "positions": torch.int64}
    return _read(shard_path(folder, number), manifest, shapes, kinds, checked=checked)
