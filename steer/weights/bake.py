"""Writing an edit into the weights: a model that is steered wherever it is opened, and needs no hooks.

Where that is exact, for an edit that is one affine map h' = A h + c of every token:

| hook point | maps | written into |
|---|---|---|
| `hook_z`, `hook_mlp_post` | any | the layer that reads it: W' = W A, b' = b + W c |
| `hook_attn_out`, `hook_mlp_out` | any | the layer that writes it: W' = A W, b' = A b + c |
| `blocks.0.hook_resid_pre` | any | the embeddings of tokens and positions: E' = E A^T + c |
| any other of the residual stream | a constant c | the bias of the layer that writes last before it |
| every point of the stream | one projection | all that write to it: embeddings, `o_proj`, `down_proj`, their biases |

The last is directional ablation by orthogonalised weights (arXiv 2406.11717, section 4.1): see `ablate`. Everything
else is refused with the reason: gates and other scopes (weights act on every token, the BOS among them), parameters
that differ by row, what is no affine map, norms between a layer and the stream (Gemma 2 and 3, OLMo 2), a bias that the
family's configuration cannot have (Mistral, Qwen 2, the MLP of Qwen 3), layers that are quantised or split.

Shape letters: D width of the residual stream, V vocabulary.
"""

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.files import check_place, write_json
from steersman.lm import HookPoint, LanguageModel
from steersman.lm.layout import submodule
from steersman.steer.edits import AffineEdit, Edit, VectorEdit
from steersman.steer.edits.base import Map
from steersman.steer.edits.file import EditSet
from steersman.steer.scope import Scope, ScopeLike
from steersman.steer.steering import Steering
from steersman.steer.vectors.directions import directions_of
from steersman.steer.vectors.vector import SteeringVector
from steersman.steer.weights.linear import OutputLayer, Part, output_layer

BIASES = ("attention_bias", "mlp_bias", "use_bias", "add_bias_linear", "bias", "attention_out_bias", "enable_bias")
"""What configurations call the choice of a bias."""
RECORD = "steersman_bake.json"
_WRITES: dict[str, Part] = {"hook_attn_out": "attn", "hook_mlp_out": "mlp"}
_READS: dict[str, Part] = {"hook_z": "attn", "hook_mlp_post": "mlp"}
_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}
_LOW = 0.03
_TRIED = (3, 16)
"""Rows and tokens of the pass that is compared."""


@dataclass(frozen=True, kw_only=True)
class Baked:
    """A folder that was written, and how near it comes to the edit."""

    folder: Path
    """A transformers model with its tokenizer."""
    difference: float
    """Largest difference of a logit between the model in the folder and the steered model."""
    effect: float
    """Largest difference of a logit between the steered model and the unsteered one, on the same tokens."""
    changed: tuple[str, ...]
    """The parameters that differ from the model's."""

    def __str__(self) -> str:
        return (
            f"{self.folder}: {len(self.changed)} parameters changed; logits within {self.difference:.2g} of the "
            f"steered model's, whose edit moves them by up to {self.effect:.2g}"
        )


def ablate(lm: LanguageModel, direction: Tensor | SteeringVector) -> dict[str, Edit]:
    """Edits that take a direction [D] out of all that is written to the residual stream: h - (h . u) u, u = v / |v|, at
    `blocks.0.hook_resid_pre` and every `hook_attn_out` and `hook_mlp_out`. What `bake` writes into the weights.

    Source: arXiv 2406.11717 (directional ablation), equation 4. Raises SteersmanError for a vector of another model, or
    of several hook points, and one that is zero.
    """
    if isinstance(direction, SteeringVector):
        direction = directions_of(lm, direction, None)[lm.resolve_hook(direction.hook_name)]
    if direction.shape != (lm.d_model,) or not float(direction.norm()) > 0:
        raise SteersmanError(f"a direction to ablate must be [{lm.d_model}] and not zero, got {list(direction.shape)}")
    u = (direction.double() / direction.double().norm()).float()[:, None]
    edit = AffineEdit(write=-u, read=u)
    hooks = ["blocks.0.hook_resid_pre"]
    hooks += [f"blocks.{i}.{kind}" for i in range(lm.n_layers) for kind in _WRITES]
    return {lm.resolve_hook(hook): edit for hook in hooks}


def bake(
    lm: LanguageModel,
    edits: Mapping[str, Edit] | SteeringVector,
    out: str | PathLike[str],
    *,
    scope: ScopeLike = "all",
    include_bos: bool = False,
) -> Baked:
    """Write a copy of the model whose weights do what the edits do, as a transformers folder.

    Args:
        lm: the model; it stays as it is.
        edits: {hook point: edit}, an `EditSet` (with its own scope), or a vector.
        out: a folder that does not exist, or is empty.
        scope: must be "all", and
        include_bos: must be True for a model with a beginning-of-sequence token: weights act on every token.

    The model in the folder is loaded and compared with the steered model before the folder gets its name. Embeddings
    that are tied to the output layer are untied where they change. Raises SteersmanError where an edit cannot be
    written exactly, saying why (see the module), and leaves no folder then.
    """
    given = edits if not isinstance(edits, SteeringVector) else {}
    if isinstance(edits, EditSet):
        edits.check_fits(lm)
        scope, include_bos = edits.scope, edits.include_bos
    if isinstance(edits, SteeringVector):
        directions = directions_of(lm, edits, None)
        if any(v.ndim == 2 for v in directions.values()):
            raise SteersmanError("a vector that differs by position cannot be written into weights")
        given = {hook: VectorEdit(v) for hook, v in directions.items()}
    _check_scope(lm, Scope.of(scope, include_bos=include_bos))
    steering = Steering(lm, given, Scope.of("all", include_bos=True))
    maps = _maps(lm, steering)
    check_place(out, "folder")
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise SteersmanError(f"{out} is not empty: name a new folder for the model")
    made = copy.deepcopy(lm)
    with torch.no_grad():
        for point, one in sorted(_spread(lm, maps).items(), key=lambda item: item[0]):
            _write(made, point, one)
    changed = _changed(lm, made)
    record = {"edits": {hook: type(edit).__name__ for hook, edit in given.items()}, "changed": list(changed)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / "model"
        made.model.save_pretrained(folder)
        if made.tokenizer is not None:
            made.tokenizer.save_pretrained(folder)
        write_json(folder / RECORD, record)
        del made
        difference, effect = _compared(lm, steering, folder)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    return Baked(folder=out, difference=difference, effect=effect, changed=changed)


def _check_scope(lm: LanguageModel, scope: Scope) -> None:
    if scope.kind != "all":
        raise SteersmanError(f"weights act on every token: an edit of scope {scope.kind!r} cannot be written into them")
    if lm.bos_token_id is not None and not scope.include_bos:
        raise SteersmanError(
            "weights act on the beginning-of-sequence token too: say include_bos=True, with an edit that was tried so"
        )
    if lm.quantization is not None or lm.tensor_parallel:
        raise SteersmanError(f"the weights of {lm.name} are quantised or split: load it whole, in floating point")


def _maps(lm: LanguageModel, steering: Steering) -> dict[HookPoint, Map]:
    """What each edit does to a state. Raises SteersmanError for what is no affine map of every row and token."""
    maps = {}
    for hook, edit in steering.edits.items():
        point = lm.hook_point(hook)
        what = f"{type(edit).__name__} at {hook}"
        if edit.rows > 1:
            raise SteersmanError(f"{what} differs by row: weights are the same for all")
        found = edit.as_map(point.width)
        if found is None:
            raise SteersmanError(f"{what} is not one affine map of every state: it cannot be written into weights")
        maps[point] = found
    return maps


def _spread(lm: LanguageModel, maps: dict[HookPoint, Map]) -> dict[HookPoint, Map]:
    """The maps at points whose layers can carry them: one projection of the whole stream becomes one of all that is
    written to it. Raises SteersmanError for other maps of the stream than constants."""
    first = lm.hook_point("blocks.0.hook_resid_pre")
    mixing = {p: m for p, m in maps.items() if p.kind in _STREAM and m.matrix is not None and p != first}
    if not mixing:
        return maps
    matrix = next(iter(mixing.values())).matrix
    assert matrix is not None
    points = [lm.hook_point(name) for name in lm.hook_names()]
    stream = [p for p in points if p.kind in _STREAM[1:] or p == first]
    same = all(m.matrix is not None and m.matrix.equal(matrix) and not m.offset.any() for m in mixing.values())
    projects = torch.allclose(matrix @ matrix, matrix, rtol=0, atol=1e-6)
    if not (same and projects and all(p in maps for p in stream) and maps[first].matrix is not None):
        where = ", ".join(sorted(p.name for p in mixing)[:3])
        raise SteersmanError(
            f"the edit at {where} changes what passes by the blocks, which no weight holds: only a constant, or one "
            "projection at every point of the stream, can be written into weights there; or edit hook_attn_out and "
            "hook_mlp_out"
        )
    kept = {p: m for p, m in maps.items() if p not in mixing}
    for i in range(lm.n_layers):
        for kind in _WRITES:
            point = lm.hook_point(f"blocks.{i}.{kind}")
            if point in kept:
                raise SteersmanError(f"{point.name} is edited beside a projection of the stream: bake them in turn")
            kept[point] = Map(matrix, torch.zeros(len(matrix), dtype=torch.float64))
    return kept


def _write(made: LanguageModel, point: HookPoint, one: Map) -> None:
    """Write one map into the copy."""
    layer, kind = point.layer, point.kind
    if kind in _READS:
        _before(made, output_layer(made, layer, _READS[kind]), one)
    elif kind in _WRITES:
        _behind(made, output_layer(made, layer, _WRITES[kind]), one)
    elif kind == "hook_resid_pre" and layer == 0:
        _embed(made, one)
    elif kind in _STREAM:
        last: tuple[int, Part] = (layer, "attn") if kind == "hook_resid_mid" else (layer, "mlp")
        last = (layer - 1, "mlp") if kind == "hook_resid_pre" else last
        _behind(made, output_layer(made, *last), one)
    else:
        raise SteersmanError(f"what is at {point.name} is not carried by a layer of its own: it cannot be baked")


def _before(made: LanguageModel, layer: OutputLayer, one: Map) -> None:
    """W (A x + c) + b."""
    W = layer.matrix()
    wide = W.double().cpu()
    if one.offset.any():
        _add_bias(made, layer, wide @ one.offset)
    if one.matrix is not None:
        W.copy_(wide @ one.matrix)


def _behind(made: LanguageModel, layer: OutputLayer, one: Map) -> None:
    """A f (W x + b) + c = f (A W x + A b + c / f)."""
    W, bias = layer.matrix(), getattr(layer.module, "bias", None)
    if one.matrix is not None:
        W.copy_(one.matrix @ W.double().cpu())
        if bias is not None:
            bias.copy_(one.matrix @ bias.double().cpu())
    if one.offset.any():
        _add_bias(made, layer, one.offset / layer.factor)


def _add_bias(made: LanguageModel, layer: OutputLayer, extra: Tensor) -> None:
    if getattr(layer.module, "bias", None) is None:
        _give_biases(made, layer.path)
    bias: Any = layer.module.bias
    bias.copy_(bias.double().cpu() + extra)


def _give_biases(made: LanguageModel, path: str) -> None:
    """Zero biases for the layer at `path`, and for whatever else the same choice of the configuration gives one."""
    model, known = made.model, dict(made.model.named_parameters())
    for flag in BIASES:
        if getattr(made.config, flag, None) is not False:
            continue
        config = copy.deepcopy(model.config)
        setattr(config.get_text_config(), flag, True)
        with torch.device("meta"):
            built = dict(type(model)(config).named_parameters())
        new = {name: p for name, p in built.items() if name not in known}
        if f"{path}.bias" not in new or any(not name.endswith(".bias") for name in new):
            continue
        for name, p in new.items():
            module = submodule(model, name.removesuffix(".bias"))
            assert module is not None
            weight: Any = module.weight
            module.bias = nn.Parameter(weight.new_zeros(p.shape))
        setattr(model.config.get_text_config(), flag, True)
        return
    raise SteersmanError(
        f"{path} has no bias, and the configuration of a {getattr(made.config, 'model_type', 'model')} cannot give it "
        "one: a constant cannot be written there"
    )


def _embed(made: LanguageModel, one: Map) -> None:
    """E' = E A^T + c / f, and A for what else is added to the tokens' embeddings."""
    model, stem = made.model, f"{made.hooks.path}."
    tokens = model.get_input_embeddings()
    others = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not tokens and not name.startswith(stem)
    ]
    ids = torch.arange(1, 9, device=made.device)[None] % int(made.config.vocab_size)
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output)

    handles = [module.register_forward_hook(see) for module in others]
    try:
        h = made.capture(ids, hooks=["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"].double()
    finally:
        for handle in handles:
            handle.remove()
    terms = tokens.weight[ids].double() + sum((part.double() for part in seen), start=torch.zeros(()))
    factor = float((h * terms).sum() / terms.square().sum())
    rounding = 1e-4 if made.dtype in (torch.float32, torch.float64) else 0.02
    if not float((h - factor * terms).norm() / h.norm()) < rounding:
        raise SteersmanError(
            f"what {made.name} reads at blocks.0.hook_resid_pre is not the sum of its embeddings (a norm or something "
            "else stands between): it cannot be baked there"
        )
    head = model.get_output_embeddings()
    if head is not None and head.weight is tokens.weight:
        head.weight = nn.Parameter(tokens.weight.clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    for module in [tokens, *others]:
        wide = module.weight.double().cpu()
        module.weight.copy_(wide if one.matrix is None else wide @ one.matrix.T)
    tokens.weight.copy_(tokens.weight.double().cpu() + one.offset / factor)


def _changed(lm: LanguageModel, made: LanguageModel) -> tuple[str, ...]:
    before = dict(lm.model.named_parameters(remove_duplicate=False))
    after = dict(made.model.named_parameters(remove_duplicate=False))
    return tuple(sorted(name for name, p in after.items() if not torch.equal(p, before.get(name, torch.zeros_like(p)))))


@torch.no_grad()
def _compared(lm: LanguageModel, steering: Steering, folder: Path) -> tuple[float, float]:
    """(largest difference to the steered model, largest effect of the edit), in logits. Raises SteersmanError where
    the first is more than rounding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(lm.config.vocab_size), _TRIED, generator=generator)
    if lm.bos_token_id is not None:
        ids[:, 0] = lm.bos_token_id
    base = lm.logits(ids).double().cpu()
    with steering:
        steered = lm.logits(ids).double().cpu()
    model = type(lm.model).from_pretrained(folder, dtype=lm.dtype).to(lm.device)
    baked = LanguageModel(model, blocks=lm.hooks.path).logits(ids).double().cpu()
    error = float((baked - steered).norm() / steered.norm())
    effect = float((steered - base).abs().max())
    if not error < _TOLERANCE.get(lm.dtype, _LOW):
        raise SteersmanError(
            f"the model with the edit written into its weights is not the steered model (its logits differ by "
            f"{error:.2g} of their length): this edit cannot be baked into a {lm.config.model_type}"
        )
    return float((baked - steered).abs().max()), effect
