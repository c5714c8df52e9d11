"""`steersman neighbours`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from steersman.commands.find import neighbours_record, neighbours_to_text
from steersman.commands.options import ComputeOptions, LabelOptions, PrintOptions, on_kernels
from steersman.errors import SteersmanError
from steersman.sae import SAE, feature_neighbours
from steersman.sae.neighbours import Sign
from steersman.steer.feature_values import feature_ids
from steersman.train import ActivationStore
from steersman.train.reports.coactivation import CoActivations, co_activating
from steersman.visible import visible


@dataclass(frozen=True, kw_only=True)
class NeighboursCommand(ComputeOptions, LabelOptions, PrintOptions):
    """See the features nearest others: by what they write (decoder), by what they read (encoder), and with a store by
    firing on the same tokens (coactivation)."""

    sae: str
    """Folder, file or hub id of the SAE."""
    feature: tuple[str, ...]
    """Feature id; several are shown one after another."""
    by: tuple[Literal["decoder", "encoder", "coactivation"], ...] = ()
    """What to compare; by default decoder and encoder, and coactivation where a store is given."""
    store: str | None = None
    """Folder of a store of the SAE's hook point, for coactivation: one pass over it."""
    top: int = 10
    """Features shown of each kind."""
    sign: Sign = "positive"
    """Of decoder and encoder rows, which come first: those that point the same way, the opposite way (negative), or
    either (both)."""


@on_kernels
def run(config: NeighboursCommand) -> None:
    """`steersman neighbours`."""
    asked = feature_ids(config.feature)
    if not asked or config.top < 1:
        raise SteersmanError("give --feature, the ids whose neighbours to show, and a --top of at least 1")
    kinds = config.by or ("decoder", "encoder", *(("coactivation",) if config.store is not None else ()))
    if ("coactivation" in kinds) != (config.store is not None):
        raise SteersmanError("--by coactivation and --store belong together: it counts tokens of the store")
    sae = config.load_sae(config.sae, config.labels)
    for feature in asked:
        sae.check_feature(feature)
    tables = {
        kind: feature_neighbours(sae, asked, config.top, by=kind, sign=config.sign)
        for kind in kinds
        if kind != "coactivation"
    }
    together = None
    if config.store is not None:
        together = co_activating(sae, ActivationStore.open(config.store), asked, config.top)
    records: list[dict[str, Any]] = []
    sections: list[str] = []
    for row, feature in enumerate(asked):
        record: dict[str, Any] = {"feature": feature, "label": sae.labels.text(feature)}
        lines = [f"feature {feature}  {visible(record['label'])}".rstrip()]
        for kind in dict.fromkeys(kinds):
            if kind == "coactivation":
                if together is not None:
                    lines += [f"\nfires together with, on {_tokens(together)}", _together(together, feature, sae)]
                    record[kind] = [{**asdict(one), "label": sae.labels.text(one.feature)} for one in together[feature]]
            else:
                found = tables[kind].of(row)
                lines += [f"\nnearest by {kind} row", neighbours_to_text(found, sae)]
                record[kind] = neighbours_record(found, sae)
        records.append(record)
        sections.append("\n".join(lines))
    config.show(lambda: "\n\n".join(sections), records)


def _tokens(found: CoActivations) -> str:
    part = "" if found.share >= 1 else f" (pairs counted on {found.share:.1%} of them)"
    return f"{found.n_tokens:,} tokens{part}"


def _together(found: CoActivations, feature: int, sae: SAE) -> str:
    lines = [f"{'feature':>8}  {'cosine':>7}  {'both':>9}  {'tokens':>9}  label"]
    for one in found[feature]:
        label = visible(sae.labels.text(one.feature))
        lines.append(f"{one.feature:>8}  {one.cosine:>7.3f}  {one.together:>9,}  {one.count:>9,}  {label}".rstrip())
    return "\n".join(lines) if found[feature] else "no feature fires with it"
