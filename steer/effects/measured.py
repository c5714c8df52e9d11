"""What a measurement of effects is made of: what was measured and how, the unsteered rollouts, and shards of effects.

Shape letters: n vectors of a shard, D width, L latents.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.sae import SAE

FORMAT, VERSION = "steersman.effects", 1
MANIFEST = "manifest.json"


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


class Measured(Protocol):
    """Measured effects, however they are kept: what a map is fitted to."""

    manifest: EffectsManifest
    """What was measured."""
    baseline: Baseline
    """The unsteered rollouts."""

    def iterate(self) -> Iterator[EffectShard]:
        """The shards, in order."""
        ...

    def column(self, name: str) -> Tensor:
        """One of the small fields over all vectors: [n]."""
        ...
