"""One pass over a few tokens that changes nothing: for what is measured on a model rather than read from its names.

Users' own hooks do not run in it, edits of this library stand aside, dropout is off, and random generators, gradients
and the modules' modes are afterwards what they were.
"""

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steersman.lm.unwinding import Unwinding
from steersman.lm.wrappers import eager, is_compiled

ROWS, TOKENS = 2, 5
"""Rows and tokens of the pass: few, and different, so that axes that changed places show."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FRAMEWORKS = ("torch.", "transformers.", "accelerate.", "deepspeed.", "peft.", "steersman.")
_state = threading.local()


def running() -> bool:
    """Whether this thread is inside a `probe`: readers and edits of this library leave its tensors alone."""
    return getattr(_state, "probing", False)


@torch.no_grad()
def probe(model: nn.Module, attach: Callable[[], list[Any]]) -> None:
    """Run `model` on ROWS x TOKENS token ids with the hooks that `attach()` registers (it returns their handles).

    Whatever the model raises comes through.
    """
    weight = next((p for p in model.parameters() if p.device.type != "meta"), torch.empty(0))
    forward: Any = model.forward
    accepted = inspect.signature(forward).parameters
    vocab = int(getattr(getattr(model, "config", None).get_text_config(), "vocab_size", 0) or 2)  # pyright: ignore[reportOptionalMemberAccess]
    ids = (torch.arange(ROWS * TOKENS) * 7 + 5).remainder(vocab).view(ROWS, TOKENS)
    inputs: dict[str, Any] = {"input_ids": ids.to(_entry_device(model, weight.device))}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    with Unwinding() as stack:
        stack.enter_context(_aside(model))
        stack.enter_context(torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []))
        if is_compiled(model):
            eager.hold(stack)
        for handle in attach():
            stack.callback(handle.remove)
        forward(**inputs)  # not model(...): hooks on the whole model, a pass clock among them, stay out of it


def _entry_device(model: nn.Module, default: torch.device) -> torch.device:
    find = getattr(model, "get_input_embeddings", None)
    return default if find is None else module_device(find(), default)


def module_device(module: Any, default: torch.device) -> torch.device:
    """Where a module computes: of weights that accelerate keeps elsewhere, the device it brings them to."""
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    weight = getattr(module, "weight", None)
    return weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else default


@contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and only the frameworks' hooks on the modules."""
    modes, hooks = [], []
    for module in model.modules():
        if module.training:
            modes.append(module)
            module.training = False
        for name in _HOOKS:
            given = module.__dict__.get(name)
            if given and not all(map(_of_a_framework, given.values())):
                hooks.append((module, name, given))
                # another dictionary in its place: a pass in another thread may be reading this one
                kept = OrderedDict((key, hook) for key, hook in given.items() if _of_a_framework(hook))
                module.__dict__[name] = kept
    outer, _state.probing = running(), True
    try:
        yield
    finally:
        _state.probing = outer
        for module in modes:
            module.training = True
        for module, name, given in hooks:
            module.__dict__[name] = given


def _of_a_framework(hook: Any) -> bool:
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__module__", "") or type(hook).__module__).startswith(_FRAMEWORKS)


def states_of(value: Any, width: int | None = None) -> Tensor | None:
    """The [ROWS, TOKENS, D] hidden states that a module was given or returned, where it is such; D is `width`."""
    x = value[0] if isinstance(value, tuple | list) and value else value
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if x.ndim == 2 and x.shape[0] == ROWS * TOKENS:
        x = x.view(ROWS, TOKENS, -1)  # OPT folds batch and sequence together
    return x if x.ndim == 3 and x.shape[:2] == (ROWS, TOKENS) and width in (None, x.shape[2]) else None


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module is given first, by place or as `hidden_states`."""
    return args[0] if args else kwargs.get(first_keyword(kwargs))


def first_keyword(kwargs: dict[str, Any]) -> str:
    """The keyword under which a module is given its input: `hidden_states`, else that of its first tensor of floats."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    floats = (name for name, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2)
    return next(floats, "hidden_states")
