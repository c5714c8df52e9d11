"""Measured effects, in memory or as a folder.

The folder holds

- `manifest.json`: what was measured and how, written once at the start; nothing in it changes afterwards;
- `baseline.safetensors`: `mean`, `standard_error` [L] of the unsteered rollouts, `median_norm`, `typical_scale`;
- `00000.safetensors`, ...: for the vectors of a shard `vectors` [n, D], `scale`, `achieved` [n], `reached` [n],
  `effect`, `standard_error` [n, L], `positions` [n].

A file exists only when it is whole, so the folder itself says what is done. Each carries the manifest's fingerprint,
and nothing in any of them depends on when, in how many attempts or by how many processes they were written.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import write_whole
from steersman.sae import SAE
from steersman.steer.effects.map import EffectMap
from steersman.steer.effects.measured import (
    FORMAT,
    Baseline,
    EffectShard,
    EffectsManifest,
    sae_identity,
    tensor_hash,
)

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

    @classmethod
    def open(cls, folder: str | Path) -> "Effects":
        """Effects that `collect_effects(out=...)` wrote. Raises SteersmanError when some are not there yet."""
        folder = Path(folder)
        manifest = EffectsManifest.load(folder)
        missing = [i for i in range(len(manifest.shards)) if not shard_path(folder, i).is_file()]
        if missing or not (folder / BASELINE).is_file():
            raise SteersmanError(
                f"{folder}: {len(missing)} of {len(manifest.shards)} shards are not measured yet; run the same command "
                "again to resume"
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
        """The shards, in order."""
        if self.folder is None:
            yield from self._shards
            return
        for i in range(len(self.manifest.shards)):
            yield read_shard(self.folder, i, self.manifest)

    def column(self, name: str) -> Tensor:
        """One of the small fields over all vectors, such as `scale`, `reached` or `positions`: [n]."""
        if self.folder is None:
            return torch.cat([getattr(shard, name) for shard in self._shards])
        paths = [shard_path(self.folder, i) for i in range(len(self.manifest.shards))]
        return torch.cat([_read(path, self.manifest, [name])[name] for path in paths])

    def fit(self, **options: Any) -> EffectMap:
        """The effect map of these effects: see `EffectMap.fit`."""
        return EffectMap.fit(self, **options)

    def to_text(self) -> str:
        """What was measured, in a few lines."""
        m, scale, reached = self.manifest, self.column("scale"), self.column("reached")
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


def write_tensors(path: Path, tensors: dict[str, Tensor], manifest: EffectsManifest) -> None:
    """Write one file of the folder, atomically."""
    header = {FORMAT: manifest.fingerprint}  # a single entry: safetensors writes several in no fixed order
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def _read(path: Path, manifest: EffectsManifest, names: list[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(FORMAT) != manifest.fingerprint:
                raise SteersmanError(f"{path} was measured with other settings than its manifest names; delete it")
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise SteersmanError(f"{path} is missing or damaged ({error}); delete it and measure again") from error


def read_baseline(folder: Path, manifest: EffectsManifest) -> Baseline:
    """The folder's `baseline.safetensors`."""
    tensors = _read(folder / BASELINE, manifest, list(Baseline._fields))
    numbers = {name: float(tensors[name]) for name in ("median_norm", "typical_scale")}
    return Baseline(tensors["mean"], tensors["standard_error"], **numbers)


def write_baseline(folder: Path, baseline: Baseline, manifest: EffectsManifest) -> None:
    """Write the folder's `baseline.safetensors`."""
    tensors = {"mean": baseline.mean, "standard_error": baseline.standard_error}
    tensors |= {n: torch.tensor(getattr(baseline, n), dtype=torch.float64) for n in ("median_norm", "typical_scale")}
    write_tensors(folder / BASELINE, tensors, manifest)


def read_shard(folder: Path, number: int, manifest: EffectsManifest) -> EffectShard:
    """A finished shard."""
    return EffectShard(**_read(shard_path(folder, number), manifest, list(EffectShard._fields)))
