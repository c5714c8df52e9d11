"""Names of hook points and models: from what the formats record to TransformerLens's (ours) and the hub's."""

import re

_BLOCK = re.compile(
    r"(?:(?:model|transformer|gpt_neox|base_model|language_model|decoder|bert|encoder)\.)*"
    r"(?:layers|layer|h|blocks)\.(?P<layer>\d+)(?:\.(?P<rest>(?!input$|output$).+?))?(?:\.(?P<end>input|output))?"
)
_ATTENTION = {"attn", "self_attn", "attention", "self_attention"}
_POST_NORM_FAMILIES = re.compile(r"gemma-?[23]|olmo-?2|glm-?4", re.IGNORECASE)
"""Families that normalise after the sublayer: what `layers.3.mlp` returns is not what is added to the stream there."""

_PLAIN_FAMILIES = re.compile(
    r"(^|[/_-])(gpt-?2|gpt-?j|gpt-neo|pythia|llama|smollm|mistral|qwen|gemma-(1|2b|7b)|phi-?3)", re.IGNORECASE
)
"""Families known to add what a sublayer returns as it is. Of all others `layers.3.mlp` stays what it says: the model
itself is asked when the hook point is used."""

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


def hook_of_model(name: str, model_name: str) -> str:
    """`to_hook_name`, but for what a sublayer returns in a named model that is not known to add it as it is: its path.

    >>> hook_of_model("layers.3.mlp", "EleutherAI/pythia-70m"), hook_of_model("layers.3.mlp", "an/other")
    ('blocks.3.hook_mlp_out', 'layers.3.mlp')
    """
    found = to_hook_name(name, model_name)
    if not model_name:
        return found
    path = name.removesuffix(".output")
    if found == name or not found.endswith(("hook_mlp_out", "hook_attn_out")) or _PLAIN_FAMILIES.search(model_name):
        return found
    known = _POST_NORM_FAMILIES.search(model_name) is not None and path.endswith("layernorm")
    return found if known else path


def hook_in_path(place: str, model_name: str = "") -> str:
    """The hook point that the last folders of a path name, as sparsify's do: `.../layers.10` or `.../h.3.mlp`.

    What a sublayer's path means is the model's to say: see `hook_of_model`.
    """
    for part in reversed(place.split("/")[-2:]):
        name = hook_of_model(part, model_name)
        if name != part or re.match(r"(blocks|layers|h)\.\d+", part):
            return name
    return ""
