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
the sublayer (Gemma 2 and 3, OLMo 2) they are read after that norm, and `resid_pre + attn_out = resid_mid`,
`resid_mid + mlp_out = resid_post` wherever a block is a sum. (A block that normalises the sum itself, as BERT's does,
is none; its `hook_resid_post` is the block's output all the same, and it has no `hook_resid_mid`, as a block has none
whose attention and MLP both read `hook_resid_pre`.) A mixture of experts has no `mlp.hook_post`.
"""

import copy
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import total_ordering
from typing import Any

import torch
from torch import Tensor, nn

from steersman.errors import SteersmanError, near_names
from steersman.lm.layout import Tap, block_parts, find_blocks, submodule

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
SPLIT_KINDS = ("hook_attn_mask", "hook_z", "hook_mlp_post")
"""Kinds of which a rank of a tensor-parallel model holds its own heads or neurons only."""
MASKED_ATTENTION = ("eager", "sdpa")
"""Implementations of attention that add whatever mask they are given."""

Reader = Callable[[Tensor], Tensor | None]
HookName = str | int
"""A hook point's name, the path of a module, or the number of a layer (-1 is the last): what its block returns."""


class _SharedHook:
    """The one hook of a STREAM hook point: it stands before all others on its module and calls its readers in order.

    The block keeps the tensor that it hands to the module, to add to it later, so the stream is changed by writing into
    that tensor, a sum just formed that nothing else refers to. The readers are given a copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.readers: list[Reader] = []
        self._handle: Any = None

    def add(self, fn: Reader) -> "_SharedHook.Handle":
        if not self.readers:
            self._handle = self.module.register_forward_pre_hook(self._run, with_kwargs=True, prepend=True)
        self.readers.append(fn)
        return self.Handle(self, fn)

    def _run(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        for fn in tuple(self.readers):
            new = fn(h.clone())
            if new is not None:
                h.copy_(new)

    class Handle:
        """Takes one reader away, and the hook with the last."""

        def __init__(self, shared: "_SharedHook", fn: Reader) -> None:
            self.shared, self.fn = shared, fn

        def remove(self) -> None:
            self.shared.readers.remove(self.fn)
            if not self.shared.readers:
                self.shared._handle.remove()


@total_ordering
@dataclass(frozen=True, kw_only=True, eq=False)
class HookPoint:
    """One place in the model where a tensor can be read or replaced. `a < b`: a is reached earlier in the pass."""

    name: str
    """Canonical name, such as `blocks.2.hook_resid_post`."""
    layer: int
    """Index of the block, from 0; the number of blocks for `logits`."""
    kind: str
    """One of `KINDS`, or `logits`."""
    order: int
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
    _shared: _SharedHook | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HookPoint) and (self.layer, self.order) == (other.layer, other.order)

    def __lt__(self, other: "HookPoint") -> bool:
        return (self.layer, self.order) < (other.layer, other.order)

    def __hash__(self) -> int:
        return hash((self.layer, self.order))

    @property
    def holds_states(self) -> bool:
        """Whether it holds hidden states, one vector for each token: all but attention masks and logits do."""
        return self.kind not in ("hook_attn_mask", LOGITS)

    def attach(self, fn: Reader, past: Callable[[], int] = lambda: 0) -> Any:
        """Call `fn(h)` in every pass; a returned tensor replaces h. Returns the handle that removes the hook.

        `past()` is the number of tokens in the KV cache, asked for where a mask has to be made.
        """
        if self.tap is Tap.STREAM:
            assert self._shared is not None
            return self._shared.add(fn)
        if self.tap is Tap.INPUT:
            return self.module.register_forward_pre_hook(_input_hook(fn), with_kwargs=True)
        if self.tap is Tap.KWARG:
            return self.module.register_forward_pre_hook(_mask_hook(fn, self.width, past), with_kwargs=True)
        return self.module.register_forward_hook(_logits_hook(fn) if self.tap is Tap.LOGITS else _output_hook(fn))


def _input_hook(fn: Reader) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = fn(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

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
    if given is None:
        given = torch.ones(S, past + S, dtype=torch.bool, device=x.device)
        given = (given.tril(past) if causal else given)[None, None]
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


class HookMap:
    """All hook points of one model, by canonical name and by module path. `config` is the text model's."""

    def __init__(self, model: nn.Module, config: Any, blocks: str | None = None) -> None:
        self.path, self.blocks = find_blocks(model, getattr(config, "num_hidden_layers", None), blocks)
        self.points: dict[str, HookPoint] = {}
        self._by_path: dict[str, str] = {}
        kinds = list(KINDS)
        for layer, block in enumerate(self.blocks):
            for kind, (within, tap) in block_parts(block).items():
                module = submodule(block, within)
                assert module is not None
                name, shape = KINDS[kind]
                path = f"{self.path}.{layer}.{within}".rstrip(".")
                point = HookPoint(
                    name=f"blocks.{layer}.{name}",
                    layer=layer,
                    kind=kind,
                    order=kinds.index(kind),
                    path=path,
                    module=module,
                    tap=tap,
                    shape=shape,
                    width=_width(kind, module, config),
                    _shared=_SharedHook(module) if tap is Tap.STREAM else None,
                )
                self.points[point.name] = point
                if tap is Tap.OUTPUT:
                    self._by_path[path] = point.name  # a module's path means its output
        head = _output_layer(model)
        if head is not None:
            self.points[LOGITS] = HookPoint(
                name=LOGITS,
                layer=len(self.blocks),
                kind=LOGITS,
                order=0,
                path="",
                module=model,
                tap=Tap.LOGITS,
                shape="B S V",
                width=int(getattr(config, "vocab_size", None) or _fan_out(head)),
            )

    def resolve(self, name: HookName) -> HookPoint:
        """The hook point called `name`: a name of this file's table, the path of a module (from the model or any
        depth), which means what the module returns, or a layer's number, which means what its block returns.

        Raises SteersmanError: a layer out of range names the number of layers, a kind that the model's blocks do not
        have names those they have, anything else unknown the nearest names.
        """
        n = len(self.blocks)
        if (layer := layer_number(name)) is not None:
            if not -n <= layer < n:
                raise SteersmanError(
                    f"there is no layer {layer}: the model has {n} layers, 0 to {n - 1} (or -1, the last, to {-n})"
                )
            return self.points[f"blocks.{layer % n}.hook_resid_post"]
        if not isinstance(name, str):
            raise SteersmanError(f"a hook point is named by a string or by a layer's number, got {name!r}")
        if name in self.points:
            return self.points[name]
        number = re.fullmatch(r"(?:.*\.)?(?:blocks|layers|layer|h|block)\.(-?\d+)(?:\.(.+))?", name)
        if number is not None and not 0 <= int(number[1]) < n:
            raise SteersmanError(
                f"hook point {name!r}: there is no layer {number[1]}, the model has {n} layers (0 to {n - 1})"
            )
        if number is not None and name.startswith("blocks."):
            kind = next((kind for kind, (own, _) in KINDS.items() if number[2] in (kind, own)), None)
            if kind is not None:
                return self._of_kind(int(number[1]), kind)
        stem = self.path.split(".")
        for depth in range(len(stem)):
            # `model.layers.6`, `layers.6` and, when the list is called otherwise, the plain `layers.6` all work.
            prefix = ".".join(stem[:depth])
            candidate = f"{prefix}.{name}" if prefix else name
            if candidate in self._by_path:
                return self.points[self._by_path[candidate]]
        plain = re.fullmatch(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.(\d+)", name)
        if plain is not None:
            return self.points[f"blocks.{plain[1]}.hook_resid_post"]
        raise SteersmanError(f"unknown hook point {name!r}; near names: {near_names(name, list(self.points))}")

    def _of_kind(self, layer: int, kind: str) -> HookPoint:
        stem = f"blocks.{layer}."
        point = self.points.get(stem + KINDS[kind][0])
        if point is None:
            own = ", ".join(name.removeprefix(stem) for name in self.points if name.startswith(stem))
            raise SteersmanError(f"block {layer} of this model has no {kind}; it has {own}")
        return point


def _output_layer(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def _width(kind: str, module: nn.Module, config: Any) -> int:
    if kind in ("hook_z", "hook_mlp_post"):
        return _fan_in(module)
    return int(config.num_attention_heads if kind == "hook_attn_mask" else config.hidden_size)


def _fan_in(projection: nn.Module) -> int:
    """Entries that a projection reads. GPT-2's Conv1D keeps its weight the other way round, quantised ones packed."""
    if hasattr(projection, "in_features"):
        return int(projection.in_features)  # pyright: ignore[reportArgumentType]
    return int(projection.weight.shape[0])  # pyright: ignore[reportIndexIssue, reportArgumentType]


def _fan_out(head: nn.Module) -> int:
    return int(getattr(head, "out_features", None) or head.weight.shape[0])  # pyright: ignore[reportIndexIssue, reportArgumentType]
