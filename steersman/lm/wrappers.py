"""What stands around or inside a transformers model: torch.compile, PEFT, data parallelism, gradient checkpointing.

Hooks run on the model itself, and only where its code is run as it is written: what torch.compile made of a model
before a hook was attached knows nothing of the hook.
"""

import sys
import threading
from typing import Any

import torch
from torch import nn

from steersman.errors import SteersmanError
from steersman.lm.unwinding import Unwinding

OWN_FORWARD = ("XLORA", "POLY")
"""PEFT methods whose wrapper does more in a pass than the model with its adapters inside."""


def innermost(model: nn.Module) -> Any:
    """The transformers model inside the wrappers of torch.compile, PEFT and data parallelism.

    Raises SteersmanError for PEFT methods that are more than adapters inside the model.
    """
    while isinstance(model, nn.Module):
        if isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        elif hasattr(type(model), "get_base_model"):
            _check_adapters(model)
            model = model.get_base_model()  # pyright: ignore[reportCallIssue]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            break
    return model


def _check_adapters(model: Any) -> None:
    config = getattr(model, "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", "")
    if getattr(config, "is_prompt_learning", False):
        raise SteersmanError(
            f"PEFT's {kind} puts virtual tokens before the text, which have no position of their own here: only "
            "adapters inside the model (LoRA and its kin) can be wrapped"
        )
    if kind in OWN_FORWARD or getattr(config, "alora_invocation_tokens", None):
        raise SteersmanError(f"PEFT's {kind} chooses its adapters per pass: merge them, or use plain LoRA")


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has a hand in `model` or a module of it."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        m._compiled_call_impl is not None
        or "_orig_mod" in m._modules
        or hasattr(m.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for m in model.modules()
    )


def recomputes(model: nn.Module) -> bool:
    """Whether a pass with gradients would run blocks a second time in `backward`."""
    if not (model.training and torch.is_grad_enabled()):
        return False
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())


class _Eager:
    """Runs compiled code as it is written while anyone holds it; the stance of the process changes, not the model's."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holders: set[int] = set()
        self._stance: Any = None

    def hold(self, stack: Unwinding) -> None:
        """Until the stack unwinds."""
        stack.undo(self._release, id(stack))
        with Unwinding() as held:
            held.enter_context(self._lock)
            self._holders.add(id(stack))
            if self._stance is None:
                self._stance = torch.compiler.set_stance("force_eager")

    def _release(self, holder: int) -> None:
        with Unwinding() as held:
            held.enter_context(self._lock)
            self._holders.discard(holder)
            if not self._holders and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


eager = _Eager()
"""The one holder of the process."""
