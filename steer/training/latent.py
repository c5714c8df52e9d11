"""`latent` (latent steering vectors): for each text the vector that makes the model say it.

    z = argmax_z sum_t log p(x_t | x_<t, z added), by gradient descent with teacher forcing

`memorise` gives the vector of every text. The method makes a direction of them: v = mean z(positives) - mean
z(negatives), the sentiment arithmetic of arXiv 2205.05124 and the trained style vectors of arXiv 2402.01618 (whose
code feeds the model its own guesses in place of the text). One or several middle layers; source: Adam with lr 1 for
500 steps on GPT-2, from a random start, steps of about half of the median |h|; here from zero, in steps of a tenth of
it that fall to 0. Without a word at the front the BOS must be steered: `memorise` does that, and so must who uses its
vectors (`include_bos=True`). Compare |z| to the median |h| (in the notes) before believing in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.edits import VectorEdit
from steersman.steer.measures import median_norms
from steersman.steer.methods.base import ContrastConfig, Made, Method
from steersman.steer.methods.examples import Example, Examples, ExamplesLike, as_examples
from steersman.steer.training.loop import TrainEditConfig, train_edit
from steersman.steer.training.losses import Likelihood
from steersman.steer.vectors.vector import SteeringVector

STEP = 0.1  # of the median norm, over all coordinates together, per step at first


def memorise(
    lm: LanguageModel,
    texts: ExamplesLike,
    *,
    hook: HookName | Sequence[HookName],
    steps: int = 500,
    lr: float | None = None,
    batch_size: int = 16,
) -> list[SteeringVector]:
    """For each text the vector under which the model says it, at one hook point or several at once.

    The texts of a batch are trained side by side and do not know of one another; the BOS is steered too. The notes hold
    the loss with and without the vectors of the batch, and the median norm at each hook point. `lr` is Adam's learning
    rate, by default a tenth of the median norm over sqrt(D), falling to 0.
    """
    examples = as_examples(texts, "text")
    hooks = lm.resolve_hooks(hook)
    if not examples:
        raise SteersmanError("there are no texts to memorise")
    norms = median_norms(lm, [e.text for e in examples[:64]], hooks, batch_size=batch_size)
    found: list[SteeringVector] = []
    for start in range(0, len(examples), batch_size):
        found += _side_by_side(lm, examples[start : start + batch_size], norms, steps, lr)
    return found


def _side_by_side(
    lm: LanguageModel, examples: Sequence[Example], norms: Mapping[str, float], steps: int, lr: float | None
) -> list[SteeringVector]:
    # Each hook point's vectors in units of its norm, so that one learning rate serves all.
    width = {hook: lm.hook_width(hook) for hook in norms}
    unit = {hook: norms[hook] / width[hook] ** 0.5 if lr is None else 1.0 for hook in norms}
    trained = train_edit(
        lm,
        {hook: torch.zeros(len(examples), width[hook]) for hook in norms},
        lambda z: {hook: VectorEdit(unit[hook] * rows) for hook, rows in z.items()},
        Likelihood(list(examples)),
        include_bos=True,
        config=TrainEditConfig(
            lr=STEP if lr is None else lr,
            epochs=steps,
            batch_size=len(examples),
            full_batch=True,
            keep="best",
            schedule="cosine",
        ),
    )
    found = []
    for row, example in enumerate(examples):
        directions = {hook: unit[hook] * z[row] for hook, z in trained.parameters.items()}
        notes: dict[str, Any] = {
            **trained.notes(),
            "text": example.text,
            "include_bos": True,
            "median_norm": dict(norms),
        }
        metadata = {"source": Latent.source, "model_type": getattr(lm.config, "model_type", ""), **notes}
        found.append(SteeringVector(directions=directions, model_name=lm.name, method="latent", metadata=metadata))
    return found


class Latent(Method):
    """The mean of the vectors that make the model say the positives, less that of the negatives."""

    name = "latent"
    source = "arXiv 2205.05124"
    positions = reads = "the completions"
    needs_negative = False

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        if config.steps < 1:
            raise SteersmanError("steps must be at least 1")

    def make(
        self,
        lm: LanguageModel,
        examples: Examples,
        hooks: list[str],
        config: ContrastConfig,
        means: Mapping[str, Tensor] | None,
    ) -> Made:
        options: dict[str, Any] = {
            "hook": hooks,
            "steps": config.steps,
            "lr": config.lr,
            "batch_size": config.batch_size,
        }
        sides = [memorise(lm, side, **options) for side in (examples.positive, examples.negative) if side]
        means_of = [{h: torch.stack([z.directions[h] for z in side]).mean(0) for h in hooks} for side in sides]
        directions = {h: means_of[0][h] - (means_of[1][h] if len(sides) > 1 else 0.0) for h in hooks}
        notes = {name: sides[0][0].metadata[name] for name in ("loss", "loss_unsteered", "median_norm")}
        return Made(directions=directions, notes=notes)
