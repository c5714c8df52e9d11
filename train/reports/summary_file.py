"""What a pass over a store found of an SAE's features, in full, as a file: a site is written again without the pass.

`features.safetensors` beside the SAE, about 4 kB a feature; its header says which SAE, store, model and settings it
follows from, as `features.source.json` does for `features.json`.
"""

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from steersman.errors import SteersmanError
from steersman.reading import parse_json
from steersman.sae.base import FeatureStats
from steersman.sae.coactivation import CoActiveTable
from steersman.sae.features import FeatureDetails, FeatureSummary
from steersman.tensor_files import check_format, load_tensors, save_tensors

log = logging.getLogger(__name__)

SUMMARY = "features.safetensors"
FORMAT, VERSION = "steersman.feature_summary", 1


def save_summary(path: Path, summary: FeatureSummary, source: dict[str, Any]) -> None:
    """Write a summary with details, whole or not at all."""
    assert summary.details is not None
    tensors, plain = {}, {}
    for record in (summary, summary.stats, summary.details):
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = value
            elif isinstance(value, CoActiveTable):
                tensors |= {f"partners.{name}": tensor for name, tensor in value._asdict().items()}
            elif isinstance(value, int | float):
                plain[field.name] = value
    header = {"format": FORMAT, "version": str(VERSION), "plain": json.dumps(plain), "source": json.dumps(source)}
    save_tensors(path, tensors, header)


def load_summary(path: Path, source: dict[str, Any]) -> FeatureSummary | None:
    """The summary that `save_summary` wrote to `path`; None where there is none, it follows from another source, or the
    file is damaged, which is said."""
    if not path.is_file():
        return None
    try:
        tensors, header = load_tensors(path)
        check_format(path, header, FORMAT, VERSION, "summary of features")
        if parse_json(header.get("source", ""), path) != source:
            return None
        known = {**tensors, **parse_json(header.get("plain", ""), path)}
        partners = CoActiveTable(**{name: known[f"partners.{name}"] for name in CoActiveTable._fields})
        stats = FeatureStats(**{field.name: known[field.name] for field in fields(FeatureStats)})
        known |= {"partners": partners, "stats": stats}
        known["details"] = FeatureDetails(**{field.name: known[field.name] for field in fields(FeatureDetails)})
        return FeatureSummary(**{field.name: known[field.name] for field in fields(FeatureSummary)})
    except (SteersmanError, KeyError, TypeError) as error:
        log.warning("%s: %s: the features are found anew", path, error)
        return None
