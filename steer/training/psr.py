"""`psr` (prompt steering replacement): a gated vector that does what an instruction in the prompt does.

    h' = h + s relu(h . w + b) z, at one layer (S-PSR) or at every layer (A-PSR), w, b, z trained

to give the states of the PROMPTED model on its own answers (`Imitation`, over the edited and all later blocks), or its
answers' likelihood (`loss="likelihood"`). Source: arXiv 2605.03907; its answers are filtered by a judge, which also
gives each a soft label in [0, 1]: that is `Imitated.strength`, the s it is trained at. Its regulariser against gates
that never open is left out: here they open at the start.

The gate starts open (w = 0, b = 1) and z at zero, so that the first loss is the unsteered model's. A teacher that is
the prompted model can teach nothing that the prompt does not do, and one replication found the imitation below a
constant vector: compare with `ssv` on the same answers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.conversations import Document, answered, is_conversation, with_prefix
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.edits import DirectionEdit, Edit, Linear
from steersman.steer.edits.file import EditSet
from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.examples import Example, Examples
from steersman.steer.training.edit_method import EditMethod, edit_set
from steersman.steer.training.loop import TrainEditConfig, train_edit
from steersman.steer.training.losses import Imitated, Imitation, Likelihood, Loss

CONFIG = TrainEditConfig(lr=0.01, epochs=10, batch_size=8, schedule="linear", clip=1.0)


def psr(
    lm: LanguageModel,
    items: Sequence[Imitated],
    *,
    hook: HookName | Sequence[HookName],
    loss: Literal["imitation", "likelihood"] = "imitation",
    compare: Sequence[HookName] = (),
    teaching: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scope: str = "all",
    config: TrainEditConfig = CONFIG,
) -> EditSet:
    """Train the gated vector on answers of the prompted model, at one hook point (S-PSR) or several (A-PSR).

    `compare` names the hook points of the imitation, by default the last state of every block from the first edited one
    on; `teaching` opens what the teacher is steered by besides. The likelihood takes no prompts of token ids. The notes
    hold the losses, unsteered and trained. Raises SteersmanError for an unknown loss and items that it cannot use.
    """
    hooks = lm.resolve_hooks(hook)
    if loss == "imitation":
        first = min(lm.hook_layer(name) for name in hooks)
        points = list(compare) or [f"blocks.{i}.hook_resid_post" for i in range(first, lm.n_layers)]
        target: Loss = Imitation(items, points, teaching=teaching)
    elif loss == "likelihood":
        if not all(isinstance(item.prompt, str) or is_conversation(item.prompt) for item in items):
            raise SteersmanError("loss='likelihood' needs prompts that are texts or conversations, not token ids")
        target = Likelihood([Example(text=answered(i.prompt, i.answer), prompt=i.prompt) for i in items])
    else:
        raise SteersmanError(f"unknown loss {loss!r}: use imitation or likelihood")
    parameters: dict[str, Tensor] = {}
    for name in hooks:
        width = lm.hook_width(name)
        parameters |= {f"w {name}": torch.zeros(width), f"b {name}": torch.ones(1), f"z {name}": torch.zeros(width)}

    def build(p: Mapping[str, Tensor]) -> dict[str, Edit]:
        reads = {name: Linear(p[f"w {name}"][None, None], p[f"b {name}"][None]) for name in hooks}
        return {name: DirectionEdit(reads[name], p[f"z {name}"], rule="probe") for name in hooks}

    found = train_edit(lm, parameters, build, target, scope=scope, config=config)
    return edit_set(lm, "psr", "arXiv 2605.03907", found, scope, loss_name=loss, n_answers=len(items))


def prompted_answers(
    lm: LanguageModel, prompts: Sequence[Document], instruction: str, *, batch_size: int = 16, **options: Any
) -> list[Imitated]:
    """What the model answers to `instruction` before each prompt, or as the system message of a conversation: items to
    train on. `options` as for `LanguageModel.generate`; an answer that comes out empty is left out."""
    items: list[Imitated] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        taught = [with_prefix(instruction, prompt) for prompt in part]
        made = lm.generate(taught, **options)
        items += [
            Imitated(prompt=prompt, teacher=teacher, answer=answer)
            for prompt, teacher, answer in zip(part, taught, made.completions)
            if answer.strip()
        ]
    if not items:
        raise SteersmanError("every answer of the prompted model is empty: nothing can be learnt from them")
    return items


class PSR(EditMethod):
    """A gated vector that imitates the prompted model."""

    name = "psr"
    source = "arXiv 2605.03907"
    defaults = CONFIG

    def check(self, examples: Examples, config: ContrastConfig) -> None:
        super().check(examples, config)
        Examples(positive=examples.positive, negative=[]).check_answers(self.name)
        if not config.instruction:
            raise SteersmanError("method 'psr' imitates the prompted model: give its instruction")

    def train(self, lm: LanguageModel, examples: Examples, hooks: list[str], config: ContrastConfig) -> EditSet:
        items = [
            Imitated(prompt=e.prompt, teacher=with_prefix(config.instruction, e.prompt), answer=e.answer)
            for e in examples.positive
        ]
        return psr(lm, items, hook=hooks, config=self.settings(config))
