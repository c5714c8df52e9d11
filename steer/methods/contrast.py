"""`contrast`: a steering vector from positive and negative examples, by any of the methods."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.methods.actadd import ActAdd
from steersman.steer.methods.base import ContrastConfig, Method
from steersman.steer.methods.caa import CAA
from steersman.steer.methods.diagnostics import warnings
from steersman.steer.methods.diffmean import DiffMean
from steersman.steer.methods.examples import Examples, as_examples
from steersman.steer.methods.lat import LAT
from steersman.steer.methods.mean_centred import MeanCentred
from steersman.steer.methods.optimised import Optimised
from steersman.steer.methods.pca import PCA
from steersman.steer.methods.probe import Probe
from steersman.steer.vectors.vector import SteeringVector

log = logging.getLogger(__name__)

METHODS: dict[str, Method] = {
    method.name: method for method in (ActAdd(), CAA(), DiffMean(), MeanCentred(), PCA(), LAT(), Probe(), Optimised())
}
"""Every way to make a vector from examples, by name."""


def contrast(
    lm: LanguageModel,
    positive: Any,
    negative: Any = (),
    *,
    hook: str | Sequence[str],
    config: ContrastConfig | None = None,
    **options: Any,
) -> SteeringVector:
    """The vector that points from the negative examples to the positive ones.

    Args:
        lm: the model, unsteered.
        positive: texts, (prompt, answer) pairs, or mappings with those (see `steersman.steer.methods.examples`).
        negative: the same; {hook point: mean state [D]} for `mean_centred`; may be left out for `optimised`.
        hook: hook point, or several for one vector at all of them.
        config: the settings; or give them by name, as in `method="caa", tokens="last"`.

    The result's metadata hold the settings, the number of examples, and per hook point the figures that predict whether
    it will steer (see `steersman.steer.methods.diagnostics`); what they warn of is logged.

    Raises SteersmanError for an unknown method or setting, empty texts or sides, sides of different length where pairs
    are asked, states that are not finite, and a vector that comes out zero.
    """
    config = _settings(config, options)
    if config.method not in METHODS:
        raise SteersmanError(f"unknown method {config.method!r}: use one of {', '.join(METHODS)}")
    method = METHODS[config.method]
    hooks = [lm.resolve_hook(name) for name in ([hook] if isinstance(hook, str) else hook)]
    if not hooks or len(set(hooks)) != len(hooks):
        raise SteersmanError(f"name each hook point once, and at least one; got {hooks}")
    means = _means(lm, negative, hooks, method) if _is_means(negative) else None
    examples = Examples(
        positive=as_examples(positive, "positive"), negative=[] if means else as_examples(negative, "negative")
    )
    if not examples.positive:
        raise SteersmanError("there are no positive examples")
    if not examples.negative and means is None and method.name != "optimised":
        raise SteersmanError("there are no negative examples")
    made = method.make(lm, examples, hooks, config, means)
    metadata = {
        "source": method.source,
        "model_type": getattr(lm.config, "model_type", ""),
        "n_positive": len(examples.positive),
        "n_negative": len(examples.negative),
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k != "method"},
        **made.notes,
    }
    if made.diagnostics:
        metadata["diagnostics"] = made.diagnostics
        for name, figures in made.diagnostics.items():
            for text in warnings(figures):
                log.warning("%s at %s: %s", method.name, name, text)
    return SteeringVector(directions=made.directions, model_name=lm.name, method=method.name, metadata=metadata)


def _settings(config: ContrastConfig | None, options: Mapping[str, Any]) -> ContrastConfig:
    known = {f.name for f in dataclasses.fields(ContrastConfig)}
    for name in options:
        if name not in known:
            raise SteersmanError(f"no setting {name!r} of a contrast: there are {', '.join(sorted(known))}")
    return dataclasses.replace(config or ContrastConfig(), **options)


def _is_means(negative: Any) -> bool:
    return isinstance(negative, Mapping) and not {"text", "prompt"} & set(negative)


def _means(lm: LanguageModel, given: Mapping[str, Any], hooks: Sequence[str], method: Method) -> dict[str, Tensor]:
    if method.name not in ("mean_centred", "diffmean"):
        raise SteersmanError(f"method {method.name!r} needs negative examples; only mean_centred takes their mean")
    found = {lm.resolve_hook(name): torch.as_tensor(mean).float().cpu() for name, mean in given.items()}
    for hook in hooks:
        if hook not in found or found[hook].shape != (lm.hook_width(hook),):
            raise SteersmanError(
                f"the means in place of negatives must hold a vector [{lm.hook_width(hook)}] for {hook}"
            )
    return found
