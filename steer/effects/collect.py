"""Measuring what steering vectors do to an SAE's features: the first half of SAE-TS (arXiv 2411.02193).

The main path, top to bottom: vectors, the unsteered baseline, then shard by shard a scale for each vector, texts
sampled under many vectors at once, the average of each feature over those texts, minus the baseline. With `gradients`
(the default) nothing is steered: a shard is of unsteered texts, each with its features and the gradient of its
likelihood, see `gradients.py`.
"""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.config import differences, merged
from steersman.errors import PreemptedError, SteersmanError
from steersman.files import make_folder
from steersman.folders import FolderLock
from steersman.lm import LanguageModel
from steersman.lm.digest import tensor_hash
from steersman.lm.origin import check_sae_fits
from steersman.parallel import Mesh, Ranks, ending_on_sigterm, rank_and_world_size
from steersman.progress import progress
from steersman.sae import SAE
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.folder import (
    BASELINE,
    Effects,
    check_folder,
    finished_shards,
    read_baseline,
    read_shard,
    shard_path,
    write_baseline,
    write_tensors,
)
from steersman.steer.effects.gradients import text_scores
from steersman.steer.effects.measured import (
    MANIFEST,
    Baseline,
    EffectShard,
    EffectsManifest,
    sae_identity,
)
from steersman.steer.effects.rollouts import RolloutMeter
from steersman.steer.effects.scales import ScaleRule
from steersman.steer.effects.vectors import given_vectors, make_vectors, source_tensors, unit_rows
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
    When interrupted, the same call with the same `out` resumes after the finished shards and leaves the same bytes. One
    job at a time writes a folder; a second one is refused.

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
            that holds something else, damaged files, or effects of another model or other settings (naming them), or
            that another job is writing.
    """
    config = merged(EffectsConfig, config, settings | ({"vectors": vectors} if isinstance(vectors, str) else {}))
    config = config.with_vectors(rows_of is not None or not (vectors is None or isinstance(vectors, str)))
    folder = None if config.out is None else Path(config.out)
    read_at = check_sae_fits(lm, sae)
    hook = read_at if config.hook is None else lm.resolve_hook(config.hook)
    if vectors is None or isinstance(vectors, str):
        source = sae if rows_of is None else rows_of
        check_sae_fits(lm, source)
        directions, sources = make_vectors(config, source, lm.hook_width(hook)), source_tensors(config, source)
    else:
        given = given_vectors(vectors, lm, hook)
        directions, sources = unit_rows(given), [given]
    heldout = _first_texts(texts, config) if config.needs_texts and not config.by_gradients else []
    rank, world_size = rank_and_world_size()
    if folder is None and world_size > 1:
        raise SteersmanError("several processes exchange their work through a folder: give out=")
    manifest = EffectsManifest(
        model_name=lm.name,
        hook_name=hook,
        sae=sae_identity(sae),
        n_vectors=len(directions),
        vectors_hash=tensor_hash(*sources),
        texts_hash=hashlib.sha256("\0".join(heldout).encode()).hexdigest()[:16] if heldout else "",
        settings={
            **config.identity(),
            **({"chat_template": lm.chat_template.digest} if config.chat or config.system is not None else {}),
            "hook": hook,
            "vectors": config.vectors if _made(vectors) else "given",
        },
        model_digest=lm.digest(),
    )
    with Ranks(Mesh(data=world_size, rank=rank), config.timeout_seconds) as ranks, ExitStack() as held:
        if folder is not None:  # nobody may look before the folder is known to be the right one
            manifest = ranks.on_rank_zero(lambda: _claim(folder, manifest, directions, held))
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
    with _saying_what_is_kept(folder, manifest):
        baseline, rule = _baseline(meter, vectors, texts, manifest, folder, ranks)
        done = set() if folder is None else set(finished_shards(folder, manifest))
        mine = range(ranks.mesh.rank, manifest.n_shards, ranks.mesh.world_size)
        finished: list[EffectShard] = []

        def measure() -> None:
            sizes = {number: stop - start for number in mine for start, stop in [manifest.shard(number)]}
            total, before = sum(sizes.values()), sum(size for number, size in sizes.items() if number in done)
            shown = ranks.is_rank_zero
            with progress(desc="measuring effects", total=total, initial=before, unit="vector", shown=shown) as bar:
                for number in mine:
                    if number in done:
                        continue
                    start, stop = manifest.shard(number)
                    shard = _shard(meter, rule, vectors[start:stop], start, baseline)
                    if folder is None:
                        finished.append(shard)
                    else:
                        write_tensors(shard_path(folder, number), shard._asdict(), manifest)
                    bar.update(stop - start)

        ranks.on_every_rank(measure)
    effects = Effects(manifest, baseline, shards=finished) if folder is None else Effects.open(folder)
    _check_reached(effects, meter.config, baseline)
    return effects


@contextmanager
def _saying_what_is_kept(folder: Path | None, manifest: EffectsManifest) -> Iterator[None]:
    """Ctrl-C and the system's request to end (SIGTERM) are raised with a line that says what is kept."""

    def kept() -> str:
        if folder is None:
            return "nothing is kept, as no folder was named"
        done = len(finished_shards(folder, manifest))
        return f"{done} of {manifest.n_shards} shards are finished and kept in {folder}; the same command resumes"

    try:
        with ending_on_sigterm():
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {kept()}") from None
    except PreemptedError as error:
        raise PreemptedError(f"asked to end: {kept()}") from error


def _shard(meter: RolloutMeter, rule: ScaleRule | None, vectors: Tensor, first: int, baseline: Baseline) -> EffectShard:
    """The effects of the vectors [n, D] that are the `first`-th and following; of as many texts, for gradients."""
    config = meter.config
    if rule is None:
        return _text_shard(meter, first, len(vectors), baseline)
    scales = rule.find(vectors, None if math.isnan(baseline.typical_scale) else baseline.typical_scale)
    numbers = range(first, first + len(vectors))
    averages = meter.measure(vectors, scales.scale, numbers, config.rollouts, config.seed)
    if not bool(averages.mean.isfinite().all()):
        raise SteersmanError(
            f"{meter.lm.name} steered by vectors {first} to {first + len(vectors) - 1} gives NaN or "
            "infinite activations; lower scale_target or scale_limit"
        )
    return EffectShard(
        vectors=vectors,
        scale=scales.scale,
        achieved=scales.achieved,
        reached=scales.reached,
        effect=(averages.mean - baseline.mean.double()).float(),
        standard_error=averages.standard_error.float(),
        positions=averages.positions,
    )


def _text_shard(meter: RolloutMeter, first: int, n: int, baseline: Baseline) -> EffectShard:
    texts = text_scores(meter, first, n)
    if not bool(texts.mean.isfinite().all() & texts.gradient.isfinite().all()):
        raise SteersmanError(f"{meter.lm.name} gives NaN or infinite activations or gradients on texts that it writes")
    return EffectShard(
        vectors=texts.gradient,
        scale=torch.ones(n),
        achieved=torch.full((n,), math.nan),
        reached=torch.ones(n, dtype=torch.bool),
        effect=texts.mean - baseline.mean,
        standard_error=torch.zeros_like(texts.mean),
        positions=texts.positions,
    )


def _baseline(
    meter: RolloutMeter,
    vectors: Tensor,
    texts: list[str],
    manifest: EffectsManifest,
    folder: Path | None,
    ranks: Ranks,
) -> tuple[Baseline, ScaleRule | None]:
    """The unsteered rollouts, measured by rank 0 where they are not there yet; and the rule for scales, where texts are
    steered."""

    def rule(median_norm: float) -> ScaleRule:
        return ScaleRule(meter.lm, meter.hook, meter.config, median_norm, texts)

    def measured() -> tuple[Baseline, ScaleRule | None]:
        averages, median_norm = meter.base()
        scales = None if meter.config.by_gradients else rule(median_norm)
        typical = math.nan
        if scales is not None and meter.config.needs_texts:
            typical = scales.typical(vectors[:_PILOTS])
        return Baseline(averages.mean[0].float(), averages.standard_error[0].float(), median_norm, typical), scales

    def write_missing() -> None:
        if folder is not None and not (folder / BASELINE).is_file():
            write_baseline(folder, measured()[0], manifest)

    if folder is None:
        return measured()
    ranks.on_rank_zero(write_missing)
    baseline = read_baseline(folder, manifest)
    return baseline, None if meter.config.by_gradients else rule(baseline.median_norm)


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
    data = manifest.to_dict()
    return data.pop("settings") | data


def _claim(folder: Path, manifest: EffectsManifest, vectors: Tensor, held: ExitStack) -> EffectsManifest:
    """Make the folder, or check that what is in it was started with the same settings and is whole; hold it until
    `held` is closed. Returns the folder's manifest, which is `manifest` but where an earlier version wrote it."""
    check_folder(folder)
    make_folder(folder)
    try:
        held.enter_context(FolderLock(folder, "these effects"))
    except OSError as error:
        raise SteersmanError(f"{folder} cannot be used for effects: {error.strerror}") from error
    check_folder(folder)  # now that nobody else begins here
    if not (folder / MANIFEST).exists():
        manifest.save(folder)
        return manifest
    there = EffectsManifest.load(folder)
    done = finished_shards(folder, there)
    if there.model_digest is None:  # of version 1, which identified the vectors by what this CPU may round otherwise
        known = there.vectors_hash if done else tensor_hash(vectors)
        manifest = replace(manifest, model_digest=None, vectors_hash=known)
    if difference := differences(_settings(there), _settings(manifest)):
        if "model_digest" in difference:
            difference += " (other weights, another configuration or another dtype of the model)"
        raise SteersmanError(
            f"{folder}: holds effects measured with other settings: {difference}; choose another folder, or delete "
            "this one"
        )
    for number in progress(done, desc="checking finished shards", unit="shard", shown=len(done) > 100):
        start, stop = there.shard(number)
        found = read_shard(folder, number, there, vectors.shape[1]).vectors
        if not manifest.by_gradients and not torch.allclose(found, vectors[start:stop], rtol=0, atol=1e-5):
            raise SteersmanError(f"{folder}: shard {number} was measured on other vectors; choose another folder")
    return there
