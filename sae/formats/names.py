"""Names of hook points and models, between TransformerLens (ours), module paths, and what the formats record."""

import re

from steersman.errors import SteersmanError

_BLOCK = re.compile(
    r"(?:(?:model|transformer|gpt_neox|base_model|language_model|decoder|bert|encoder)\.)*"
    r"(?:layers|layer|h|blocks)\.(?P<layer>\d+)(?:\.(?P<rest>(?!input$|output$).+?))?(?:\.(?P<end>input|output))?"
)
_ATTENTION = {"attn", "self_attn", "attention", "self_attention"}
_POST_NORM_FAMILIES = re.compile(r"gemma-?[23]|olmo-?2|glm-?4", re.IGNORECASE)
"""Families that normalise after the sublayer: what `layers.3.mlp` returns is not what is added to the stream there."""
_H_FAMILIES = re.compile(r"gpt2|gpt-j|gptj|bloom|falcon|codegen|starcoder|mpt", re.IGNORECASE)
"""Families whose blocks are called `h` below the base model."""

_PREFIXES = (
    (r"gemma-\d", "google"),
    (r"pythia-", "EleutherAI"),
    (r"llama-\d", "meta-llama"),
    (r"qwen\d", "Qwen"),
    (r"mistral-", "mistralai"),
)
_GPT2 = {"gpt2-small": "gpt2", "gpt2-sm": "gpt2"}


def to_hook_name(name: str, model_name: str = "") -> str:
    """The TransformerLens name of a hook point that is given by it or by a module path; an unknown name as it is.

    A path whose output TransformerLens has no name for (`layers.3.mlp` of a model that normalises after the MLP) stays.

    >>> to_hook_name("layers.10"), to_hook_name("transformer.h.3.mlp"), to_hook_name("blocks.1.hook_resid_pre")
    ('blocks.10.hook_resid_post', 'blocks.3.hook_mlp_out', 'blocks.1.hook_resid_pre')
    """
    if re.search(r"(^|\.)hook_", name):
        return name
    if re.fullmatch(r"(?:\w+\.)*(?:embed_tokens|wte|embed_in)(?:\.output)?", name):
        return "hook_embed"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    stem, rest, end = f"blocks.{match['layer']}", match["rest"], match["end"]
    post_norm = _POST_NORM_FAMILIES.search(model_name) is not None
    if rest is None:
        return f"{stem}.hook_resid_pre" if end == "input" else f"{stem}.hook_resid_post"
    if rest.endswith("o_proj") and end == "input":
        return f"{stem}.attn.hook_z"
    if end == "input":
        return name
    if post_norm:
        kinds = {"post_feedforward_layernorm": "hook_mlp_out", "post_attention_layernorm": "hook_attn_out"}
    else:
        kinds = {"mlp": "hook_mlp_out"} | dict.fromkeys(_ATTENTION, "hook_attn_out")
    return f"{stem}.{kinds[rest]}" if rest in kinds else name


def to_module_path(hook_name: str, model_name: str = "") -> str:
    """The module below `model.base_model` whose output a hook point is, as sparsify names its folders.

    >>> to_module_path("blocks.6.hook_resid_post"), to_module_path("blocks.6.hook_mlp_out", "openai-community/gpt2")
    ('layers.6', 'h.6.mlp')
    """
    if hook_name == "hook_embed":
        return "wte" if _H_FAMILIES.search(model_name) else "embed_tokens"
    match = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", hook_name)
    if match is None:
        if _BLOCK.fullmatch(hook_name) and "hook_" not in hook_name:
            return hook_name  # a module path that TransformerLens has no name for
        raise SteersmanError(f"the hook point {hook_name!r} is not the output of a module")
    layer, kind = int(match[1]), match[2]
    blocks = "h" if _H_FAMILIES.search(model_name) else "layers"
    if kind == "hook_resid_pre" and layer > 0:
        return f"{blocks}.{layer - 1}"
    post_norm = _POST_NORM_FAMILIES.search(model_name) is not None
    attention = "attn" if blocks == "h" else "attention" if "pythia" in model_name.lower() else "self_attn"
    paths = {
        "hook_resid_post": "",
        "hook_mlp_out": ".post_feedforward_layernorm" if post_norm else ".mlp",
        "hook_attn_out": ".post_attention_layernorm" if post_norm else f".{attention}",
    }
    if kind not in paths:
        raise SteersmanError(f"the hook point {hook_name!r} is not the output of a module")
    return f"{blocks}.{layer}{paths[kind]}"


def to_model_name(name: str) -> str:
    """The hub id of a model that is given by it or by a TransformerLens name; an unknown name as it is.

    >>> to_model_name("gpt2-small"), to_model_name("gemma-2-2b"), to_model_name("org/name")
    ('gpt2', 'google/gemma-2-2b', 'org/name')
    """
    if "/" in name or not name:
        return name
    if name in _GPT2:
        return _GPT2[name]
    for pattern, organisation in _PREFIXES:
        if re.match(pattern, name, re.IGNORECASE):
            return f"{organisation}/{name}"
    return name


def to_transformer_lens_model(name: str) -> str:
    """The name that TransformerLens and Neuronpedia use for a model of the hub.

    >>> to_transformer_lens_model("google/gemma-2-2b"), to_transformer_lens_model("openai-community/gpt2")
    ('gemma-2-2b', 'gpt2-small')
    """
    plain = name.rsplit("/", 1)[-1]
    organisations = {organisation for _, organisation in _PREFIXES} | {"openai-community"}
    if "/" in name and name.split("/")[0] not in organisations:
        return name
    return "gpt2-small" if plain == "gpt2" else plain


def hook_in_path(place: str) -> str:
    """The hook point that the last folders of a path name, as sparsify's do: `.../layers.10` or `.../h.3.mlp`."""
    for part in reversed(place.split("/")[-2:]):
        name = to_hook_name(part)
        if name != part or re.match(r"(blocks|layers|h)\.\d+", part):
            return name
    return ""
