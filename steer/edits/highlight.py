"""Highlighting parts of a prompt: chosen heads look less at everything else in it.

PASTA (arXiv 2311.02262, equation 2): before the softmax log(alpha) is added to every key of the prompt outside the
highlighted part, in chosen heads, for every query; that multiplies those attention weights by alpha and normalises
again. Keys that the model generates are left alone.

Differences from the authors' code: several parts are one union (theirs adds log(alpha) once for each part, so that
with n of them the outside gets alpha^n and each part alpha^(n-1)); attention that takes no bias is refused, where
theirs does nothing under flash attention; heads are query heads.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.offsets import Piece, text_offsets
from steersman.lm.tokens import Prompt, as_prompts
from steersman.steer.edits.attention import AttentionBiasEdit

Heads = Mapping[int, Sequence[int] | None] | Iterable[tuple[int, int]] | None
"""Which heads: {layer: [head, ...]} (None as its heads: all of them), (layer, head) pairs, or None for all of all."""
Spans = Piece | Sequence[Piece] | Sequence[Piece | Sequence[Piece]]
"""The parts of one prompt, or of each: a substring, a pair (start, stop) of characters, or a list of those."""


def highlight_edits(
    lm: LanguageModel,
    prompts: str | Sequence[Prompt],
    spans: Spans,
    *,
    heads: Heads = None,
    alpha: float = 0.01,
    include: bool = False,
    spare_bos: bool = False,
) -> dict[str, AttentionBiasEdit]:
    """{hook point: edit} that highlights `spans` of `prompts`; see `Steerer.highlight`."""
    if not alpha > 0:
        raise SteersmanError(f"alpha must be above 0 (1 changes nothing), got {alpha}")
    inside, length, is_bos = span_table(lm, prompts, spans)
    if include:
        keys, bias = inside, -math.log(alpha)
    else:
        real = torch.arange(inside.shape[1]) < length[:, None]
        keys, bias = real & ~inside & inside.any(1, keepdim=True), math.log(alpha)
        if spare_bos:
            keys = keys & ~is_bos
    found: dict[str, AttentionBiasEdit] = {}
    edits: dict[tuple[int, ...] | None, AttentionBiasEdit] = {}
    for layer, chosen in heads_by_layer(lm, heads).items():
        if chosen not in edits:
            edits[chosen] = AttentionBiasEdit(bias, keys, chosen)
        found[f"blocks.{layer}.hook_attn_mask"] = edits[chosen]
    return found


def span_table(lm: LanguageModel, prompts: Any, spans: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of R prompts with at most P tokens: which positions are in their spans, [R, P] bool; their lengths [R]; and
    which positions hold a BOS, [R, P] bool."""
    single = not isinstance(prompts, list | tuple) or (bool(prompts) and isinstance(prompts[0], Mapping))
    given, each = as_prompts(prompts), [spans] if single else list(spans)
    if len(given) != len(each):
        raise SteersmanError(f"{len(given)} prompts and the spans of {len(each)}: give one entry for each prompt")
    offsets = [text_offsets(lm, prompt) for prompt in given]
    length = torch.tensor([len(one.ids) for one in offsets])
    inside = torch.zeros(len(offsets), int(length.max()), dtype=torch.bool)
    is_bos = torch.zeros_like(inside)
    for row, (one, pieces) in enumerate(zip(offsets, each)):
        inside[row, one.positions(_pieces(pieces))] = True
        is_bos[row, 0] = one.ids[0] == lm.bos_token_id
    return inside, length, is_bos


def _pieces(given: Any) -> list[Piece]:
    if isinstance(given, str) or _is_range(given):
        return [given]
    if isinstance(given, Sequence) and all(isinstance(piece, str) or _is_range(piece) for piece in given):
        return list(given)
    raise SteersmanError(f"a span is a substring or a pair (start, stop) of characters, got {given!r}")


def _is_range(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(n, int) for n in given)


def heads_by_layer(lm: LanguageModel, heads: Heads) -> dict[int, tuple[int, ...] | None]:
    """Layer -> its heads in rising order (None: all of them), in the order of the layers.

    Raises SteersmanError for no heads at all, and for a layer or head that the model does not have.
    """
    if heads is None:
        return dict.fromkeys(range(lm.n_layers))
    found: dict[int, set[int] | None] = {}
    pairs = heads.items() if isinstance(heads, Mapping) else heads
    for layer, chosen in pairs:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < lm.n_layers:
            raise SteersmanError(f"heads of layer {layer!r}: {lm.name} has layers 0 to {lm.n_layers - 1}")
        if chosen is None:
            found[layer] = None
        elif (known := found.setdefault(layer, set())) is not None:
            known.update([chosen] if isinstance(chosen, int) else chosen)
    if not found:
        raise SteersmanError("highlighting needs at least one head: leave out heads= for all of them")
    return {layer: None if found[layer] is None else tuple(sorted(found[layer] or ())) for layer in sorted(found)}
