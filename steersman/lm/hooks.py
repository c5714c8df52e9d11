"""Hook points of a transformers model: what they are called, what they hold, how they are read and replaced.

In the order of the pass, for block i (B rows, S tokens, D width, H heads of width d, M neurons, K keys, V vocabulary):

| name | holds | shape |
|---|---|---|
| `blocks.i.hook_resid_pre` | the residual stream that the block reads | B S D |
| `blocks.i.hook_attn_in` | what the attention reads: after the norm, where one stands before it | B S D |
| `blocks.i.hook_attn_mask` | what the attention adds to its scores: 0 where a query may look, else very low | B H S K |
| `blocks.i.attn.hook_z` | the heads' outputs side by side, before the output projection mixes them | B S (H d) |
| `blocks.i.hook_attn_out` | what the attention adds to the stream | B S D |
| `blocks.i.hook_resid_mid` | the stream between attention and MLP | B S D |
| `blocks.i.hook_mlp_in` | what the MLP reads: after the norm, where one stands before it | B S D |
| `blocks.i.mlp.hook_post` | the neurons: what the MLP's last projection reads (after the gate) | B S M |
| `blocks.i.hook_mlp_out` | what the MLP adds to the stream | B S D |
| `blocks.i.hook_resid_post` | the block's output | B S D |
| `logits` | the model's output, after any soft-capping; of those tokens that the pass computes it for | B S V |

Names are TransformerLens's where it has one for the same tensor. Its `hook_attn_in` and `hook_mlp_in` stand before the
norm, ours behind it: what is there before is `hook_resid_pre` and `hook_resid_mid`. Its `ln1.hook_normalized` is no
alias, because the gain may or may not be in it. `blocks.i.hook_z` and `blocks.i.hook_mlp_post` are accepted as well.

`hook_attn_out` and `hook_mlp_out` are what a block adds to the residual stream, so for families that normalise after
the sublayer (Gemma 2 and 3, OLMo 2) they are read after that norm, and `resid_pre + attn_out = resid_mid`, `resid_mid +
mlp_out = resid_post` wherever a block is a sum. That is tried on the model before the names are used
(`steersman.lm.sums`): a factor that the block multiplies with (Granite) is applied, the module inside or behind is
taken where that is what is added (MPT), and where nothing fits the names are not offered, with the reason. (A block
that normalises the sum itself, as BERT's does, is none; its `hook_resid_post` is the block's output all the same, and
it has no `hook_resid_mid`, as a block has none whose attention and MLP both read `hook_resid_pre`.) A mixture of
experts has no `mlp.hook_post`.

The path of any module that runs once in a pass is a hook point too: what the module returns, by one of the names above
where that is the same tensor (`model.layers.3.mlp` of a Llama), else by the path itself (of a Gemma 2).
"""

import copy
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import total_ordering
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm import probe
from steersman.lm.attached import Hook
from steersman.lm.layout import Tap, find_blocks

__all__ = [
    "KINDS",
    "LOGITS",
    "MASKED_ATTENTION",
    "MODULE",
    "SPLIT_KINDS",
    "UNCHECKED",
    "HookName",
    "HookPoint",
    "additive_mask",
    "find_blocks",
    "layer_number",
    "several_hooks",
]

# kind -> (name within the block, shape), in the order of the pass
KINDS = {
    "hook_resid_pre": ("hook_resid_pre", "B S D"),
    "hook_attn_in": ("hook_attn_in", "B S D"),
    "hook_attn_mask": ("hook_attn_mask", "B H S K"),
    "hook_z": ("attn.hook_z", "B S (H d)"),
    "hook_attn_out": ("hook_attn_out", "B S D"),
    "hook_resid_mid": ("hook_resid_mid", "B S D"),
    "hook_mlp_in": ("hook_mlp_in", "B S D"),
    "hook_mlp_post": ("mlp.hook_post", "B S M"),
    "hook_mlp_out": ("hook_mlp_out", "B S D"),
    "hook_resid_post": ("hook_resid_post", "B S D"),
}
LOGITS = "logits"
MODULE = "module"
"""The kind of a hook point that is named by a module's path because no other name means the same tensor."""
UNCHECKED = ("hook_resid_pre", "hook_attn_mask", "hook_resid_post", LOGITS)
"""Kinds that mean what they say by construction; the others are tried on the model before their first use."""
SPLIT_KINDS = ("hook_attn_mask", "hook_z", "hook_mlp_post")
"""Kinds of which a rank of a tensor-parallel model holds its own heads or neurons only."""
MASKED_ATTENTION = ("eager", "sdpa")
"""Implementations of attention that add whatever mask they are given."""

Reader = Callable[[Tensor], Tensor | None]
HookName = str | int
"""A hook point's name, the path of a module, or the number of a layer (-1 is the last): what its block returns."""


class SharedHook:
    """The one hook of a STREAM hook point: it stands before all others on its module and calls its readers in order.

    The block keeps the tensor that it hands to the module, to add to it later, so the stream is changed by writing into
    that tensor, a sum just formed that nothing else refers to. The readers are given a copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.readers: list[Reader] = []
        self._handle: Any = None

    def add(self, fn: Reader) -> "SharedHook.Handle":
        if self._handle is None:
            self._handle = self.module.register_forward_pre_hook(Hook(self._run), with_kwargs=True, prepend=True)
        return self.readers.append(fn) or self.Handle(self, fn)

    def _run(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = probe.first_input(args, kwargs)
        for fn in tuple(self.readers):
            new = fn(h.clone())
            if new is not None:
                h.copy_(new)

    def discard(self, fn: Reader) -> None:
        """Take a reader away if it is there, and the hook with the last."""
        self.readers[:] = [other for other in self.readers if fn not in (other, getattr(other, "fn", None))]
        if not self.readers and self._handle is not None:
            self._handle.remove()
            self._handle = None

    class Handle(NamedTuple):
        """Takes one reader away."""

        shared: "SharedHook"
        fn: Reader

        def remove(self) -> None:
            self.shared.discard(self.fn)


@total_ordering
@dataclass(frozen=True, kw_only=True, eq=False)
class HookPoint:
    """One place in the model where a tensor can be read or replaced. `a < b`: a is reached earlier in the pass."""

    name: str
    """Canonical name, such as `blocks.2.hook_resid_post`."""
    layer: int
    """Index of the block, from 0; the number of blocks for `logits` and modules after them, -1 for modules before."""
    kind: str
    """One of `KINDS`, `logits`, or `module`."""
    order: float
    """Place within the block."""
    path: str
    """Module path inside the model, such as `model.layers.2.mlp`; empty for the model itself."""
    module: nn.Module
    """The module it is tapped at."""
    tap: Tap
    """Whether it is the module's input, output, ..."""
    shape: str
    """What it holds, in the letters of this file's table: `B S D`, `B S (H d)`, `B S M`, `B H S K`, `B S V`."""
    width: int
    """Entries of its last axis; of an attention mask, whose last axis grows with the text, its heads H."""
    factor: float = 1.0
    """What the block multiplies the module's output by: the hook point holds the product."""
    _shared: SharedHook | None = field(default=None, repr=False)

    @property
    def _place(self) -> tuple[float, float, str]:
        return self.layer, self.order, self.path if self.kind == MODULE else ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HookPoint) and self._place == other._place

    def __lt__(self, other: "HookPoint") -> bool:
        return self._place[:2] < other._place[:2]

    def __hash__(self) -> int:
        return hash(self._place)

    @property
    def holds_states(self) -> bool:
        """Whether it holds hidden states, one vector for each token: all but attention masks and logits do."""
        return self.kind not in ("hook_attn_mask", LOGITS)

    def attach(self, fn: Reader, past: Callable[[], int] = lambda: 0) -> Any:
        """Call `fn(h)` in every pass; a returned tensor replaces h. Returns the handle that removes the hook.

        `past()` is the number of tokens in the KV cache, asked for where a mask has to be made.
        """
        return self._attach(_Guarded(fn), past)

    def states(self, h: Any, batch: int, length: int) -> Tensor:
        """`h`, read here in a pass over [batch, length] tokens, as [batch, length, width]; masks and logits as they
        are. Raises SteersmanError for a tensor of another shape: the model keeps something else there.
        """
        if isinstance(h, Tensor):
            if h.ndim == 2 and h.shape[0] == batch * length:
                h = h.reshape(batch, length, -1)  # OPT folds batch and sequence together
            if not self.holds_states or h.shape == (batch, length, self.width):
                return h
        found = f"a tensor {tuple(h.shape)}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
        raise SteersmanError(
            f"{self.name} holds {found} in this model, not one state of width {self.width} for each of {batch} x "
            f"{length} tokens: it cannot be read or edited there"
        )

    def _attach(self, fn: Reader, past: Callable[[], int] = lambda: 0) -> Any:
        if self.factor != 1:
            fn = _scaled(fn, self.factor)
        if self.tap is Tap.STREAM:
            assert self._shared is not None
            return self._shared.add(fn)
        if self.tap is Tap.INPUT:
            return self.module.register_forward_pre_hook(Hook(_input_hook(fn)), with_kwargs=True)
        if self.tap is Tap.KWARG:
            return self.module.register_forward_pre_hook(Hook(_mask_hook(fn, self.width, past)), with_kwargs=True)
        hook = _logits_hook(fn) if self.tap is Tap.LOGITS else _output_hook(fn)
        return self.module.register_forward_hook(Hook(hook))

    def release(self, fn: Reader) -> None:
        """Take off what an interrupted `attach(fn)` may have left."""
        if self._shared is not None:
            self._shared.discard(fn)


class _Guarded:
    """A reader that stands aside while the model is probed."""

    def __init__(self, fn: Reader) -> None:
        self.fn = fn

    def __call__(self, h: Tensor) -> Tensor | None:
        return None if probe.running() else self.fn(h)


def _scaled(fn: Reader, factor: float) -> Reader:
    def run(h: Tensor) -> Tensor | None:
        new = fn(h * factor)
        return None if new is None else new / factor

    return run


def _input_hook(fn: Reader) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = "" if args else probe.first_keyword(kwargs)
        new = fn(args[0] if args else kwargs[name])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})

    return hook


def _output_hook(fn: Reader) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        # Most blocks return a tensor in transformers 5, and `output[0]` of that would be batch row 0.
        if not isinstance(output, tuple | list):
            return fn(output)
        new = fn(output[0])
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else [new, *output[1:]]

    return hook


def _logits_hook(fn: Reader) -> Callable[..., Any]:
    def hook(module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(getattr(output, "logits", None), Tensor):
            raise SteersmanError(
                f"{type(module).__name__} returned a {type(output).__name__} without logits: call it with return_dict"
            )
        new = fn(output.logits)
        if new is None:
            return None
        changed = copy.copy(output)
        changed.logits = new
        return changed

    return hook


def _mask_hook(fn: Reader, n_heads: int, past: Callable[[], int]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if probe.running():
            return None
        if "attention_mask" not in kwargs:
            raise SteersmanError(f"{type(module).__name__} is given no attention_mask by name: it cannot be edited")
        x = args[0] if args else kwargs["hidden_states"]
        causal = bool(getattr(module, "is_causal", True))
        new = fn(additive_mask(kwargs["attention_mask"], x, n_heads, past=past(), causal=causal))
        return None if new is None else (args, {**kwargs, "attention_mask": new})

    return hook


def additive_mask(given: Tensor | None, x: Tensor, n_heads: int, *, past: int = 0, causal: bool = True) -> Tensor:
    """The attention mask that `given` stands for, [B, H, S, K] in floats, for an input x [B, S, D].

    transformers gives eager attention such a mask, and sdpa one of bools (True: may look) or, where nothing is padded,
    none at all: every key so far, of `past` + S, if `causal`, else every key.

    >>> additive_mask(None, torch.zeros(1, 2, 4), 1, past=1).isfinite().all(), torch.finfo(torch.float32).min
    (tensor(True), -3.4028234663852886e+38)
    >>> additive_mask(None, torch.zeros(1, 2, 4), 1, past=1)[0, 0] == 0
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    B, S = x.shape[:2]
    if given is None and (S == 1 or not causal):
        given = torch.zeros(1, 1, S, past + S, dtype=x.dtype, device=x.device)
    elif given is None:
        given = torch.ones(S, past + S, dtype=torch.bool, device=x.device)
        given = given.tril(past)[None, None]
    if given.dtype == torch.bool:
        mask = torch.zeros(given.shape, dtype=x.dtype, device=given.device)
        given = mask.masked_fill_(~given, torch.finfo(x.dtype).min)
    return given.expand(B, n_heads, S, -1)


def layer_number(name: Any) -> int | None:
    """The number of the layer that `name` is, as a number or in digits; None for any other name.

    >>> layer_number(8), layer_number("-1"), layer_number("blocks.8.hook_resid_post"), layer_number(True)
    (8, -1, None, None)
    """
    if isinstance(name, str):
        return int(name) if re.fullmatch(r"-?\d{1,6}", name.strip()) else None
    if isinstance(name, bool) or not hasattr(name, "__index__"):
        return None
    return operator.index(name)


def several_hooks(names: Any) -> list[HookName]:
    """One hook point, or several, as a list.

    >>> several_hooks(8), several_hooks(["blocks.1.hook_resid_post", 2])
    ([8], ['blocks.1.hook_resid_post', 2])
    """
    if isinstance(names, str | int) or not isinstance(names, Iterable):
        return [names]
    return list(names)
