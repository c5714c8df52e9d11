"""What a measurement of effects is made of: what was measured and how, the unsteered rollouts, and shards of effects.

Shape letters: n vectors of a shard, D width, L latents.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.lm.digest import tensor_hash
from steersman.reading import read_json_object
from steersman.sae import SAE
from steersman.sealed import seal, unseal

FORMAT, VERSION = "steersman.effects", 2
"""Version 1 had neither `model_digest` nor checksums, and its `vectors_hash` was of the unit vectors."""
MANIFEST = "manifest.json"


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
    """Hash of what the unit vectors are made from: the given vectors, or kind, seed and the SAE of the rows."""
    texts_hash: str
    """Hash of the held-out texts that the scale rule measures on; empty when it needs none."""
    settings: dict[str, Any]
    """`EffectsConfig.identity()`."""
    model_digest: str | None = None
    """`LanguageModel.digest()`; None where it was not recorded (version 1 of the format)."""

    @property
    def by_gradients(self) -> bool:
        """Whether the gradients of unsteered texts were measured, not the effects of vectors."""
        return self.settings.get("vectors") == "gradients"

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-self.n_vectors // self.settings["shard_vectors"])

    @property
    def shards(self) -> list[tuple[int, int]]:
        """First and last + 1 vector of each shard."""
        return [self.shard(number) for number in range(self.n_shards)]

    def shard(self, number: int) -> tuple[int, int]:
        """First and last + 1 vector of a shard."""
        size = self.settings["shard_vectors"]
        return number * size, min((number + 1) * size, self.n_vectors)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, without a digest that was not recorded."""
        data = asdict(self)
        return data if self.model_digest is not None else {k: v for k, v in data.items() if k != "model_digest"}

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when anything in it changes."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        version = 1 if self.model_digest is None else VERSION
        write_json(folder / MANIFEST, seal({"format": FORMAT, "version": version, **self.to_dict()}))

    @classmethod
    def load(cls, folder: Path) -> "EffectsManifest":
        """Read `folder`'s manifest. Raises SteersmanError when there is none, it is not one of ours, or damaged."""
        path = folder / MANIFEST
        if not path.exists():
            raise SteersmanError(
                f"{folder}: no effects here (there is no {MANIFEST}); measure them with collect_effects or "
                "`steersman effects`"
            )
        data = read_json_object(path)
        if data.get("format") != FORMAT:
            raise SteersmanError(f"{path} is no manifest of effects: its format is {str(data.get('format'))[:60]!r}")
        data = unseal(data, path)
        del data["format"]
        if (version := data.pop("version", None)) not in (1, VERSION) or isinstance(version, bool):
            raise SteersmanError(
                f"{path}: written in version {str(version)[:20]} of the format, this program reads up to {VERSION}"
            )
        wrong = _wrong_entries(data, version)
        if wrong:
            raise SteersmanError(f"{path} is no readable manifest of effects: {', '.join(wrong[:5])} missing or wrong")
        return cls(**data)


def _wrong_entries(data: dict[str, Any], version: int) -> list[str]:
    """Entries of a manifest that are missing, unknown or hold what they cannot."""
    texts = ["model_name", "hook_name", "vectors_hash", "texts_hash", *(["model_digest"] if version > 1 else [])]
    wrong = [name for name in texts if not isinstance(data.get(name), str)]
    wrong += [] if _is_count(data.get("n_vectors")) else ["n_vectors"]
    for group, counts, words in (("sae", ("d_in", "d_sae"), ("hash",)), ("settings", ("shard_vectors",), ())):
        entries = data.get(group)
        if not isinstance(entries, dict):
            wrong.append(group)
            continue
        wrong += [f"{group}.{name}" for name in counts if not _is_count(entries.get(name))]
        wrong += [f"{group}.{name}" for name in words if not isinstance(entries.get(name), str)]
    return wrong + sorted(name[:40] for name in data.keys() - {*texts, "n_vectors", "sae", "settings"})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 40


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
    """[n, D] fp32, unit norm; of n unsteered texts the gradients of their log-likelihood (`gradients.py`)."""
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
