"""`steersman compare`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from steersman.commands.options import ComputeOptions, PrintOptions, on_kernels
from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.sae import compare_saes
from steersman.sae.compare import MAX_PAIRS, SHARED, SHOWN
from steersman.train import ActivationStore


@dataclass(frozen=True, kw_only=True)
class CompareCommand(ComputeOptions, PrintOptions):
    """See which features of several SAEs are the same, over seeds, widths, layers and architectures: how alike each
    feature's nearest is, the best matching of one to one (MCC), and the features that the other SAE does not have."""

    sae: Positional[tuple[str, ...]]
    """Folders, files or hub ids of the SAEs, two or more."""
    by: Literal["decoder", "encoder", "both", "activations"] | None = None
    """What is compared: the decoder's rows, the encoder's, the mean of both, or, which is so where a store is given,
    the activations."""
    store: str | None = None
    """Folder of a store with the hook points of all SAEs, whose activations are then compared: of SAEs that read other
    widths, or other layers."""
    tokens: int = 200_000
    """Rows of the store to read, at most."""
    threshold: float = SHARED
    """Similarity above which a matched pair counts as one feature."""
    max_pairs: int = MAX_PAIRS
    """Features of one SAE times features of another up to which they are matched one to one, which holds 8 bytes for
    each; beyond, there is no MCC, and pairs are those of which each is the other's nearest."""
    feature: int | None = None
    """Follow this feature of the first SAE through the others in their order, such as that of their layers: in each the
    feature most like the one before."""
    top: int = SHOWN
    """Unmatched features of each SAE to show."""
    out: str | None = None
    """Also write the figures, with all unmatched features, to this JSON file."""


@on_kernels
def run(config: CompareCommand) -> None:
    """`steersman compare`."""
    if len(config.sae) < 2:
        raise SteersmanError("give two SAEs or more to compare")
    if config.tokens < 1 or config.top < 0 or config.max_pairs < 0:
        raise SteersmanError("--tokens must be at least 1, --top and --max-pairs at least 0")
    store = None if config.store is None else ActivationStore.open(config.store)
    saes = [config.load_sae(path) for path in config.sae]
    if config.feature is not None:
        saes[0].check_feature(config.feature)
    found = compare_saes(
        *saes,
        by=config.by,
        store=store,
        names=_names(config.sae),
        threshold=config.threshold,
        max_pairs=config.max_pairs,
        tokens=config.tokens,
    )
    record = found.to_json()
    steps = [] if config.feature is None else found.along(config.feature)
    if steps:
        record["along"] = [{**asdict(one), "label": found.labels[one.sae].text(one.feature)} for one in steps]
    config.show(lambda: found.along_to_text(steps) if steps else found.to_text(config.top), record)
    if config.out is not None:
        write_json(config.out, record)


def _names(paths: tuple[str, ...]) -> tuple[str, ...]:
    """The last parts of the paths; letters where two are the same."""
    names = tuple(Path(path).name for path in paths)
    return names if len(set(names)) == len(names) and all(names) else ()
