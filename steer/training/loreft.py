"""`loreft` (low-rank linear subspace finetuning): h + R^T (W h + b - R h), trained on the likelihood of completions.

Source: arXiv 2404.03592, equation 2, which edits the first and last few tokens of the prompt at several layers, each
with parameters of its own: AdamW, lr 9e-4, linear, rank 4 to 32. Here every token but the BOS is edited unless `scope`
says another. The map starts at W = R, b = 0, which changes nothing.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.edits import Edit, LoReFTEdit
from steersman.steer.edits.file import EditSet
from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.examples import Examples, ExamplesLike
from steersman.steer.training.edit_method import EditMethod, edit_set
from steersman.steer.training.loop import TrainEditConfig, train_edit
from steersman.steer.training.losses import Likelihood

CONFIG = TrainEditConfig(lr=9e-4, epochs=3, batch_size=8, schedule="linear", warmup=100)


def loreft(
    lm: LanguageModel,
    completions: ExamplesLike,
    *,
    hook: HookName | Sequence[HookName],
    rank: int = 4,
    scope: str = "all",
    config: TrainEditConfig = CONFIG,
) -> EditSet:
    """Train the map at each hook point on (prompt, answer) pairs or texts."""
    hooks = lm.resolve_hooks(hook)
    parts = ("rotation", "weight", "bias")
    start = {name: LoReFTEdit.start(lm.hook_width(name), rank, config.seed).parameters() for name in hooks}
    parameters = {f"{part} {name}": start[name][part] for name in hooks for part in parts}

    def build(p: Mapping[str, Tensor]) -> dict[str, Edit]:
        return {name: LoReFTEdit(*(p[f"{part} {name}"] for part in parts)) for name in hooks}

    found = train_edit(lm, parameters, build, Likelihood(completions), scope=scope, config=config)
    return edit_set(lm, "loreft", "arXiv 2404.03592", found, scope, rank=rank)


class LoReFT(EditMethod):
    """A low-rank map trained on completions."""

    name = "loreft"
    source = "arXiv 2404.03592"
    defaults = CONFIG

    def train(self, lm: LanguageModel, examples: Examples, hooks: list[str], config: ContrastConfig) -> EditSet:
        return loreft(lm, examples.positive, hook=hooks, rank=config.rank, config=self.settings(config))
