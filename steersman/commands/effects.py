"""`steersman effects`."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from steersman.commands.options import ComputeOptions, PrintOptions, hook_point, on_kernels
from steersman.config import part_of
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.parallel import rank_and_world_size
from steersman.steer import (
    SteeringVector,
)
from steersman.steer.effects.collect import collect_effects
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.fit import check_enough
from steersman.steer.effects.folder import check_folder
from steersman.steer.effects.map_file import NAME
from steersman.steer.effects.vectors import n_vectors
from steersman.text import read_texts
from steersman.text_sources import SUFFIXES

log = logging.getLogger(__name__)


@renamed_fields(vector_files="vector")
@dataclass(frozen=True, kw_only=True)
class EffectsCommand(EffectsConfig, ComputeOptions, PrintOptions):
    """Measure what many steering vectors do to an SAE's features, and fit the map from vectors to effects."""

    out: str = field()  # a field of its own: the one of EffectsConfig has a default
    """Folder for the effects and the map. Run again, it resumes where it stopped."""
    model: str
    """Folder or hub id of the model."""
    sae: str
    """Folder of the SAE whose features are measured."""
    text: str | None = None
    """File, folder or dataset id of held-out text, for the scale rules loss and kl."""
    rows_of: str | None = None
    """Folder of another SAE at the same hook point, to take decoder rows from."""
    vector: tuple[str, ...] = ()
    """Vector file; those given are measured instead of made ones."""
    layer: int | None = None
    """Layer in place of --hook: the state after it, counted from 0; -1 is the last."""
    prompt: tuple[str, ...] = ()
    """Opening of the sampled texts; fourteen short ones if none is given."""
    prompts: tuple[str, ...] = ()
    """File of openings, one per line (or .jsonl with text)."""
    fit: Literal["closed", "adam", "none"] = "closed"
    """Fit the map in closed form, by Adam, or not."""
    ridge: float | None = None
    """Ridge of the closed form; chosen by cross-validation if not given."""
    heldout: float = 0.1
    """Fraction of the vectors kept out of the fit, for its scores; not of texts whose gradients are taken."""


@on_kernels
def run(config: EffectsCommand) -> None:
    """`steersman effects`."""
    openings = (*config.prompt, *(text for source in config.prompts for text in _openings(source)))
    hook = hook_point(config.hook, config.layer, config.model, config.revision)
    settings = replace(part_of(EffectsConfig, config), prompts=openings, hook=hook)
    settings = settings.with_vectors(bool(config.vector or config.rows_of))
    if config.ridge is not None and config.fit != "closed":
        raise SteersmanError(f"--ridge is a setting of --fit closed, and --fit is {config.fit}")
    if settings.by_gradients and config.fit == "adam":
        raise SteersmanError("--fit adam fits what was measured by steering: give --vectors decoder, or another kind")
    if not 0 <= config.heldout < 1:
        raise SteersmanError(f"--heldout is a fraction of the vectors, from 0 to below 1, got {config.heldout}")
    check_folder(Path(config.out))
    texts = _texts(config.text, settings)
    given = [SteeringVector.load(path) for path in config.vector] or None
    sae = config.load_sae(config.sae)
    rows_of = None if config.rows_of is None else config.load_sae(config.rows_of)
    source = sae if rows_of is None else rows_of
    if config.fit != "none" and settings.hook in (None, sae.cfg.hook_name):  # the vectors are as wide as the SAE
        _check_enough(config, len(given) if given else n_vectors(settings, source, sae.cfg.d_in), sae.cfg.d_in)
    lm = config.load_model(config.model)
    if config.fit != "none" and settings.hook is not None:
        width = lm.hook_width(lm.resolve_hook(settings.hook))
        _check_enough(config, len(given) if given else n_vectors(settings, source, width), width)
    effects = collect_effects(lm, sae, texts, settings, vectors=given, rows_of=rows_of)
    if rank_and_world_size()[0]:
        return
    if config.fit == "none":
        config.show(effects.to_text, {"out": config.out, "vectors": len(effects)})
        config.note(f"{config.out}: effects")
        return
    config.note(effects.to_text())
    ridge = {"ridge": config.ridge} if config.fit == "closed" else {}
    fitted = effects.fit(method=config.fit, heldout=config.heldout, seed=config.seed, **ridge)
    fitted.save(Path(config.out) / NAME)
    config.show(fitted.to_text, {"out": config.out, "map": str(Path(config.out) / NAME), **fitted.provenance})
    config.note(f"{config.out}: effects and {NAME}")


def _openings(source: str) -> list[str]:
    """The openings in a file; of an earlier version's `--prompts TEXT` the text itself."""
    if Path(source).suffix in SUFFIXES or Path(source).exists():
        return read_texts(source)
    log.warning("--prompts is a file of openings now; give one itself as --prompt %r", source)
    return [source]


def _check_enough(config: EffectsCommand, n: int, width: int) -> None:
    """Raise SteersmanError before n vectors are measured that are too few for a map."""
    given = bool(config.vector or config.rows_of)
    heldout = 0 if config.with_vectors(given).by_gradients else config.heldout
    check_enough(n - round(heldout * n), width, config.ridge)


def _texts(source: str | None, config: EffectsConfig) -> list[str]:
    if config.by_gradients or not config.needs_texts:
        return []
    if source is None:
        raise SteersmanError(f"scale_rule {config.scale_rule!r} needs --text: held-out text; or use norm or fixed")
    return read_texts(source, 4 * config.heldout_texts)
