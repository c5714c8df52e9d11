"""`style`: v = mean(texts of a style) - mean(all other texts), last token; `style_vectors` for several styles at once.

Source: arXiv 2402.01618, the vectors from activations. Its authors read `hidden_states[18]`, which is what block 17
returns, and add to what the MLP of block 18 does: here the hook point that is read is the one that is edited. Their
trained vectors are those of method `latent`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.config import merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.methods.base import ContrastConfig, check_differ
from steersman.steer.methods.diffmean import MeanDifference
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.methods.moments import RunningMean
from steersman.steer.methods.reading import Reader
from steersman.steer.methods.streamed import StreamedMethod
from steersman.steer.vectors.vector import SteeringVector


class Style(StreamedMethod):
    """Mean of a style less the mean of everything else."""

    name = "style"
    source = "arXiv 2402.01618"
    positions = "last"
    order = "sides"
    estimator = MeanDifference
    takes_weights = True
    per_step = True


def style_vectors(
    lm: LanguageModel,
    styles: Mapping[str, ExamplesLike],
    *,
    hook: HookName | Sequence[HookName],
    config: ContrastConfig | None = None,
    **settings: Any,
) -> dict[str, SteeringVector]:
    """The vector of every style against all the others: name -> vector. Every text is read once.

    `styles` has at least two names, each with its texts; `config` and `settings` as for `contrast` (`positions`,
    `batch_size`, `max_length`). The mean of the others is over their texts: a style with more texts weighs more.
    """
    config = merged(ContrastConfig, config, {"method": "style", **settings})
    sides = {name: as_examples(texts, f"style {name!r}:") for name, texts in styles.items()}
    if len(sides) < 2:
        raise SteersmanError(f"style_vectors needs two styles at least, got {len(sides)}: each is told from the others")
    for examples in sides.values():
        Style().check(Examples(positive=examples, negative=examples), config)
    if config.table is not None:
        raise SteersmanError("style_vectors makes no table of steps: use contrast(..., method='style', table=...)")
    hooks = lm.resolve_hooks(hook)
    positions = config.positions or Style.positions
    reader = Reader(
        lm, hooks, positions=positions, batch_size=config.batch_size, max_length=config.max_length, seed=config.seed
    )
    means = {name: {hook: RunningMean() for hook in hooks} for name in sides}
    for name, examples in sides.items():
        for batch in reader.samples(Examples(positive=examples, negative=[]), "sides"):
            for hook_name in hooks:
                part = batch.at(hook_name)
                means[name][hook_name].add(part.x, part.weight)
    found: dict[str, SteeringVector] = {}
    for name, examples in sides.items():
        directions: dict[str, Tensor] = {}
        for hook_name in hooks:
            others = RunningMean()
            for other in sides:
                others = others if other == name else others.merged(means[other][hook_name])
            own = means[name][hook_name].mean
            check_differ(own - others.mean, float(own.norm()), f"style {name!r}", hook_name)
            directions[hook_name] = (own - others.mean).to(torch.float32)
        metadata = {
            "source": Style.source,
            "model_type": getattr(lm.config, "model_type", ""),
            "style": name,
            "others": [other for other in sides if other != name],
            "n_positive": len(examples),
            "tokens": positions,
        }
        found[name] = SteeringVector(directions=directions, model_name=lm.name, method="style", metadata=metadata)
    return found
