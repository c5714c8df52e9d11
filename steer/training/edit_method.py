"""Trained edits that are no vectors, made from examples as vectors are: `steersman vector make --method loreft`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from steersman.config import merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.registry import Registry
from steersman.steer.edits.file import EditSet
from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.training.loop import TrainedEdit, TrainEditConfig
from steersman.steer.training.settings import loop_settings

EDIT_METHODS: Registry[type["EditMethod"]] = Registry("method")
"""Every way to make an edit from examples, by name."""


class EditMethod(ABC):
    """A way to train an edit from examples. A subclass is found by its `name`."""

    name: ClassVar[str]
    """What `method` calls it."""
    source: ClassVar[str]
    """Paper."""
    defaults: ClassVar[TrainEditConfig]
    """The loop as it runs by default; `lr`, `epochs`, `train_batch` and `seed` of the settings go over it."""

    def __init_subclass__(cls) -> None:
        EDIT_METHODS.register(cls, cls)

    def check(self, examples: Examples, config: ContrastConfig) -> None:
        """Raise SteersmanError for what cannot be made, as far as this can be known before a model is loaded."""
        if not examples.positive:
            raise SteersmanError("there are no positive examples")
        if config.positions is not None or config.table is not None:
            raise SteersmanError(f"method {self.name!r} reads the completions: leave out positions and table")
        self.settings(config)

    def settings(self, config: ContrastConfig) -> TrainEditConfig:
        """The loop's settings."""
        return loop_settings(self.defaults, config)

    @abstractmethod
    def train(self, lm: LanguageModel, examples: Examples, hooks: list[str], config: ContrastConfig) -> EditSet:
        """The edits, one at each hook point."""


def edit_from_examples(
    lm: LanguageModel,
    positive: ExamplesLike,
    negative: ExamplesLike = (),
    *,
    hook: HookName | Sequence[HookName],
    config: ContrastConfig | None = None,
    **settings: Any,
) -> EditSet:
    """Train an edit from examples, as `contrast` makes a vector: the settings are those of `ContrastConfig`, with one
    of `EDIT_METHODS` as `method`. Raises SteersmanError for an unknown method and examples that it cannot use."""
    config = merged(ContrastConfig, config, settings)
    made = EDIT_METHODS[config.method]()
    examples = Examples(positive=as_examples(positive, "positive"), negative=as_examples(negative, "negative"))
    made.check(examples, config)
    return made.train(lm, examples, lm.resolve_hooks(hook), config)


def edit_set(lm: LanguageModel, method: str, source: str, found: TrainedEdit, scope: str, **notes: Any) -> EditSet:
    """A trained edit with its provenance."""
    metadata: Mapping[str, Any] = {
        "source": source,
        "model_type": getattr(lm.config, "model_type", ""),
        **found.notes(),
        **notes,
    }
    return EditSet(edits=found.edits, scope=scope, model_name=lm.name, method=method, metadata=metadata)
