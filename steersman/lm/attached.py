"""What is put on a model while something steers or reads it, and what becomes of it when the model is copied.

Hooks and replaced methods are on the model for as long as a context is open. A copy that is made meanwhile, or a
pickle, is a plain model: nothing in it refers to the model it was made from.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from torch import nn


class Hook:
    """A hook of this library on a module. In a copy of the module, or a pickle, it is one that does nothing."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    def __reduce__(self) -> Any:
        return Hook, (_nothing,)


def _nothing(*_args: Any) -> None:
    return None


class StandIn:
    """Stands on the model in the place of one of its methods while edits are open; a copy has the method again."""

    def __init__(self, owner: Any, model: nn.Module, name: str) -> None:
        self.owner, self.model, self.name = owner, model, name
        self.before = model.__dict__.get(name)
        self.method = getattr(model, name)

    def __reduce__(self) -> Any:
        return _method, (self.model, self.name)


def _method(model: nn.Module, name: str) -> MethodType:
    return MethodType(getattr(type(model), name), model)


def remove_stand_ins(model: nn.Module, name: str, gone: Callable[[StandIn], bool]) -> None:
    """Give the model back the method that the stand-ins, as far as they are `gone`, stand before."""
    found = kept = model.__dict__.get(name)
    while isinstance(kept, StandIn) and gone(kept):
        kept = kept.before
    if kept is None:
        model.__dict__.pop(name, None)
    elif kept is not found:
        model.__dict__[name] = kept


def without_hooks(model: nn.Module, methods: Iterable[str]) -> None:
    """Take what a copy of a steered model has left of its hooks, and of stand-ins for `methods`, off it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [i for i, hook in hooks.items() if isinstance(hook, Hook) and hook.fn is _nothing]:
                del hooks[number]
    for name in methods:
        found = model.__dict__.get(name)
        if isinstance(found, MethodType) and found.__func__ is getattr(type(model), name, None):
            del model.__dict__[name]
