"""Measured effects, in memory or as a folder.

The folder holds

- `manifest.json`: what was measured and how, written once at the start; nothing in it changes afterwards;
- `baseline.safetensors`: `mean`, `standard_error` [L] of the unsteered rollouts, `median_norm`, `typical_scale`;
- `00000.safetensors`, ...: for the vectors of a shard `vectors` [n, D], `scale`, `achieved` [n], `reached` [n],
  `effect`, `standard_error` [n, L], `positions` [n].

A file exists only when it is whole, so the folder itself says what is done. Each carries the manifest's fingerprint,
and nothing in any of them depends on when, in how many attempts or by how many processes they were written.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import write_json, write_whole
from steersman.sae import SAE

if TYPE_CHECKING:
    from steersman.steer.effects.map import EffectMap

FORMAT, VERSION = "steersman.effects", 1
MANIFEST, BASELINE = "manifest.json", "baseline.safetensors"


def tensor_hash(*tensors: Tensor) -> str:
    """Sixteen hexadecimal digits that change when any number of the tensors changes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        x = tensor.detach().cpu().contiguous()
        digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.view(torch.uint8).numpy().data if x.numel() else b"")
    return digest.hexdigest()[:16]


def sae_identity(sae: SAE) -> dict[str, Any]:
    """What tells an SAE from others: its shape, where it reads, and a hash of its weights."""
    cfg = sae.cfg
    weights = [value for _, value in sorted(sae.state_dict().items())]
    return {
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "k": cfg.k,
        "activation": cfg.architecture,
        "hook_name": cfg.hook_name,
        "hash": tensor_hash(*weights),
    }


@dataclass(frozen=True, kw_only=True)
class EffectsManifest:
    """What was measured, on what, and how."""

    model_name: str
    """The model."""
    hook_name: str
    """Hook point the vectors are added at."""
    sae: dict[str, Any]
    """The SAE whose features are measured: see `sae_identity`."""
    n_vectors: int
    """Number of vectors."""
    vectors_hash: str
    """Hash of the unit vectors."""
    texts_hash: str
    """Hash of the held-out texts that the scale rule measures on; empty when it needs none."""
    settings: dict[str, Any]
    """`EffectsConfig.identity()`."""

    @property
    def shards(self) -> list[tuple[int, int]]:
        """First and last + 1 vector of each shard."""
        size = self.settings["shard_vectors"]
        return [(start, min(start + size, self.n_vectors)) for start in range(0, self.n_vectors, size)]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when anything in it changes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> "EffectsManifest":
        """Read `folder`'s manifest. Raises SteersmanError when there is none or it is not one of ours."""
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text())
            if data.pop("format") != FORMAT:
                raise KeyError("format")
            version = data.pop("version")
            if version != VERSION:
                raise SteersmanError(
                    f"{path}: written in version {version} of the format, this program reads {VERSION}"
                )
            if {field.name for field in fields(cls)} != set(data):
                raise KeyError("its fields")
            return cls(**data)
        except (FileNotFoundError, NotADirectoryError):
            raise SteersmanError(
                f"{folder}: no effects here (there is no {MANIFEST}); measure them with collect_effects or "
                "`steersman effects`"
            ) from None
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise SteersmanError(f"{path}: not a readable manifest of effects ({error})") from error

    def differences(self, other: "EffectsManifest") -> str:
        """In what `other` differs, as text; empty if in nothing."""
        a, b = _flat(asdict(self)), _flat(asdict(other))
        names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
        return ", ".join(f"{name} ({a.get(name)!r} there, {b.get(name)!r} now)" for name in names)


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in data.items():
        flat |= value if name == "settings" else {f"{name}.{k}": v for k, v in value.items()} if name == "sae" else {}
        flat |= {} if isinstance(value, dict) else {name: value}
    return flat


class Baseline(NamedTuple):
    """The unsteered rollouts."""

    mean: Tensor
    """[L] fp32: average activation of each feature."""
    standard_error: Tensor
    """[L] fp32."""
    median_norm: float
    """Median norm of the states where vectors are added."""
    typical_scale: float = math.nan
    """Median scale of the first few vectors, where the search for each scale starts; NaN where none is searched for."""


class EffectShard(NamedTuple):
    """The effects of n vectors."""

    vectors: Tensor
    """[n, D] fp32, unit norm."""
    scale: Tensor
    """[n] fp32: the norm of what was added."""
    achieved: Tensor
    """[n] fp32: what the scale rule measured there; NaN for rules that measure nothing."""
    reached: Tensor
    """[n] bool: whether the rule's target was reached."""
    effect: Tensor
    """[n, L] fp32: average activation of each feature minus that of the unsteered rollouts."""
    standard_error: Tensor
    """[n, L] fp32: of the steered average; the unsteered one's is in the baseline, the same for all."""
    positions: Tensor
    """[n] int64: positions averaged over."""


class Effects:
    """The measured effects of steering vectors: what `collect_effects` returns.

    `manifest` says what was measured; `baseline` holds the unsteered rollouts; `iterate()` gives the shards one after
    the other, read from disk where they are on disk, so that memory does not grow with the number of vectors.
    """

    def __init__(
        self, manifest: EffectsManifest, baseline: Baseline, *, folder: Path | None = None, shards: Any = ()
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
                "again to go on"
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

    def fit(self, **options: Any) -> "EffectMap":
        """The effect map of these effects: see `EffectMap.fit`."""
        from steersman.steer.effects.map import EffectMap

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
    try:
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    except SafetensorError as error:  # safetensors wraps what the system said
        raise SteersmanError(f"{path} could not be written: {error}; run the same command again to go on") from error


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
    found = _read(folder / BASELINE, manifest, list(Baseline._fields))
    numbers = {name: float(found[name]) for name in ("median_norm", "typical_scale")}
    return Baseline(found["mean"], found["standard_error"], **numbers)


def write_baseline(folder: Path, baseline: Baseline, manifest: EffectsManifest) -> None:
    """Write the folder's `baseline.safetensors`."""
    tensors = {"mean": baseline.mean, "standard_error": baseline.standard_error}
    tensors |= {n: torch.tensor(getattr(baseline, n), dtype=torch.float64) for n in ("median_norm", "typical_scale")}
    write_tensors(folder / BASELINE, tensors, manifest)


def read_shard(folder: Path, number: int, manifest: EffectsManifest) -> EffectShard:
    """A finished shard."""
    return EffectShard(**_read(shard_path(folder, number), manifest, list(EffectShard._fields)))
