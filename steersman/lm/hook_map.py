"""All hook points of one model: found by its layout, tried on the model, looked up by name."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from steersman.errors import SteersmanError, near_names
from steersman.lm import probe
from steersman.lm.hooks import KINDS, LOGITS, MODULE, UNCHECKED, HookName, HookPoint, SharedHook, layer_number
from steersman.lm.layout import Tap, block_parts, find_blocks, submodule
from steersman.lm.sums import BlockSums, Summand, measure_sums


class HookMap:
    """All hook points of one model, by canonical name and by module path. `config` is the text model's.

    What the names promise is tried on the model, in one pass over a few tokens, before the first use of a name that
    depends on it: see `steersman.lm.sums`.
    """

    def __init__(self, model: nn.Module, config: Any, blocks: str | None = None) -> None:
        self.model, self.config = model, config
        self.path, self.blocks = find_blocks(model, getattr(config, "num_hidden_layers", None), blocks)
        self._points: dict[str, HookPoint] = {}
        self._modules: dict[str, HookPoint] = {}
        self._by_path: dict[str, str] = {}
        self._missing: dict[str, str] = {}
        self._checked = False
        for layer, block in enumerate(self.blocks):
            for kind, (within, tap) in block_parts(block).items():
                self._add(layer, kind, within, tap)
        head = _output_layer(model)
        if head is not None:
            self._points[LOGITS] = HookPoint(
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

    def _add(self, layer: int, kind: str, within: str, tap: Tap, factor: float = 1.0) -> None:
        module = submodule(self.blocks[layer], within)
        assert module is not None
        name, shape = KINDS[kind]
        if (width := _width(kind, module, self.config)) is None:
            return  # a module that this library cannot measure
        path = f"{self.path}.{layer}.{within}".rstrip(".")
        point = HookPoint(
            name=f"blocks.{layer}.{name}",
            layer=layer,
            kind=kind,
            order=list(KINDS).index(kind),
            path=path,
            module=module,
            tap=tap,
            shape=shape,
            width=width,
            factor=factor,
            _shared=SharedHook(module) if tap is Tap.STREAM else None,
        )
        self._points[point.name] = point
        if tap is Tap.OUTPUT and factor == 1:
            self._by_path[path] = point.name  # a module's path means its output

    @property
    def points(self) -> dict[str, HookPoint]:
        """Every hook point by its name, in the order of the pass."""
        self._check()
        return self._points

    def _check(self) -> None:
        """Try the model once, and keep of its hook points those that hold what their names say."""
        if self._checked:
            return
        self._checked = True
        seen: dict[str, Any] = {}

        def read() -> list[Any]:
            points = [p for p in self._points.values() if p.holds_states]
            return [point._attach(lambda h, name=point.name: seen.__setitem__(name, h)) for point in points]

        problem, sums = "", []
        try:
            parts = [self._parts(layer) for layer in range(len(self.blocks))]
            width = int(self.config.hidden_size)
            sums = measure_sums(self.model, self.blocks, width, parts, _numbers(self.config), read)
        except Exception as error:  # whatever a foreign model raises
            reason = " ".join(str(error).split())[:120]
            problem = f"a pass to check it failed ({type(error).__name__}: {reason})"
        for name, point in list(self._points.items()):
            if problem:
                why = "" if point.kind in UNCHECKED else problem
            elif not point.holds_states:
                why = ""
            elif name not in seen:
                why = "no pass over text reaches it"
            else:
                try:
                    point.states(seen[name], probe.ROWS, probe.TOKENS)
                    why = ""
                except SteersmanError as error:
                    why = str(error).removeprefix(f"{name} ").partition(":")[0]
            if why:
                self._remove(name, why)
        for layer, found in enumerate(sums):
            self._settle(layer, found)
        places = sorted(self._points.values(), key=lambda point: point._place)
        self._points = {point.name: point for point in places}

    def _parts(self, layer: int) -> dict[str, str | None]:
        kinds = {"attn": "attn_out", "mlp": "mlp_out", "mid": "resid_mid", "attn_in": "attn_in", "mlp_in": "mlp_in"}
        stem = f"{self.path}.{layer}."
        named = {part: self._points.get(f"blocks.{layer}.hook_{kind}") for part, kind in kinds.items()}
        return {part: None if p is None else p.path.removeprefix(stem) for part, p in named.items()}

    def _settle(self, layer: int, found: BlockSums) -> None:
        stem = f"blocks.{layer}.hook_"
        for name, summand in ((f"{stem}attn_out", found.attn), (f"{stem}mlp_out", found.mlp)):
            point = self._points.get(name)
            if point is None or summand == Summand(point.path.removeprefix(f"{self.path}.{layer}.")):
                continue
            self._remove(name, found.why)
            if summand is not None:
                self._missing.pop(name)
                self._add(layer, point.kind, summand.path, Tap.OUTPUT, summand.factor)
        if f"{stem}resid_mid" in self._points and not found.mid:
            self._remove(f"{stem}resid_mid", "no module of the block reads the sum of the stream and the attention")

    def _remove(self, name: str, why: str) -> None:
        point = self._points.pop(name)
        self._missing[name] = why
        if self._by_path.get(point.path) == name:
            del self._by_path[point.path]

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
            return self._of_kind(layer % n, "hook_resid_post")
        if not isinstance(name, str):
            raise SteersmanError(f"a hook point is named by a string or by a layer's number, got {name!r}")
        if name == LOGITS and LOGITS in self._points:
            return self._points[LOGITS]
        number = re.fullmatch(r"(?:.*\.)?(?:blocks|layers|layer|h|block)\.(-?\d+)(?:\.(.+))?", name)
        if number is not None and not 0 <= int(number[1]) < n:
            raise SteersmanError(
                f"hook point {name!r}: there is no layer {number[1]}, the model has {n} layers (0 to {n - 1})"
            )
        if number is not None and name.startswith("blocks."):
            kind = next((kind for kind, (own, _) in KINDS.items() if number[2] in (kind, own)), None)
            if kind is not None:
                return self._of_kind(int(number[1]), kind)
        for path in self._paths(name, number):
            if path in self._by_path and self._by_path[path].endswith("hook_resid_post"):
                return self._points[self._by_path[path]]
            if submodule(self.model, path) is not None:
                self._check()
                return self.points[self._by_path[path]] if path in self._by_path else self._module(path)
        raise SteersmanError(f"unknown hook point {name!r}; near names: {near_names(name, list(self.points))}")

    def _paths(self, name: str, number: re.Match[str] | None) -> Iterator[str]:
        """What `name` may mean as the path of a module: `model.layers.6`, `layers.6` and, when the list is called
        otherwise, the plain `layers.6` all work."""
        stem = self.path.split(".")
        for depth in range(len(stem)):
            yield ".".join([*stem[:depth], name])
        if number is not None and not name.startswith("blocks."):
            yield ".".join(part for part in (self.path, number[1], number[2]) if part)

    def _module(self, path: str) -> HookPoint:
        """The hook point of what the module at `path` returns, where no other name means the same."""
        if path in self._modules:
            return self._modules[path]
        module, calls, order = submodule(self.model, path), [], [(-1, 0.0)]
        assert module is not None

        def attach() -> list[Any]:
            known = [p for p in self._points.values() if p.holds_states]
            place = [p._attach(lambda _, p=p: order.append((p.layer, p.order))) for p in known]
            return [*place, module.register_forward_hook(lambda _m, _a, out: calls.append((out, order[-1])))]

        try:
            probe.probe(self.model, attach)
        except Exception as error:  # whatever a foreign model raises
            reason = " ".join(str(error).split())[:120]
            raise SteersmanError(f"{path} could not be tried ({type(error).__name__}: {reason})") from error
        if len(calls) != 1:
            raise SteersmanError(f"{path} runs {len(calls)} times in a pass: only what runs once is a hook point")
        states, (layer, after) = probe.states_of(calls[0][0]), calls[0][1]
        if states is None:
            raise SteersmanError(f"{path} does not return one state for each token: it is no hook point")
        if after == len(KINDS) - 1 and not path.startswith(f"{self.path}.{layer}."):
            layer = layer + 1
            after = -1.0 if layer == len(self.blocks) else after
        point = HookPoint(
            name=path,
            layer=layer,
            kind=MODULE,
            order=after + 0.5,
            path=path,
            module=module,
            tap=Tap.OUTPUT,
            shape="B S D" if states.shape[-1] == self.config.hidden_size else "B S M",
            width=states.shape[-1],
        )
        return self._modules.setdefault(path, point)

    def _of_kind(self, layer: int, kind: str) -> HookPoint:
        stem = f"blocks.{layer}."
        if kind not in UNCHECKED:
            self._check()
        point = self._points.get(stem + KINDS[kind][0])
        if point is None:
            why = self._missing.get(stem + KINDS[kind][0])
            own = ", ".join(name.removeprefix(stem) for name in self.points if name.startswith(stem))
            raise SteersmanError(
                f"block {layer} of this model has no {kind}{'' if why is None else f' ({why})'}; it has {own}"
            )
        return point


def _numbers(config: Any) -> list[float]:
    known = config.to_dict() if hasattr(config, "to_dict") else {}
    return [float(value) for value in known.values() if isinstance(value, float)]


def _output_layer(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def _width(kind: str, module: nn.Module, config: Any) -> int | None:
    if kind in ("hook_z", "hook_mlp_post"):
        return _fan_in(module)
    name = "num_attention_heads" if kind == "hook_attn_mask" else "hidden_size"
    try:
        return int(getattr(config, name))
    except (AttributeError, TypeError):  # no such number, or one for each layer
        return None


def _fan_in(projection: nn.Module) -> int | None:
    """Entries that a projection reads. GPT-2's Conv1D keeps its weight the other way round, quantised ones packed."""
    known = getattr(projection, "in_features", None)
    if known is not None:
        return int(known)
    weight = getattr(projection, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _fan_out(head: nn.Module) -> int:
    return int(getattr(head, "out_features", None) or head.weight.shape[0])  # pyright: ignore[reportIndexIssue, reportArgumentType]
