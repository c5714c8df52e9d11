"""`contrast`: a steering vector from positive and negative examples, by any of the methods."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from steersman.config import merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.methods.base import METHODS, ContrastConfig, Method
from steersman.steer.methods.diagnostics import warnings
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.vectors.vector import SteeringVector

log = logging.getLogger(__name__)


def contrast(
    lm: LanguageModel,
    positive: ExamplesLike,
    negative: ExamplesLike | Mapping[str, Tensor] = (),
    *,
    hook: HookName | Sequence[HookName],
    config: ContrastConfig | None = None,
    **settings: Any,
) -> SteeringVector:
    """The vector that points from the negative examples to the positive ones.

    Args:
        lm: the model, unsteered.
        positive: texts, conversations, (prompt, answer) pairs, or mappings with those (see
            `steersman.steer.methods.examples`).
        negative: the same; {hook point: mean state [D]} for `mean_centred`; may be left out for `optimised`.
        hook: hook point, or several for one vector at all of them.
        config: the settings; `**settings` are fields of it, over those of `config`.

    The result's metadata hold the settings, the number of examples, and per hook point the figures that predict whether
    it will steer (see `steersman.steer.methods.diagnostics`); what they warn of is logged.

    Raises SteersmanError for an unknown method or setting, empty texts or sides, sides of different length where pairs
    are asked, states that are not finite, and a vector that comes out zero.
    """
    config = merged(ContrastConfig, config, settings)
    method = METHODS[config.method]()
    hooks = lm.resolve_hooks(hook)
    if not hooks or len(set(hooks)) != len(hooks):
        raise SteersmanError(f"name each hook point once, and at least one; got {hooks}")
    means = _means(lm, negative, hooks, method) if _is_means(negative) else None
    examples = Examples(
        positive=as_examples(positive, "positive"), negative=[] if means else as_examples(negative, "negative")
    )
    method.check(examples, config, has_means=means is not None)
    made = method.make(lm, examples, hooks, config, means)
    metadata = {
        "source": method.source,
        "model_type": getattr(lm.config, "model_type", ""),
        "n_positive": len(examples.positive),
        "n_negative": len(examples.negative),
        # files have `positions` under an older name
        "settings": {
            "tokens" if k == "positions" else k: v for k, v in dataclasses.asdict(config).items() if k != "method"
        },
        **made.notes,
    }
    if any(not isinstance(example.text, str) for example in (*examples.positive, *examples.negative)):
        metadata["chat_template"] = lm.template_digest
    if made.diagnostics:
        metadata["diagnostics"] = made.diagnostics
        for name, figures in made.diagnostics.items():
            for text in warnings(figures):
                log.warning("%s at %s: %s", method.name, name, text)
    return SteeringVector(
        directions=made.directions, model_name=lm.name, method=method.name, metadata=metadata, per=made.per
    )


def check_contrast(examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
    """Raise SteersmanError for examples that the method of `config` cannot use, as far as this can be known before a
    model is loaded. `has_means`: the states' means stand in for negatives."""
    METHODS[config.method]().check(examples, config, has_means=has_means)


def _is_means(negative: object) -> TypeGuard[Mapping[str, Tensor]]:
    return isinstance(negative, Mapping) and not {"text", "prompt", "messages"} & set(negative)


def _means(lm: LanguageModel, given: Mapping[str, Tensor], hooks: Sequence[str], method: Method) -> dict[str, Tensor]:
    if not method.takes_means:
        able = " and ".join(other.name for other in METHODS.values() if other.takes_means)
        raise SteersmanError(f"method {method.name!r} needs negative examples; only {able} take their mean")
    by_hook = {lm.resolve_hook(name): torch.as_tensor(mean).float().cpu() for name, mean in given.items()}
    for hook in hooks:
        if hook not in by_hook or by_hook[hook].shape != (lm.hook_width(hook),):
            raise SteersmanError(
                f"the means in place of negatives must hold a vector [{lm.hook_width(hook)}] for {hook}"
            )
    return by_hook
