"""What stands in the place of a model's own methods while edits are open.

The `owner` of each is the clock that put it there.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm.attached import StandIn
from steersman.lm.unwinding import Unwinding


class NotedGenerate(StandIn):
    """`generate`, noting the prompt: without a cache no single pass can tell prompt from generated text."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        clock = self.owner
        if not clock._handles:
            return self.method(*args, **kwargs)
        if hasattr(getattr(clock.model, "generation_config", None), "disable_compile"):
            kwargs.setdefault("disable_compile", True)
        with Unwinding() as stack:
            run, passes = clock.begin_run(args, kwargs, stack), clock.state.passes
            out = self.method(*args, **kwargs)
            if run.passes == 0:
                clock.check_seen(passes)
            return out


class NotedInputs(StandIn):
    """`prepare_inputs_for_generation`, noting all tokens so far: beams change places between passes."""

    def __init__(self, owner: Any, model: nn.Module, name: str) -> None:
        super().__init__(owner, model, name)
        self.__signature__ = inspect.signature(self.method)  # generate looks at it

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.owner.state.runs:
            self.owner.state.runs[-1].history = input_ids
        return self.method(input_ids, *args, **kwargs)


class NoContinuousBatching(StandIn):
    """`init_continuous_batching`: its passes pack many requests into one row, in a thread of their own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner._handles:
            return self.method(*args, **kwargs)
        raise SteersmanError(
            "continuous batching packs many requests into one row and cannot be steered: use generate with a batch, "
            "or serve without continuous batching"
        )


STAND_INS: dict[str, type[StandIn]] = {
    "generate": NotedGenerate,
    "prepare_inputs_for_generation": NotedInputs,
    "init_continuous_batching": NoContinuousBatching,
}
