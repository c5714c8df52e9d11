"""`optimised`: gradient ascent on the log-likelihood of completions, under a bound on the norm.

    max over |v| <= r of  mean log p(positive token | steered by v)  +  suppress mean log(1 - p(negative token | ...))

over the tokens of the answers (of the whole text, where an example has no prompt). Sources: arXiv 2205.05124
(extracting latent steering vectors), arXiv 2502.18862 (promotion and suppression). Adam on v / r from zero in steps of
about a twentieth of r, projected back on the ball; the best iterate is kept. Each of several hook points has a bound of
its own. The model's weights get no gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.edits import VectorEdit
from steersman.steer.measures import median_norms
from steersman.steer.methods.base import ContrastConfig, Made, Method
from steersman.steer.methods.examples import Examples
from steersman.steer.training.loop import TrainEditConfig, train_edit
from steersman.steer.training.losses import Likelihood

STEP = 0.05  # of the bound, per gradient step


class Optimised(Method):
    """Gradient ascent on the likelihood of completions."""

    name = "optimised"
    source = "arXiv 2205.05124, 2502.18862"
    positions = reads = "the completions"
    needs_negative = False

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        if config.steps < 1 or not config.max_norm_frac > 0:
            raise SteersmanError("steps must be at least 1 and max_norm_frac above 0")

    def make(
        self,
        lm: LanguageModel,
        examples: Examples,
        hooks: list[str],
        config: ContrastConfig,
        means: Mapping[str, Tensor] | None,
    ) -> Made:
        texts = [e.text for e in (*examples.positive, *examples.negative)]
        norms = median_norms(lm, texts[:64], hooks, batch_size=config.batch_size)
        bound = {hook: config.max_norm_frac * norm for hook, norm in norms.items()}
        found = train_edit(
            lm,
            {hook: torch.zeros(lm.hook_width(hook)) for hook in hooks},
            lambda u: {hook: VectorEdit(bound[hook] * x) for hook, x in u.items()},
            Likelihood(examples.positive, examples.negative, suppress=config.suppress),
            max_norm=dict.fromkeys(hooks, 1.0),
            config=TrainEditConfig(
                lr=STEP / lm.d_model**0.5,
                epochs=config.steps,
                batch_size=config.batch_size,
                full_batch=True,
                keep="best",
                seed=config.seed,
            ),
        )
        directions = {hook: bound[hook] * x for hook, x in found.parameters.items()}
        if not any(float(d.norm()) > 0 for d in directions.values()):
            raise SteersmanError("no step of the optimisation improved on no steering: check the examples")
        return Made(directions=directions, notes={**found.notes(), "bound": bound})
