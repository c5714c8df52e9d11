"""Where an SAE, a vector, an effect map or a store comes from, and whether it fits a model or another of them.

Each records the model and the hook point it was made from; an empty record fits any. This is the one rule: same model,
same hook point, same width.
"""

import re
from typing import Any, NamedTuple, Protocol, Self

from steersman.errors import SteersmanError
from steersman.lm.hooks import KINDS, HookName, HookPoint, layer_number


class HookedModel(Protocol):
    """What is asked of a `LanguageModel` here."""

    name: str

    def resolve_hook(self, name: HookName) -> str:
        """The canonical name of a hook point."""
        ...

    def hook_width(self, name: HookName) -> int:
        """The width of the states there."""
        ...

    def hook_point(self, name: HookName) -> HookPoint:
        """The hook point itself; they compare by when the pass comes to them."""
        ...


class Origin(NamedTuple):
    """Model, hook point and width that something was made from; what is not known is empty or None."""

    model_name: str = ""
    hook_name: str = ""
    width: int | None = None

    @classmethod
    def of_sae(cls, sae: Any) -> Self:
        """What an `SAE` records."""
        return cls(sae.cfg.model_name, sae.cfg.hook_name, sae.cfg.d_in)


def same_model(a: str, b: str) -> bool:
    """Whether two recorded names mean one model; an empty name means any.

    Folders and organisations are left out of the comparison, so that `google/gemma-2-2b`, `gemma-2-2b` and
    `models/gemma-2-2b` are one, as is TransformerLens's `gpt2-small` and the hub's `gpt2`.

    >>> same_model("google/gemma-2-2b", "models/Gemma-2-2b/"), same_model("gpt2", "gpt2-medium")
    (True, False)
    """
    return not a or not b or _plain(a) == _plain(b)


def _plain(name: str) -> str:
    plain = name.rstrip("/").rpartition("/")[2].lower()
    return {"gpt2-small": "gpt2"}.get(plain, plain)


def canonical_hook(name: HookName) -> str:
    """The name of a hook point without a model to ask: a block's module path and a layer's number are its output, a
    kind has one name, a module inside a block is told by its path from the list of blocks on, other names stay.

    >>> canonical_hook("model.layers.6"), canonical_hook("blocks.6.hook_z"), canonical_hook(6)
    ('blocks.6.hook_resid_post', 'blocks.6.attn.hook_z', 'blocks.6.hook_resid_post')
    >>> canonical_hook("blocks.6.hook_mlp_out"), canonical_hook("model.layers.6.mlp")
    ('blocks.6.hook_mlp_out', 'layers.6.mlp')
    """
    layer = layer_number(name)
    if layer is not None:
        return f"blocks.{layer}.hook_resid_post" if layer >= 0 else str(name)
    name = str(name)
    block = re.fullmatch(r"(?:\w+\.)*(?:layers|layer|h|blocks)\.(\d+)", name)
    if block is not None:
        return f"blocks.{block[1]}.hook_resid_post"
    inner = re.fullmatch(r"(?:\w+\.)*?((?:layers|layer|h)\.\d+\..+)", name)
    if inner is not None and "hook_" not in name:
        return inner[1]
    stem, _, kind = name.rpartition(".")
    return f"{stem}.{KINDS[kind][0]}" if re.fullmatch(r"blocks\.\d+", stem) and kind in KINDS else name


def runs_before(a: HookName, b: HookName) -> bool | None:
    """Whether the first of two hook points is reached earlier in the pass than the second, by their names alone; None
    where these do not tell.

    >>> runs_before("blocks.2.hook_mlp_in", "blocks.2.hook_mlp_out"), runs_before("logits", "blocks.1.hook_resid_post")
    (True, None)
    """
    places = []
    for name in map(canonical_hook, (a, b)):
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if found is None or found[2] not in _KINDS_IN_ORDER:
            return None
        places.append((int(found[1]), _KINDS_IN_ORDER.index(found[2])))
    return places[0] < places[1]


_KINDS_IN_ORDER = [name for name, _ in KINDS.values()]


def check_fits(
    lm: HookedModel, *, what: str, model_name: str, hook_name: str, width: int | None, hook: HookName | None = None
) -> str:
    """The canonical hook point of something made for `model_name` at `hook_name`, once it is known to fit `lm`.

    Args:
        lm: the model it is to be used with.
        what: what to call it in messages, such as "this SAE".
        model_name: the model it records; empty for any.
        hook_name: the hook point it records; empty if it records none, and then `hook` is needed.
        width: entries of its states or vectors; None where that is checked elsewhere.
        hook: where it is to be used, if that is asked for: must be the same hook point.

    Raises SteersmanError, naming both sides, for another model, hook point or width.
    """
    if not same_model(model_name, lm.name):
        raise SteersmanError(
            f"{what} was made for {model_name!r}, the model is {lm.name!r}: load {model_name}, or, where this is a "
            f"copy of it, name it so with name={model_name!r}"
        )
    if not hook_name and (hook is None or hook == ""):
        raise SteersmanError(f"{what} records no hook point: name the one it was made at with hook=")
    name = lm.resolve_hook(hook_name if hook is None or hook == "" else hook)
    if hook_name and lm.resolve_hook(hook_name) != name:
        raise SteersmanError(f"{what} was made at {hook_name!r}, not at {name!r}: leave out the hook point")
    if width is not None and width != lm.hook_width(name):
        raise SteersmanError(
            f"{what} has width {width}, {name} of {lm.name} has width {lm.hook_width(name)}: it was made for another "
            "model or hook point"
        )
    return name


def check_sae_fits(lm: HookedModel, sae: Any, hook: HookName | None = None) -> str:
    """`check_fits` of an `SAE`: the hook point of `lm` that it reads, `hook` where it records none."""
    sae.cfg.check_one_hook("use with a model")
    return check_fits(lm, what="this SAE", **Origin.of_sae(sae)._asdict(), hook=hook)


def written_at(lm: HookedModel, sae: Any, hook: HookName | None = None) -> str:
    """The hook point of `lm` that an `SAE` writes: that which it reads or, of a transcoder, its `hook_name_out`; `hook`
    where it records none.

    Raises SteersmanError for one of another model, hook point or width, and for a transcoder that writes what the pass
    comes to before what it reads.
    """
    cfg = sae.cfg
    if not cfg.transcoder:
        return check_sae_fits(lm, sae, hook)
    read, write = (
        check_fits(lm, what=what, model_name=cfg.model_name, hook_name=name, width=width, hook=at)
        for what, name, width, at in (
            ("this transcoder", cfg.hook_name, cfg.d_in, None),
            ("what this transcoder writes", cfg.hook_name_out, cfg.out_width, hook),
        )
    )
    if not lm.hook_point(read) < lm.hook_point(write):
        raise SteersmanError(
            f"this transcoder reads {read} and writes {write}, which the pass does not come to later: its features "
            "cannot be edited there"
        )
    return write


def check_same_origin(what: str, a: Origin, other: str, b: Origin) -> None:
    """Check that two things were made from one model, at one hook point, of one width.

    Raises SteersmanError that names both: `what` is what to call the first, `other` the second.
    """
    fix = "use two that belong together"
    if not same_model(a.model_name, b.model_name):
        raise SteersmanError(f"{what} was made for {a.model_name!r}, {other} for {b.model_name!r}: {fix}")
    if a.hook_name and b.hook_name and canonical_hook(a.hook_name) != canonical_hook(b.hook_name):
        raise SteersmanError(f"{what} was made at {a.hook_name!r}, {other} at {b.hook_name!r}: {fix}")
    if None not in (a.width, b.width) and a.width != b.width:
        raise SteersmanError(f"{what} has width {a.width}, {other} has width {b.width}: {fix}")
