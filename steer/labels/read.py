"""Labels from whatever file they are in."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.reading import check_regular, read_json
from steersman.sae.config import SAEConfig
from steersman.sae.feature_labels import FeatureLabel, FeatureLabels
from steersman.steer.labels.combine import both_sides
from steersman.steer.labels.contexts import words_fired_on
from steersman.steer.labels.neuronpedia import read_neuronpedia

_LARGEST = 1 << 30  # a features.json has half a kilobyte for each feature, and more with many contexts


def read_labels(path: str | PathLike[str], cfg: SAEConfig | None = None) -> FeatureLabels:
    """The labels in a file, of the SAE of configuration `cfg` where one is given:

    - `labels.jsonl`, as `steersman label` and `FeatureLabels.save` write it;
    - an export of Neuronpedia's explanations (`.jsonl`, `.jsonl.gz`, a folder of `batch-N.jsonl.gz`);
    - `{"12": "fog", ...}`, a JSON file that somebody wrote;
    - the `features.json` of `steersman features`: an entry's `label`, or else the tokens it fires on and promotes.

    Raises SteersmanError for any other file, and for labels of another SAE.
    """
    file = Path(path)
    if file.is_dir() or file.suffix == ".gz":
        return read_neuronpedia(path, cfg)
    if file.suffix == ".jsonl":
        found = read_neuronpedia(path, cfg) if _explains(file) else FeatureLabels.load(path)
    else:
        found = _from_json(read_json(path, limit=_LARGEST), path)
    if cfg is not None:
        found.check(cfg, str(path))
    return found


def _explains(path: Path) -> bool:
    """Whether the first line is a row of Neuronpedia's."""
    check_regular(path)
    with open(path, "rb") as file:
        first = file.readline(1 << 20)
    try:
        return "modelId" in json.loads(first)
    except (ValueError, TypeError, RecursionError):
        return False


def _from_json(found: Any, path: str | PathLike[str]) -> FeatureLabels:
    try:
        if isinstance(found, dict):
            return FeatureLabels({int(feature): FeatureLabel(text=str(label)) for feature, label in found.items()})
        if found and "modelId" in found[0]:
            return read_neuronpedia(path)
        return FeatureLabels({int(entry["id"]): _of_entry(entry) for entry in found})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, SteersmanError):
            raise
        raise SteersmanError(
            f'{path} holds no feature labels: {{"12": "fog"}}, a labels.jsonl, the features.json of `steersman '
            "features` or an export of Neuronpedia is needed"
        ) from error


def _of_entry(entry: dict[str, Any]) -> FeatureLabel:
    if entry.get("label"):
        return FeatureLabel(text=str(entry["label"]))
    (reads,) = words_fired_on([entry]).values()
    sides = both_sides(reads, [entry.get("promotes", ())])
    source = "+".join(["contexts"] * bool(sides.reads) + ["vocab"] * bool(sides.writes))
    return FeatureLabel(text=sides.text(), source=source)
