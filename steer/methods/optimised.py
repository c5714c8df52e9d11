"""`optimised`: gradient ascent on the log-likelihood of completions, under a bound on the norm.

    max over |v| <= r of  mean log p(positive token | steered by v)  +  suppress mean log(1 - p(negative token | ...))

over the tokens of the answers (of the whole text, where an example has no prompt). Sources: arXiv 2205.05124
(extracting latent steering vectors), arXiv 2502.18862 (promotion and suppression). Adam on v / r from zero in steps of
about a twentieth of r, projected back on the ball; the best iterate is kept. Each of several hook points has a bound of
its own. The model's weights get no gradient.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.progress import progress
from steersman.steer.measures import median_norms
from steersman.steer.methods.base import ContrastConfig, Made, Method
from steersman.steer.methods.examples import Example, Examples
from steersman.steer.methods.reading import prompt_tokens
from steersman.steer.steerer import Steerer

STEP = 0.05  # of the bound, per gradient step


class Optimised(Method):
    """Gradient ascent on the likelihood of completions."""

    name = "optimised"
    source = "arXiv 2205.05124, 2502.18862"
    positions = "the completions"
    needs_negative = False

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        if config.positions is not None:
            raise SteersmanError("method 'optimised' reads the completions: leave out positions")
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
        u = {hook: torch.zeros(lm.hook_width(hook), device=lm.device, requires_grad=True) for hook in hooks}
        optimizer = torch.optim.Adam(list(u.values()), lr=STEP / lm.d_model**0.5)
        sides = [(+1, part) for part in _batches(examples.positive, config.batch_size)]
        if config.suppress:
            sides += [(-1, part) for part in _batches(examples.negative, config.batch_size)]
        best, kept, first = float("inf"), {hook: x.detach().clone() for hook, x in u.items()}, 0.0
        requires = [p.requires_grad for p in lm.model.parameters()]
        lm.model.requires_grad_(False)
        try:
            for step in progress(range(config.steps + 1), desc="optimising the vector"):
                optimizer.zero_grad()
                total = 0.0
                for sign, part in sides:
                    n = len(examples.positive if sign > 0 else examples.negative)
                    with torch.enable_grad():
                        loss = _loss(lm, u, bound, part, sign) * (len(part) / n)
                        loss = loss if sign > 0 else config.suppress * loss
                        loss.backward()
                    total += float(loss.detach())
                first = total if step == 0 else first
                if total < best:
                    best, kept = total, {hook: x.detach().clone() for hook, x in u.items()}
                optimizer.step()
                with torch.no_grad():
                    for x in u.values():
                        x.div_(max(1.0, float(x.norm())))
        finally:
            for p, required in zip(lm.model.parameters(), requires):
                p.requires_grad_(required)
        directions = {hook: (bound[hook] * x).cpu() for hook, x in kept.items()}
        if not any(float(d.norm()) > 0 for d in directions.values()):
            raise SteersmanError("no step of the optimisation improved on no steering: check the examples")
        return Made(directions=directions, notes={"loss_unsteered": first, "loss": best, "bound": bound})


def _batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    return [list(examples[i : i + size]) for i in range(0, len(examples), size)]


def _loss(
    lm: LanguageModel, u: Mapping[str, Tensor], bound: Mapping[str, float], part: Sequence[Example], sign: int
) -> Tensor:
    """Mean over the examples of the mean over their completion tokens of -log p (sign 1) or -log(1 - p) (sign -1)."""
    batch = lm.encode([e.text for e in part])
    starts = [prompt_tokens(lm, e, "an example") if e.prompt else 1 for e in part]
    with Steerer(lm).vector({hook: bound[hook] * x for hook, x in u.items()}):
        logits = lm.logits(batch.input_ids, batch.attention_mask, grad=True)
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    column = torch.arange(1, batch.input_ids.shape[1], device=lm.device)
    chosen = (column >= torch.tensor(starts, device=lm.device)[:, None]) & batch.attention_mask[:, 1:].bool()
    if sign < 0:
        logp = torch.log1p(-logp.exp().clamp(max=1 - 1e-6))
    return -((logp * chosen).sum(1) / chosen.sum(1).clamp(min=1)).mean()
