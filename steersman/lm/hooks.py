"""Hook points of a transformers model: where they are, what they are called, how a state is read and replaced.

Names follow TransformerLens: `blocks.6.hook_resid_post` is the output of block 6. `hook_attn_out` and `hook_mlp_out`
are what a block adds to the residual stream, so for families that normalise after the sublayer (Gemma 2 and 3, OLMo 2)
they are read after that norm, and `resid_pre + attn_out + mlp_out = resid_post` wherever a block is a sum. (A block
that normalises the sum itself, as BERT's does, is none; its `hook_resid_post` is the block's output all the same.)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steersman.errors import SteersmanError, near_names

KINDS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")

# Tried in this order: the nested (multimodal) paths first, because their models hold a vision tower's blocks as well.
KNOWN_BLOCK_PATHS = (
    "model.language_model.layers",
    "language_model.model.layers",
    "language_model.layers",
    "model.decoder.layers",
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "transformer.blocks",
    "transformer.layers",
    "bert.encoder.layer",
    "esm.encoder.layer",
    "roberta.encoder.layer",
    "electra.encoder.layer",
    "distilbert.transformer.layer",
    "transformer.layer",
    "encoder.layer",
    "decoder.layers",
    "layers",
    "h",
)

# (what the block must have, submodule whose output the attention adds, submodule whose output the MLP adds)
SUBLAYER_LAYOUTS = (
    ("post_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma 2, 3, OLMo 2
    ("post_mlp_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM-4
    ("attention.output.dense", "attention.output.dense", "output.dense"),  # BERT, ESM: before the input is added
    (
        "self_attention.query_key_value/mlp.dense_4h_to_h/mlp.gelu_impl",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),  # BLOOM
)
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")


@dataclass(frozen=True, kw_only=True)
class HookPoint:
    """One place in the model where a hidden state [B, S, D] can be read or replaced."""

    name: str
    """TransformerLens name, such as `blocks.2.hook_resid_post`."""
    layer: int
    """Index of the block, from 0."""
    kind: str
    """One of `KINDS`."""
    path: str
    """Module path inside the model, such as `model.layers.2.mlp`."""
    module: nn.Module
    """The module whose input (`hook_resid_pre`) or output (the others) it is."""

    def attach(self, fn: Callable[[Tensor], Tensor | None]) -> Any:
        """Call `fn(h)` in every pass; a returned tensor replaces h. Returns the handle that removes the hook."""
        if self.kind == "hook_resid_pre":
            return self.module.register_forward_pre_hook(_input_hook(fn), with_kwargs=True)
        return self.module.register_forward_hook(_output_hook(fn))


def _input_hook(fn: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = fn(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _output_hook(fn: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        # Most blocks return a tensor in transformers 5, and `output[0]` of that would be batch row 0.
        if not isinstance(output, tuple | list):
            return fn(output)
        new = fn(output[0])
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else [new, *output[1:]]

    return hook


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        root = getattr(root, part, None)  # pyright: ignore[reportAssignmentType]
        if not isinstance(root, nn.Module):
            return None
    return root


def find_blocks(model: nn.Module, n_layers: int | None = None, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The transformer blocks of `model`, as (module path, list).

    An explicit `path` wins; then the known paths; then the only ModuleList of length `n_layers`. `n_layers` is the
    configuration's `num_hidden_layers`. Raises SteersmanError listing the candidates when there is no single answer.

    >>> from torch import nn
    >>> toy = nn.Module(); toy.trunk = nn.ModuleList([nn.Identity(), nn.Identity()])
    >>> find_blocks(toy, n_layers=2)[0]
    'trunk'
    """
    if path is not None:
        found = _submodule(model, path)
        if not isinstance(found, nn.ModuleList):
            raise SteersmanError(f"blocks={path!r} is not a ModuleList of {type(model).__name__}; {_candidates(model)}")
        return path, found
    for known in KNOWN_BLOCK_PATHS:
        found = _submodule(model, known)
        if isinstance(found, nn.ModuleList) and len(found) > 0 and n_layers in (None, len(found)):
            return known, found
    lists = {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers}
    if len(lists) == 1:
        return next(iter(lists.items()))
    raise SteersmanError(
        f"cannot tell which modules of {type(model).__name__} are its {n_layers} blocks; {_candidates(model)}; "
        "name them with blocks='path.to.list'"
    )


def _candidates(model: nn.Module) -> str:
    lists = [f"{p} ({len(m)})" for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return "its module lists are " + (", ".join(lists) if lists else "none")


def sublayer_paths(block: nn.Module) -> dict[str, str]:
    """Submodule paths, relative to `block`, whose outputs are what attention and MLP add to the residual stream."""
    for marks, attention, mlp in SUBLAYER_LAYOUTS:
        if all(_submodule(block, mark) is not None for mark in marks.split("/")):
            return {"hook_attn_out": attention, "hook_mlp_out": mlp}
    paths = {}
    for kind, names in (("hook_attn_out", ATTENTION_NAMES), ("hook_mlp_out", MLP_NAMES)):
        for name in names:
            if _submodule(block, name) is not None:
                paths[kind] = name
                break
    return paths


class HookMap:
    """All hook points of one model, by TransformerLens name and by module path."""

    def __init__(self, model: nn.Module, n_layers: int | None = None, blocks: str | None = None) -> None:
        self.path, self.blocks = find_blocks(model, n_layers, blocks)
        self.points: dict[str, HookPoint] = {}
        self._by_path: dict[str, str] = {}
        for layer, block in enumerate(self.blocks):
            where = f"{self.path}.{layer}"
            sub = sublayer_paths(block)
            for kind in KINDS:
                if kind in sub:
                    path, module = f"{where}.{sub[kind]}", _submodule(block, sub[kind])
                elif kind.startswith("hook_resid"):
                    path, module = where, block
                else:
                    continue
                assert module is not None
                name = f"blocks.{layer}.{kind}"
                self.points[name] = HookPoint(name=name, layer=layer, kind=kind, path=path, module=module)
                self._by_path[path] = name  # resid_post comes after resid_pre: a block's path means its output

    def resolve(self, name: str) -> HookPoint:
        """The hook point called `name`: a TransformerLens name, or the path of a module (from the model or any depth).

        Raises SteersmanError: a layer out of range names the number of layers, anything else unknown the nearest names.
        """
        if name in self.points:
            return self.points[name]
        n = len(self.blocks)
        number = re.fullmatch(r"(?:.*\.)?(?:blocks|layers|layer|h|block)\.(-?\d+)(\..+)?", name)
        if number is not None and not 0 <= int(number[1]) < n:
            raise SteersmanError(
                f"hook point {name!r}: there is no layer {number[1]}, the model has {n} layers (0 to {n - 1})"
            )
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
