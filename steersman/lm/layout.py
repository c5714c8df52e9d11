"""Where the blocks of a transformers model are, and inside a block attention, MLP and what they read and write.

Found from the modules' names, never from the model's class, so that a family nobody has listed is understood when it is
built as its neighbours are. What a block does not have (neurons in a mixture of experts, a stream between attention and
MLP where the two run side by side) is left out.
"""

import inspect
from collections.abc import Iterable
from enum import Enum

from torch import nn

from steersman.errors import SteersmanError

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
    ("pre_mlp_layernorm/post_mlp_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),  # AFMoE
    ("attention.output.dense", "attention.output.dense", "output.dense"),  # BERT, ESM: before the input is added
    (
        "self_attention.query_key_value/mlp.dense_4h_to_h/mlp.gelu_impl",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),  # BLOOM
    ("attn.Wqkv/ffn.down_proj/norm_2", "attn", "ffn.down_proj"),  # MPT: its MLP adds the stream itself
)
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")

# The module that is given the heads' input and mask, inside what wraps it (BERT, GPT-Neo)
ATTENTION_PROPER = ("attention.self", "attn.attention", *ATTENTION_NAMES)
OUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "out_lin", "wo")
DOWN_PROJECTIONS = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "lin2", "w2")

# (what the block must have, the module whose input is the stream between attention and MLP)
MID_LAYOUTS = (
    ("pre_feedforward_layernorm", "pre_feedforward_layernorm"),  # Gemma 2, 3
    ("post_feedforward_layernorm/mlp", "mlp"),  # OLMo 2, 3: the MLP reads the stream itself
    ("pre_mlp_layernorm", "pre_mlp_layernorm"),  # AFMoE
    ("attention.LayerNorm", "LayerNorm"),  # ESM
    ("attention.output.LayerNorm", ""),  # BERT normalises the sum: there is no such stream
    ("post_attention_layernorm", "post_attention_layernorm"),  # Llama and its kin, NeoX, BLOOM, Falcon, GLM-4
    ("ln_2", "ln_2"),  # GPT-2 and its kin
    ("norm_2", "norm_2"),  # MPT
    ("fc1/self_attn_layer_norm/final_layer_norm", "final_layer_norm"),  # OPT
)


class Tap(Enum):
    """Where at its module a hook point is read and replaced."""

    INPUT = "input"
    """The module's first argument."""
    STREAM = "stream"
    """The module's first argument, which the block keeps to add to as well: replaced for both."""
    OUTPUT = "output"
    """What the module returns (the first entry of a tuple)."""
    KWARG = "kwarg"
    """The module's keyword argument `attention_mask`."""
    LOGITS = "logits"
    """`logits` of what the whole model returns."""


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path below `root`, or None."""
    for part in path.split(".") if path else ():
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
        blocks = submodule(model, path)
        if not isinstance(blocks, nn.ModuleList):
            raise SteersmanError(f"blocks={path!r} is not a ModuleList of {type(model).__name__}; {_candidates(model)}")
        return path, blocks
    for known in KNOWN_BLOCK_PATHS:
        blocks = submodule(model, known)
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 0 and n_layers in (None, len(blocks)):
            return known, blocks
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


def block_parts(block: nn.Module) -> dict[str, tuple[str, Tap]]:
    """Kind of hook point -> (submodule path relative to `block`, tap), for the kinds that this block has."""
    attention_out, mlp_out = _outputs(block)
    attention = _first(block, ATTENTION_PROPER)
    mlp = _first(block, MLP_NAMES)
    if _has(block, "intermediate/output.dense"):  # BERT, ESM
        mlp_in, down = "intermediate", "output.dense"
    elif mlp == "fc2":  # OPT: its block holds the MLP's two layers itself
        mlp_in, down = "fc1", "fc2"
    else:
        mlp_in, down = mlp, _first(block, _below(mlp, DOWN_PROJECTIONS))
    parts = {
        "hook_resid_pre": ("", Tap.INPUT),
        "hook_attn_in": (attention, Tap.INPUT),
        "hook_attn_mask": (attention if _adds_its_mask(block, attention) else None, Tap.KWARG),
        "hook_z": (_first(block, ("attention.output.dense", *_below(attention, OUT_PROJECTIONS))), Tap.INPUT),
        "hook_attn_out": (attention_out, Tap.OUTPUT),
        "hook_resid_mid": (_middle(block), Tap.STREAM),
        "hook_mlp_in": (mlp_in, Tap.INPUT),
        "hook_mlp_post": (down, Tap.INPUT),
        "hook_mlp_out": (mlp_out, Tap.OUTPUT),
        "hook_resid_post": ("", Tap.OUTPUT),
    }
    return {kind: (path, tap) for kind, (path, tap) in parts.items() if path is not None}


def _outputs(block: nn.Module) -> tuple[str | None, str | None]:
    """The submodules whose outputs are what attention and MLP add to the residual stream."""
    for marks, attention, mlp in SUBLAYER_LAYOUTS:
        if _has(block, f"{marks}/{attention}/{mlp}"):  # all of it, or it is another layout
            return attention, mlp
    return _first(block, ATTENTION_NAMES), _first(block, MLP_NAMES)


def _middle(block: nn.Module) -> str | None:
    """The submodule whose input is the stream between attention and MLP; None where they run side by side (GPT-J, Phi,
    Falcon, NeoX as it is mostly used) or where the block normalises its sums."""
    if getattr(block, "use_parallel_residual", False) or not getattr(block, "do_layer_norm_before", True):
        return None
    if getattr(block, "apply_residual_connection_post_layernorm", False):
        return None
    return next((path for marks, path in MID_LAYOUTS if _has(block, f"{marks}/{path}")), "") or None


def _adds_its_mask(block: nn.Module, attention: str | None) -> bool:
    """Whether the attention adds its mask to the scores. MPT's only fills with it, and adds a `position_bias`."""
    module = None if attention is None else submodule(block, attention)
    return module is not None and "position_bias" not in inspect.signature(type(module).forward).parameters


def _has(block: nn.Module, marks: str) -> bool:
    return all(submodule(block, mark) is not None for mark in marks.split("/") if mark)


def _first(block: nn.Module, paths: Iterable[str]) -> str | None:
    return next((path for path in paths if submodule(block, path) is not None), None)


def _below(parent: str | None, names: Iterable[str]) -> list[str]:
    return [] if parent is None else [f"{parent}.{name}" for name in names]
