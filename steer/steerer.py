"""`Steerer`: opens the contexts in which a language model runs steered.

The main path: a context resolves its hook points and builds its edit once; in every pass the clock says where the
pass stands, the scope picks the tokens, the edit changes them, the trace notes them.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.lm.origin import check_fits, check_sae_fits
from steersman.sae import SAE
from steersman.steer.edit_report import EditReport, Meter
from steersman.steer.edits import Edit, FeatureEdit, PositionEdit, VectorEdit
from steersman.steer.scope import Scope
from steersman.steer.trace import Trace
from steersman.steer.vectors.vector import SteeringVector


class Steering:
    """One steered stretch of work: a context manager with a `trace`, and with a `report()` when it measures.

    A context can be entered again after it has closed; the trace and the report then start anew.
    """

    def __init__(self, lm: LanguageModel, edits: Mapping[str, Edit], scope: Scope, meter: Meter | None = None) -> None:
        self.lm = lm
        self.edits = {lm.resolve_hook(hook): edit for hook, edit in edits.items()}
        self.scope = scope
        self.trace = Trace()
        self._meter = meter
        self._stack: ExitStack | None = None

    def __enter__(self) -> "Steering":
        if self._stack is not None:
            raise SteersmanError("this steering context is already open: make a second one to nest it")
        self.trace = Trace()
        if self._meter is not None:
            self._meter.reset()
        with ExitStack() as stack:  # an edit that cannot attach takes the earlier ones with it
            for hook, edit in self.edits.items():
                stack.enter_context(self.lm.edit(hook, self._runner(edit)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _runner(self, edit: Edit) -> Any:
        scope, idle, mixed = self.scope, not bool(edit.active.any()), not bool(edit.active.all())

        def run(h: Tensor, fwd: ForwardPass) -> Tensor:
            if edit.rows > 1:
                fwd.row_index(edit.rows)  # a wrong number of rows is an error even where nothing would be steered
            where = False if idle else scope.select(fwd)
            where = edit.narrow(where, fwd)
            if isinstance(where, bool) and not where:
                return h
            if mixed:
                rows = edit.expand(edit.active.to(fwd.device), fwd)[:, None]
                where = rows.expand(fwd.batch, fwd.length) if isinstance(where, bool) else where & rows
            new = edit.apply(h, fwd, where)
            self.trace.record(fwd, where)
            if self._meter is not None:
                self._meter.record(h, new, fwd, where)
            return new

        return run

    def report(self) -> EditReport:
        """What the edit achieved so far: see `EditReport`. Only for features opened with `measure=True`."""
        if self._meter is None:
            raise SteersmanError("nothing was measured: open the context with measure=True")
        return self._meter.report()


class Steerer:
    """Steers a `LanguageModel` by features of an SAE or by vectors.

    Every parameter may differ per row of the batch: pass one entry per prompt. Beams and `num_return_sequences`
    share their prompt's. Contexts nest and apply in the order they were entered.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def features(
        self,
        sae: SAE,
        features: Mapping[int, float] | Sequence[Mapping[int, float]],
        *,
        mode: str = "add",
        units: str = "raw",
        scope: Any = "all",
        gate: Any = 1.0,
        hook: str | None = None,
        include_bos: bool = False,
        measure: bool = False,
    ) -> Steering:
        """Edit features by id: `{id: strength}` for all rows, or a list of those with one per row.

        `mode` is one of the five of `steersman.steer.edits`. `units`: `raw` activation units; `max_act`, multiples of
        the feature's largest activation in training; `norm_frac`, such that strength times |d_j| is this share of the
        median |h|. `scope` as for `Scope.of`; `gate` (a number or [B]) multiplies what the edit would change. `hook`
        is needed only for an SAE that records none. `measure` also encodes each steered state before and after the
        edit, for `report()`.

        Raises SteersmanError for a feature id out of range, a dead feature in `max_act` units, an SAE without the
        statistics its units need, and an SAE of another model, hook point or width.
        """
        sae.check_residual("steering")
        where = check_sae_fits(self.lm, sae, hook)
        edit = FeatureEdit(sae, features, mode=mode, units=units, gate=gate)
        meter = Meter(edit) if measure else None
        return Steering(self.lm, {where: edit}, Scope.of(scope, include_bos=include_bos), meter)

    def vector(
        self,
        vector: Any,
        *,
        scale: Any = 1.0,
        hook: str | None = None,
        scope: Any = "all",
        gate: Any = 1.0,
        include_bos: bool = False,
    ) -> Steering:
        """Add `scale` times a vector: a `SteeringVector` (or a list of them, one per row), a tensor [D] or [B, D] with
        `hook`, a mapping {hook: tensor}, or an object with `hook_name` and `vector` (and `model_name`).

        A `SteeringVector` that has one direction per position is added from the front: row p at absolute position p.
        `scale` and `gate` are a number or [B]: `scale=[0, 2, 4]` on three copies of a prompt is a dose-response curve
        in one batch. Raises SteersmanError for a vector of another model, hook point or width, and for one that is
        not finite.
        """
        edits: dict[str, Edit] = {}
        for name, v in self._vectors(vector, hook).items():
            v = torch.as_tensor(v).to(self.lm.device)
            what, width = f"a vector of shape {list(v.shape)}", v.shape[-1] if v.ndim else 0
            check_fits(self.lm, what=what, model_name="", hook_name=name, width=width)
            v = v if v.is_floating_point() else v.float()
            by_position = isinstance(vector, SteeringVector) and v.ndim == 2
            edits[name] = PositionEdit(v, scale, gate) if by_position else VectorEdit(v, scale, gate)
        return Steering(self.lm, edits, Scope.of(scope, include_bos=include_bos))

    def measure(
        self,
        sae: SAE,
        features: Mapping[int, float] | Sequence[Mapping[int, float]],
        texts: str | Sequence[str],
        **options: Any,
    ) -> EditReport:
        """What `features(sae, features, **options)` would achieve on `texts`, from one pass over them."""
        batch = self.lm.encode([texts] if isinstance(texts, str) else texts)
        with self.features(sae, features, measure=True, **options) as steering:
            self.lm.logits(batch.input_ids, batch.attention_mask)
        return steering.report()

    def _vectors(self, vector: Any, hook: str | None) -> dict[str, Any]:
        if isinstance(vector, list | tuple) and vector and isinstance(vector[0], SteeringVector):
            return self._rows(vector, hook)
        if isinstance(vector, Mapping):
            if hook is not None:
                raise SteersmanError("a mapping of vectors names its own hook points: leave out hook=")
            return {self.lm.resolve_hook(name): v for name, v in vector.items()}
        if isinstance(vector, Tensor | list | tuple):
            if hook is None:
                raise SteersmanError("name the hook point of the vector with hook=, such as 'blocks.2.hook_resid_post'")
            return {self.lm.resolve_hook(hook): vector}
        known = isinstance(vector, SteeringVector)
        if not known and not (hasattr(vector, "hook_name") and hasattr(vector, "vector")):
            raise SteersmanError(
                f"a vector is a tensor, a mapping of them, or has .hook_name and .vector; got {vector!r}"
            )
        parts = vector.directions if known else {vector.hook_name: vector.vector}
        options = {"what": "this vector", "model_name": getattr(vector, "model_name", "") or "", "hook": hook}
        found = {check_fits(self.lm, hook_name=name, width=None, **options): v for name, v in parts.items()}
        kind, own = getattr(vector, "metadata", {}).get("model_type"), getattr(self.lm.config, "model_type", "")
        if kind and own and kind != own:
            raise SteersmanError(f"this vector was made for a model of type {kind!r}, {self.lm.name!r} is {own!r}")
        return found

    def _rows(self, vectors: Sequence[Any], hook: str | None) -> dict[str, Tensor]:
        """Several vectors, one per row of the batch: [B, D] at each hook point."""
        for i, v in enumerate(vectors):
            if not isinstance(v, SteeringVector) or v.positions is not None:
                raise SteersmanError(
                    f"row {i} of a list of vectors must be a SteeringVector with one direction for all positions"
                )
        found = [self._vectors(v, hook) for v in vectors]
        names = list(dict.fromkeys(name for parts in found for name in parts))
        for name in names:
            widths = sorted({len(parts[name]) for parts in found if name in parts})
            if len(widths) > 1:
                raise SteersmanError(f"vectors of different widths at {name}: {' and '.join(map(str, widths))}")
        width = {name: len(next(parts[name] for parts in found if name in parts)) for name in names}
        return {n: torch.stack([parts.get(n, torch.zeros(width[n])) for parts in found]) for n in names}
