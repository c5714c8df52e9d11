"""Measuring what steering vectors do to an SAE's features: the first half of SAE-TS (arXiv 2411.02193).

The main path, top to bottom: vectors, the unsteered baseline, then shard by shard a scale for each vector, texts
sampled under many vectors at once, the average of each feature over those texts, minus the baseline.
"""

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from steersman.config import differences, merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.parallel import Mesh, Ranks, rank_and_world_size
from steersman.progress import progress
from steersman.sae import SAE
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.folder import (
    BASELINE,
    Effects,
    read_baseline,
    shard_path,
    write_baseline,
    write_tensors,
)
from steersman.steer.effects.measured import (
    MANIFEST,
    Baseline,
    EffectShard,
    EffectsManifest,
    sae_identity,
    tensor_hash,
)
from steersman.steer.effects.rollouts import RolloutMeter
from steersman.steer.effects.scales import ScaleRule
from steersman.steer.effects.vectors import given_vectors, make_vectors
from steersman.steer.vectors.vector import VectorLike

log = logging.getLogger(__name__)

_PILOTS = 16
"""Vectors whose scales say where the search for the others starts."""


def collect_effects(
    lm: LanguageModel,
    sae: SAE,
    texts: Iterable[str] = (),
    config: EffectsConfig | None = None,
    *,
    vectors: str | Tensor | Iterable[VectorLike] | None = None,
    rows_of: SAE | None = None,
    **settings: Any,
) -> Effects:
    """Measure the effect of many steering vectors on every feature of `sae`.

    Under `torchrun` the shards are distributed over the ranks; the numbers, and the files, are those of one process.
    When interrupted, the same call with the same `out` resumes after the finished shards and leaves the same bytes.

    Args:
        lm: the model.
        sae: whose features are measured; it must record its hook point.
        texts: held-out texts, for the scale rules `loss` and `kl`.
        config: the settings; `**settings` are fields of it, over those of `config`.
        vectors: a kind (see `EffectsConfig.vectors`), or the vectors themselves: [n, D], or `SteeringVector`s.
        rows_of: another SAE at the same hook point, to take decoder rows from.

    Raises:
        SteersmanError: an SAE of another model, hook point or width; vectors of another width, model or hook point,
            zero or not finite; no held-out texts where the rule needs them; a rule that no vector reaches; a folder
            that holds something else, or effects measured with other settings (naming them).
    """
    config = merged(EffectsConfig, config, settings | ({"vectors": vectors} if isinstance(vectors, str) else {}))
    read_at = check_sae_fits(lm, sae)
    hook = read_at if config.hook is None else lm.resolve_hook(config.hook)
    if vectors is None or isinstance(vectors, str):
        source = sae if rows_of is None else rows_of
        check_sae_fits(lm, source)
        directions = make_vectors(config, source, lm.hook_width(hook))
    else:
        directions = given_vectors(vectors, lm, hook)
    heldout = _first_texts(texts, config) if config.needs_texts else []
    manifest = EffectsManifest(
        model_name=lm.name,
        hook_name=hook,
        sae=sae_identity(sae),
        n_vectors=len(directions),
        vectors_hash=tensor_hash(directions),
        texts_hash=hashlib.sha256("\0".join(heldout).encode()).hexdigest()[:16] if heldout else "",
        settings={**config.identity(), "hook": hook, "vectors": config.vectors if _made(vectors) else "given"},
    )
    rank, world_size = rank_and_world_size()
    folder = None if config.out is None else Path(config.out)
    if folder is None and world_size > 1:
        raise SteersmanError("several processes exchange their work through a folder: give out=")
    with Ranks(Mesh(data=world_size, rank=rank), config.timeout_seconds) as ranks:
        if folder is not None:  # nobody may look before the folder is known to be the right one
            ranks.on_rank_zero(lambda: _claim(folder, manifest))
        meter = RolloutMeter(lm, sae, hook, config)
        return _collect(meter, directions, heldout, manifest, folder, ranks)


def _collect(
    meter: RolloutMeter,
    vectors: Tensor,
    texts: list[str],
    manifest: EffectsManifest,
    folder: Path | None,
    ranks: Ranks,
) -> Effects:
    baseline, rule = _baseline(meter, vectors, texts, manifest, folder, ranks)
    shards = list(enumerate(manifest.shards))
    mine = [shard for shard in shards if shard[0] % ranks.mesh.world_size == ranks.mesh.rank]
    waiting = [shard for shard in mine if folder is None or not shard_path(folder, shard[0]).is_file()]
    total = sum(stop - start for _, (start, stop) in mine)
    done = total - sum(stop - start for _, (start, stop) in waiting)
    finished = []
    shown = ranks.is_rank_zero
    with progress(desc="measuring effects", total=total, initial=done, unit="vector", shown=shown) as bar:
        for number, (start, stop) in waiting:
            shard = _shard(meter, rule, vectors[start:stop], start, baseline)
            if folder is None:
                finished.append(shard)
            else:
                write_tensors(shard_path(folder, number), shard._asdict(), manifest)
            bar.update(stop - start)
    ranks.control.barrier()
    effects = Effects(manifest, baseline, shards=finished) if folder is None else Effects.open(folder)
    _check_reached(effects, meter.config, baseline)
    return effects


def _shard(meter: RolloutMeter, rule: ScaleRule, vectors: Tensor, first: int, baseline: Baseline) -> EffectShard:
    """The effects of the vectors [n, D] that are the `first`-th and following."""
    config = meter.config
    scales = rule.find(vectors, None if math.isnan(baseline.typical_scale) else baseline.typical_scale)
    numbers = range(first, first + len(vectors))
    averages = meter.measure(vectors, scales.scale, numbers, config.rollouts, config.seed)
    return EffectShard(
        vectors=vectors,
        scale=scales.scale,
        achieved=scales.achieved,
        reached=scales.reached,
        effect=(averages.mean - baseline.mean.double()).float(),
        standard_error=averages.standard_error.float(),
        positions=averages.positions,
    )


def _baseline(
    meter: RolloutMeter,
    vectors: Tensor,
    texts: list[str],
    manifest: EffectsManifest,
    folder: Path | None,
    ranks: Ranks,
) -> tuple[Baseline, ScaleRule]:
    """The unsteered rollouts, measured by rank 0 where they are not there yet; and the rule for scales."""

    def rule(median_norm: float) -> ScaleRule:
        return ScaleRule(meter.lm, meter.hook, meter.config, median_norm, texts)

    def measured() -> tuple[Baseline, ScaleRule]:
        averages, median_norm = meter.base()
        scales = rule(median_norm)
        typical = scales.typical(vectors[:_PILOTS]) if meter.config.needs_texts else math.nan
        return Baseline(averages.mean[0].float(), averages.standard_error[0].float(), median_norm, typical), scales

    def write_missing() -> None:
        if folder is not None and not (folder / BASELINE).is_file():
            write_baseline(folder, measured()[0], manifest)

    if folder is None:
        return measured()
    ranks.on_rank_zero(write_missing)
    baseline = read_baseline(folder, manifest)
    return baseline, rule(baseline.median_norm)


def _check_reached(effects: Effects, config: EffectsConfig, baseline: Baseline) -> None:
    reached = effects.column("reached")
    if bool(reached.all()):
        return
    achieved = effects.column("achieved")
    limit = config.scale_limit * baseline.median_norm
    text = f"scale_rule {config.scale_rule!r} with target {config.target:g}"
    if not bool(reached.any()):
        raise SteersmanError(
            f"{text} was reached by none of {len(reached)} vectors up to scale {limit:.4g} "
            f"({config.scale_limit:g} x the median norm): the largest measured was "
            f"{float(achieved.nan_to_num().max()):.3g}; lower scale_target or raise scale_limit"
        )
    log.warning(
        "%s was not reached by %d of %d vectors: maps leave them out", text, int((~reached).sum()), len(reached)
    )


def _made(vectors: object) -> bool:
    return vectors is None or isinstance(vectors, str)


def _first_texts(texts: Iterable[str], config: EffectsConfig) -> list[str]:
    """The texts that the scale rule measures on."""
    kept: list[str] = []
    for text in [texts] if isinstance(texts, str) else texts:
        if text.strip():
            kept.append(text)
        if len(kept) == config.heldout_texts:
            break
    if not kept:
        raise SteersmanError(
            f"scale_rule {config.scale_rule!r} measures on held-out text: give texts, or use 'norm' or 'fixed'"
        )
    return kept


def _settings(manifest: EffectsManifest) -> dict[str, Any]:
    """Everything in a manifest, the settings under the names that a user knows."""
    data = asdict(manifest)
    return data.pop("settings") | data


def _claim(folder: Path, manifest: EffectsManifest) -> None:
    """Make the folder, or check that what is in it was started with the same settings."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            if difference := differences(_settings(EffectsManifest.load(folder)), _settings(manifest)):
                raise SteersmanError(
                    f"{folder}: holds effects measured with other settings: {difference}; choose another folder, or "
                    "delete this one"
                )
        elif any(child for child in folder.iterdir() if not child.name.endswith(".tmp")):
            raise SteersmanError(f"{folder}: exists and holds no effects; choose an empty or new folder")
        else:
            manifest.save(folder)
    except OSError as error:
        raise SteersmanError(f"{folder} cannot be used for effects: {error.strerror}") from error
