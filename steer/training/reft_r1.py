"""`reft_r1` (rank-1 representation finetuning): a unit direction that both detects a concept and steers towards it.

In training a_i = relu(h_i . v) at every token but the BOS, c = the mean of the k = 8 largest a of the text, and
h_i + c v everywhere; loss = NLL of the completions + (share of the run done) 0.005 mean of the a outside the k largest.
v has norm 1: the gradient's part along v is taken out before each step, and v is normalised after it. Source: arXiv
2501.17148 (AxBench) and its code: AdamW without decay, lr 0.01, batches of 6, 3 epochs, falling linearly, clip 1,
0.01 in every entry of v at first. Negative examples, where there are some, are completions without the concept.

At test the gate is gone: h + scale m v, with m the largest activation on the positive examples (`max_act` in the
notes), so scale 1 is as strong as the concept ever is. Traps of the published code that are not here: v is not of unit
length after its last step; padding may be among the k largest; equal entries at first are the direction (1, ..., 1),
whatever the model. A start whose push is wrong is turned until no token activates it, where there is no gradient any
more: here v starts half-way between the mean state of the positives, less that of the negatives where there are some,
and what raises the positives' likelihood. (In a model whose states share a large mean, that mean alone opens the gate
everywhere, and tells nothing apart.) Detection reads the same v: see `detection`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.steer.edits import Edit, VectorEdit, blend
from steersman.steer.methods.base import ContrastConfig, Made
from steersman.steer.methods.examples import Examples
from steersman.steer.methods.moments import RunningMean
from steersman.steer.methods.reading import Reader
from steersman.steer.training.loop import TrainedEdit, gradient, train_edit
from steersman.steer.training.losses import Likelihood
from steersman.steer.training.settings import AXBENCH
from steersman.steer.training.vector_method import TrainedMethod, largest_activations

TOP, SPARSITY = 8, 0.005


class TopMeanEdit(Edit):
    """h + c v with c [B] the mean of the `top` largest relu(h . v) among the steered tokens of each text of the pass.

    For training alone: c is of a whole text, which a decoding step does not see. `outside` is the mean of the
    activations beside the `top`, of the last pass.
    """

    def __init__(self, v: Tensor, top: int = TOP) -> None:
        self.v, self.top = v, top
        self.outside = v.new_zeros(())

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        mask = fwd.real if isinstance(where, bool) else where
        a = (h.float() @ self.v).relu() * mask
        k = min(self.top, a.shape[1])
        count = mask.sum(1).clamp(min=1)
        largest = a.topk(k, dim=1).values
        c = largest.sum(1) / count.clamp(max=k)
        beside = (count - k).clamp(min=0)
        self.outside = (a.sum(1) - largest.sum(1)).sum() / beside.sum().clamp(min=1)
        return blend(h, h + (c[:, None, None] * self.v).to(h.dtype), mask)


def _outside(edits: Mapping[str, Edit], done: float) -> Tensor:
    """The penalty: activations beside the largest, more and more as training goes on."""
    each = [edit.outside for edit in edits.values() if isinstance(edit, TopMeanEdit)]
    return SPARSITY * done * torch.stack(each).sum()


class ReFTR1(TrainedMethod):
    """A unit direction that detects and steers, trained with a ReLU gate."""

    name = "reft_r1"
    source = "arXiv 2501.17148"
    needs_negative = False
    defaults = AXBENCH

    def train(self, lm: LanguageModel, examples: Examples, hooks: list[str], config: ContrastConfig) -> TrainedEdit:
        return train_edit(
            lm,
            self._start(lm, examples, hooks, config),
            lambda p: {hook: TopMeanEdit(v) for hook, v in p.items()},
            Likelihood([*examples.positive, *examples.negative]),
            unit=hooks,
            penalty=_outside,
            config=self.settings(config),
        )

    @staticmethod
    def _start(lm: LanguageModel, examples: Examples, hooks: list[str], config: ContrastConfig) -> dict[str, Tensor]:
        """At each hook point between the difference of the means (the mean state of the positive examples where there
        are no negative ones), which opens the gate, and the direction that raises their likelihood."""
        reader = Reader(lm, hooks, positions="all", batch_size=config.batch_size, max_length=config.max_length)
        means = {hook: (RunningMean(), RunningMean()) for hook in hooks}
        for batch in reader.samples(examples, "sides"):
            for hook, (plus, minus) in means.items():
                part = batch.at(hook)
                plus.add(part.x[part.positive])
                minus.add(part.x[~part.positive])
        opens = {
            hook: (plus.mean - minus.mean if minus.n else plus.mean).float() for hook, (plus, minus) in means.items()
        }
        uphill = gradient(
            lm,
            {hook: torch.zeros(lm.hook_width(hook)) for hook in hooks},
            lambda p: {hook: VectorEdit(v) for hook, v in p.items()},
            Likelihood(examples.positive),
            batch_size=config.batch_size,
        )
        return {hook: normalize(opens[hook], dim=0) - normalize(uphill[hook], dim=0) for hook in hooks}

    def made(
        self,
        lm: LanguageModel,
        examples: Examples,
        directions: dict[str, Tensor],
        found: TrainedEdit,
        config: ContrastConfig,
    ) -> Made:
        largest = largest_activations(lm, examples, directions, config)
        for hook, most in largest.items():
            if not most > 0:
                raise SteersmanError(f"reft_r1 found no direction at {hook} that the positive examples activate")
        scaled = {hook: largest[hook] * v / v.norm() for hook, v in directions.items()}
        return Made(directions=scaled, notes={**found.notes(), "max_act": largest})
