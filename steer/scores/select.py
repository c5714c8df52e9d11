"""From scores to what steers: a set of features with strengths, over several SAEs and hook points at once."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from steersman.doors import number
from steersman.errors import SteersmanError
from steersman.sae import SAE
from steersman.steer.edits import FeatureEdit, GateLike, ScheduleLike, gated
from steersman.steer.effects.measured import sae_identity
from steersman.steer.scope import Scope, ScopeLike
from steersman.steer.scores.table import FeatureScores, Scored, only
from steersman.steer.steerer import Steerer
from steersman.steer.steering import Steering


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSet(Mapping[str, dict[int, float]]):
    """Features with strengths at each of several hook points: a mapping {hook point: {feature: strength}}, each entry
    of which is what `Steerer.features` takes.

    >>> chosen = FeatureSet(strengths={"blocks.1.hook_resid_post": {7: 2.0}, "blocks.2.hook_resid_post": {3: -1.0}})
    >>> print(chosen.to_text())
    blocks.1.hook_resid_post  7=2
    blocks.2.hook_resid_post  3=-1
    """

    strengths: Mapping[str, Mapping[int, float]]
    """Hook point -> {feature id: strength}."""
    mode: str = "add"
    """What is done with each feature: a mode of `Steerer.features`."""
    units: str = "raw"
    """What the strengths are in, as for `Steerer.features`."""
    saes: Mapping[str, str] = field(default_factory=dict)
    """Hook point -> hash of the SAE whose features these are; nothing where it is not known."""

    def __post_init__(self) -> None:
        held = {hook: {int(j): float(s) for j, s in entry.items()} for hook, entry in self.strengths.items() if entry}
        if not held:
            raise SteersmanError("no feature was selected: there is nothing to steer by")
        object.__setattr__(self, "strengths", held)

    def __getitem__(self, hook: str) -> dict[int, float]:
        return dict(self.strengths[hook])

    def __iter__(self) -> Iterator[str]:
        return iter(self.strengths)

    def __len__(self) -> int:
        return len(self.strengths)

    def __repr__(self) -> str:
        return f"FeatureSet({self.n_features} features at {len(self)} hook points, {self.mode})"

    @property
    def n_features(self) -> int:
        """How many features in all."""
        return sum(len(entry) for entry in self.strengths.values())

    def to_text(self) -> str:
        """A line for each hook point, its features as `--feature` takes them."""
        return "\n".join(
            f"{hook}  {' '.join(f'{j}={s:g}' for j, s in entry.items())}" for hook, entry in self.strengths.items()
        )

    def scaled(self, factor: float) -> "FeatureSet":
        """All strengths `factor` times as large. Raises SteersmanError where strengths are plain factors themselves."""
        if self.mode not in ("add", "clamp", "floor"):
            raise SteersmanError(f"strengths of mode {self.mode!r} are factors: give each its own")
        factor = number(factor, "the factor")
        held = {hook: {j: factor * s for j, s in entry.items()} for hook, entry in self.strengths.items()}
        return replace(self, strengths=held)

    def singles(self) -> list["FeatureSet"]:
        """Each feature as a set of its own."""
        return [
            replace(self, strengths={hook: {j: s}}) for hook, entry in self.strengths.items() for j, s in entry.items()
        ]

    def edits(self, saes: SAE | Sequence[SAE]) -> dict[str, FeatureEdit]:
        """{hook point: edit}, which `calibrate`, `evaluate_steering` and files of edits take as well.

        `saes` are those of the hook points, in any order; others are passed over. Raises SteersmanError for a hook
        point without its SAE, and for another SAE than the one that was scored.
        """
        given = {sae.cfg.hook_name: sae for sae in ([saes] if isinstance(saes, SAE) else saes)}
        if len(self) == len(given) == 1 and "" in given:  # a single SAE that records no hook point
            given = {next(iter(self)): given[""]}
        edits = {}
        for hook, entry in self.strengths.items():
            if hook not in given:
                raise SteersmanError(f"features at {hook} are in the set, and no SAE of that hook point was given")
            sae = given[hook]
            if hook in self.saes and sae_identity(sae)["hash"] != self.saes[hook]:
                raise SteersmanError(f"the features at {hook} were chosen for another SAE than the one given")
            edits[hook] = FeatureEdit(sae, entry, mode=self.mode, units=self.units)
        return edits

    def steer(
        self,
        st: Steerer,
        saes: SAE | Sequence[SAE],
        *,
        scope: ScopeLike = "all",
        gate: GateLike = 1.0,
        schedule: ScheduleLike | None = None,
        include_bos: bool = False,
    ) -> Steering:
        """One context that steers by all of them, at all hook points. `scope`, `gate` and `schedule` as for
        `Steerer.features`; features chosen by their answers act at the tokens whose outputs choose the answer,
        `last_prompt+generation` (CorrSteer's)."""
        edits = {hook: gated(edit, gate, schedule) for hook, edit in self.edits(saes).items()}
        return Steering(st.lm, edits, Scope.of(scope, include_bos=include_bos), for_all_threads=st.for_all_threads)


def select(
    scores: FeatureScores | Sequence[FeatureScores],
    by: str,
    n: int = 1,
    *,
    sign: str = "positive",
    strength: float | None = None,
    per_hook: bool = False,
    above_null: bool = False,
    where: Mapping[str, float] | None = None,
    mode: str = "add",
    units: str = "raw",
) -> FeatureSet:
    """The n best features by one score, of one table or of several SAEs' together, with strengths to steer by.

    Args:
        scores: one table, or one for each SAE.
        by: the score that ranks.
        n: how many in all, or with `per_hook` for each hook point.
        sign: positive for the highest scores, negative for the lowest, both for the largest in size.
        strength: the strength of each, with the sign of its score; by default the score's own, which not every score
            has (`correlation`, `f_statistic`, `contrast` and `output` do).
        above_null: keep only what exceeds the null of the best of all features.
        where: least values of other scores, such as `{"output": 0.1}`: features that are known to reach the output.
        mode, units: of the set, as for `Steerer.features`.

    CorrSteer's choices: S, the best of all, is `select(tables, "correlation")`; A, the best of every layer, is
    `select(tables, "correlation", per_hook=True)`; P, what helps on validation data, is `pruned(A, ...)`.

    Raises SteersmanError for a score that a table lacks, no feature left, and strengths that the score does not have.
    """
    tables = only(scores)
    found: list[tuple[float, int, Scored]] = []
    for at, table in enumerate(tables):
        kept = [feature for feature in table.top(by, table.d_sae, sign=sign) if _passes(table, feature, where)]
        kept = [feature for feature in kept if feature.above_null or not above_null]
        found += [(abs(feature.value), at, feature) for feature in (kept[:n] if per_hook else kept)]
    found.sort(key=lambda entry: -entry[0])  # stable: ties stay in the order of the tables
    chosen = found if per_hook else found[:n]
    strengths: dict[str, dict[int, float]] = {table.hook_name: {} for table in tables}
    if len(strengths) != len(tables):
        raise SteersmanError("two of the tables are of one hook point: give one for each")
    for _, at, feature in chosen:
        strengths[tables[at].hook_name][feature.feature] = _strength(by, feature, strength)
    if not chosen:
        raise SteersmanError(
            f"no feature is left to select by {by!r}: ask for another sign, or less of above_null and where"
        )
    hashes = {table.hook_name: str(table.sae["hash"]) for table in tables if "hash" in table.sae}
    held = {hook: entry for hook, entry in strengths.items() if entry}
    return FeatureSet(
        strengths=held, mode=mode, units=units, saes={hook: hashes[hook] for hook in held & hashes.keys()}
    )


def _passes(table: FeatureScores, found: Scored, where: Mapping[str, float] | None) -> bool:
    return all(float(table[name].values[found.feature]) >= least for name, least in (where or {}).items())


def _strength(by: str, found: Scored, strength: float | None) -> float:
    if strength is not None:
        return math.copysign(1.0, found.value) * number(strength, "strength")
    if found.strength is None or not math.isfinite(found.strength):
        raise SteersmanError(f"score {by!r} says nothing of how strong to steer: give strength=")
    return found.strength


def pruned(features: FeatureSet, measure: Callable[[FeatureSet | None], float]) -> FeatureSet:
    """The features each of which, steered by alone, measures better than no steering: CorrSteer's P.

    `measure` gives the validation score of steering by a set, and of none (None); n + 1 calls. Raises SteersmanError
    where no feature helps.
    """
    base = measure(None)
    kept = [single for single in features.singles() if measure(single) > base]
    if not kept:
        raise SteersmanError(f"none of the {features.n_features} features measures better than no steering ({base:g})")
    strengths: dict[str, dict[int, float]] = {}
    for single in kept:
        for hook, entry in single.items():
            strengths.setdefault(hook, {}).update(entry)
    return replace(features, strengths=strengths)
