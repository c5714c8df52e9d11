"""`Steerer`: opens the contexts in which a language model runs steered (`steersman.steer.steering`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.lm.origin import written_at
from steersman.lm.tokens import Prompt
from steersman.sae import SAE
from steersman.steer.edit_report import EditReport, Meter
from steersman.steer.edits import (
    TABLES,
    DirectionEdit,
    Edit,
    FeatureEdit,
    Features,
    GateLike,
    PerRow,
    Read,
    ScheduleLike,
    VectorEdit,
    gated,
)
from steersman.steer.edits.highlight import Heads, Spans, highlight_edits
from steersman.steer.edits.reads import as_read
from steersman.steer.scope import Scope, ScopeLike
from steersman.steer.steering import Steering
from steersman.steer.vectors.directions import VectorInput, directions_of
from steersman.steer.vectors.vector import SteeringVector


class Steerer:
    """Steers a `LanguageModel` by features of an SAE, by vectors, or by any `Edit`.

    Every parameter may differ per row of the batch: pass one entry per prompt. Beams and `num_return_sequences`
    share their prompt's. Contexts nest and apply in the order they were entered.

    A context steers the passes of the thread or asyncio task that opened it (see `LanguageModel.edit`);
    `for_all_threads` makes those of every thread its own, for a server that generates in a thread of its own.
    """

    def __init__(self, lm: LanguageModel, *, for_all_threads: bool = False) -> None:
        self.lm = lm
        self.for_all_threads = for_all_threads

    def __repr__(self) -> str:
        return f"Steerer({self.lm})"

    def edit(
        self,
        hook: HookName | Sequence[HookName],
        edit: Edit,
        *,
        scope: ScopeLike = "all",
        gate: GateLike = 1.0,
        schedule: ScheduleLike | None = None,
        include_bos: bool = False,
        measure: bool = False,
    ) -> Steering:
        """Any edit at a hook point, or the same at several: see `steersman.steer.edits` for those there are, and
        `steersman.lm.hooks` for the hook points.

        `scope` as for `Scope.of`: the tokens whose state is changed, or whose attention (the queries), or whose logits
        (those of the next token). `gate` multiplies what the edit changes: a number, [B], a `Gate`, or several of those
        (`steersman.steer.edits.gates`); `schedule` does so by generated step, as for `Schedule.of`. `measure` is for
        features, as for `features`. Raises SteersmanError for a hook point at which the edit makes no sense.
        """
        features = edit
        edit = gated(edit, gate, schedule)
        if measure and not isinstance(features, FeatureEdit):
            raise SteersmanError(f"measure=True encodes features before and after: {type(edit).__name__} edits none")
        meter = Meter(features) if measure and isinstance(features, FeatureEdit) else None
        hooks = self.lm.resolve_hooks(hook)
        return self._steering(dict.fromkeys(hooks, edit), scope, include_bos, meter)

    def _steering(
        self, edits: Mapping[str, Edit], scope: ScopeLike, include_bos: bool, meter: Meter | None = None
    ) -> Steering:
        return Steering(self.lm, edits, Scope.of(scope, include_bos=include_bos), meter, self.for_all_threads)

    def features(
        self,
        sae: SAE,
        features: Features,
        *,
        mode: str = "add",
        units: str = "raw",
        threshold: PerRow = 0.0,
        scope: ScopeLike = "all",
        gate: GateLike = 1.0,
        schedule: ScheduleLike | None = None,
        hook: HookName | None = None,
        include_bos: bool = False,
        measure: bool = False,
    ) -> Steering:
        """Edit features by id: `{id: strength}` for all rows, or a list of those with one per row.

        `mode` is one of those of `steersman.steer.edits.feature`, `threshold` what two of them compare with. `units`:
        `raw` activation units; `max_act`, multiples of the feature's largest activation in training; `norm_frac`, such
        that strength times |d_j| is this fraction of the median |h|. `scope` as for `Scope.of`; `gate` and `schedule`
        as for `edit`. `hook` is needed only for an SAE that records none. `measure` also encodes each steered state
        before and after the edit, for `report()`.

        A transcoder's features are edited where it writes (`hook_name_out`), by the code of what the same pass has
        where it reads. What its prediction leaves over stays as it is.

        Raises SteersmanError for a feature id out of range, a dead feature in `max_act` units, an SAE without the
        statistics its units need, and an SAE of another model, hook point or width.
        """
        where = written_at(self.lm, sae, hook)
        if measure:
            sae.check_residual("measure=True encodes the edited states, which")
        edit = FeatureEdit(sae, features, mode=mode, units=units, threshold=threshold)
        where_of = {"scope": scope, "include_bos": include_bos, "measure": measure}
        return self.edit(where, edit, gate=gate, schedule=schedule, **where_of)

    def vector(
        self,
        vector: VectorInput,
        *,
        scale: PerRow = 1.0,
        mode: str = "add",
        hook: HookName | None = None,
        scope: ScopeLike = "all",
        gate: GateLike = 1.0,
        schedule: ScheduleLike | None = None,
        include_bos: bool = False,
    ) -> Steering:
        """Add `scale` times a vector, or edit h along it by another rule.

        The vector is a `SteeringVector` (or a list of them, one per row), a tensor [D] or [B, D] with `hook`, a mapping
        {hook: tensor}, or an object with `hook_name` and `vector` (and `model_name`).

        A `SteeringVector` that has one direction per position is added from the front: row p at absolute position p; of
        one that has a direction per step row p is added at generated step p.
        `scale` is a number or [B]: `scale=[0, 2, 4]` on three copies of a prompt is a dose-response curve in one batch.
        `mode` "add" adds the vector at the length it has; any other is a rule of `direction`, and `scale` its strength:
        `mode="project_out"` takes the direction away, `mode="cap", scale=4` keeps h . v / |v| at 4 or below. `gate` and
        `schedule` as for `edit`. Raises SteersmanError for a vector of another model, hook point or width, and for one
        that is not finite.
        """
        if mode != "add":
            options: dict[str, Any] = {"gate": gate, "schedule": schedule, "scope": scope, "include_bos": include_bos}
            return self.direction(hook, read=vector, rule=mode, value=scale, **options)
        table = TABLES[vector.per] if isinstance(vector, SteeringVector) else VectorEdit
        edits: dict[str, Edit] = {
            name: gated((table if v.ndim == 2 else VectorEdit)(v, scale), gate, schedule)
            for name, v in directions_of(self.lm, vector, hook).items()
        }
        return self._steering(edits, scope, include_bos)

    def direction(
        self,
        hook: HookName | Sequence[HookName] | None = None,
        *,
        read: Any,
        write: Any = None,
        rule: str = "add",
        value: Any = 1.0,
        threshold: PerRow | Mapping[HookName, PerRow] = 0.0,
        keep_norm: Any = False,
        scope: ScopeLike = "all",
        gate: GateLike = 1.0,
        schedule: ScheduleLike | None = None,
        include_bos: bool = False,
    ) -> Steering:
        """Read a number of the state and write along a direction by a rule: see `DirectionEdit` for what each is.

        `read` is a vector (as for `vector`: a `SteeringVector` brings its hook points), (w, b) of a logistic probe, or
        a `Read`: `Feature(sae, j)`, `Projection.span([v1, v2])`, ... `value`, `threshold` and `write` may be mappings
        {hook point: what is used there}, as for capping, where the limit is measured layer by layer.

            st.direction(12, read=v, rule="cap", value=3.0)
            st.direction(12, read=(w, b), rule="probe", write=z, value=2.0)

        Raises SteersmanError for what was made for another model, hook point or width, and for what a rule cannot use.
        """
        reads = self._reads(hook, read)
        edits: dict[str, Edit] = {
            name: gated(
                DirectionEdit(
                    one,
                    self._at(write, name, "write"),
                    rule=rule,
                    value=self._at(value, name, "value"),
                    threshold=self._at(threshold, name, "threshold"),
                    keep_norm=keep_norm,
                ),
                gate,
                schedule,
            )
            for name, one in reads.items()
        }
        return self._steering(edits, scope, include_bos)

    def _reads(self, hook: HookName | Sequence[HookName] | None, read: Any) -> dict[str, Read]:
        """Hook point -> what is read there, on the model's device."""
        if isinstance(read, Read) or (
            isinstance(read, tuple) and len(read) == 2 and not isinstance(read, SteeringVector)
        ):
            known = as_read(read)
            where = hook if hook is not None else known.origin.hook_name
            if where == "":
                raise SteersmanError(f"{known.what} records no hook point: name where it is to be read")
            return dict.fromkeys(self.lm.resolve_hooks(where), known)
        if hook is None or isinstance(hook, str | int):
            placed = directions_of(self.lm, read, hook)
        else:
            placed = {self.lm.resolve_hook(name): directions_of(self.lm, read, name) for name in hook}
            placed = {name: v for name, one in placed.items() for v in one.values()}
        if isinstance(read, SteeringVector) and read.positions is not None:
            raise SteersmanError("this vector has a direction for each position: read .mean_over_positions() of it")
        return {name: as_read(v) for name, v in placed.items()}

    def _at(self, given: Any, hook: str, what: str) -> Any:
        """What is used at a hook point: of a mapping its entry, of a vector at several hook points its part."""
        if isinstance(given, SteeringVector):
            given = given.directions if len(given.directions) > 1 else given.vector
        if not isinstance(given, Mapping):
            return given
        placed = {self.lm.resolve_hook(name): value for name, value in given.items()}
        if hook not in placed:
            raise SteersmanError(f"{what} has nothing for {hook}: it has {', '.join(placed)}")
        return placed[hook]

    def highlight(
        self,
        prompts: str | Sequence[Prompt],
        spans: Spans,
        *,
        heads: Heads = None,
        alpha: float = 0.01,
        include: bool = False,
        spare_bos: bool = False,
        scope: ScopeLike = "all",
        gate: GateLike = 1.0,
        schedule: ScheduleLike | None = None,
    ) -> Steering:
        """Make chosen heads look at parts of the prompts: they give every other token of the prompt `alpha` times the
        attention, normalised again (PASTA, arXiv 2311.02262).

        `spans` of a prompt are a substring (wherever it occurs), a pair (start, stop) of characters, or a list of
        those; with a list of prompts, one entry for each, of which an empty list highlights nothing. `prompts` are then
        given to `lm.generate` in the same order. `heads`: {layer: [query head, ...]}, (layer, head) pairs as a
        `HeadProfile` has them, or None for all. `include` gives the parts 1 / alpha times the attention instead;
        `spare_bos` leaves the BOS as it is, where many heads rest their attention. Tokens that are generated keep
        theirs. `scope` (the queries), `gate` and `schedule` are as for `edit`.

        Raises SteersmanError for a span that is not in its prompt, prompts given as token ids, heads that the model
        does not have, and an attention implementation that takes no bias.
        """
        edits = highlight_edits(self.lm, prompts, spans, heads=heads, alpha=alpha, include=include, spare_bos=spare_bos)
        return self._steering({hook: gated(edit, gate, schedule) for hook, edit in edits.items()}, scope, True)

    def measure(
        self,
        sae: SAE,
        features: Features,
        texts: str | Sequence[str],
        *,
        mode: str = "add",
        units: str = "raw",
        scope: ScopeLike = "all",
        gate: GateLike = 1.0,
        schedule: ScheduleLike | None = None,
        hook: HookName | None = None,
        include_bos: bool = False,
    ) -> EditReport:
        """What `features(sae, features, ...)` would achieve on `texts`, from one pass over them."""
        batch = self.lm.encode([texts] if isinstance(texts, str) else texts)
        with self.features(
            sae,
            features,
            mode=mode,
            units=units,
            scope=scope,
            gate=gate,
            schedule=schedule,
            hook=hook,
            include_bos=include_bos,
            measure=True,
        ) as steering:
            self.lm.logits(batch.input_ids, batch.attention_mask)
        return steering.report()
