"""The features of an SAE in a file, and beside it what they were made of: what is there is read, not made again.

`features.json` is a list of features, for anybody to read. `features.source.json` beside it says which SAE, store,
model and settings they follow from, and has the CRC-32 of the list: a list that somebody changed is not taken for ours.
"""

import json
import logging
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.files import write_json, write_text
from steersman.lm import LanguageModel
from steersman.lm.digest import tensor_hash
from steersman.reading import one_error, parse_json, read_bytes, read_json_object
from steersman.sae import SAE
from steersman.sealed import seal, unseal
from steersman.train.reports.features import Context, Feature
from steersman.train.store.store import ActivationStore

log = logging.getLogger(__name__)

FORMAT, VERSION = "steersman.features", 2
"""The version rises when the same SAE and store come to give other features."""
LARGEST = 1 << 30
"""Largest file that is read: half a kilobyte for each feature, a few for each with many contexts."""


def source_of(sae: SAE, store: ActivationStore, lm: LanguageModel, contexts: int) -> dict[str, Any]:
    """All that the features of an SAE follow from, to be compared: plain values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "sae": tensor_hash(*(value for _, value in sorted(sae.weights().items()))),
        "sae_config": json.loads(json.dumps(sae.cfg.record(), default=str)),
        "store": store.fingerprint,
        "hook_name": store.hook_of(sae),
        "model": lm.digest(),
        "contexts": contexts,
    }


def source_path(path: Path) -> Path:
    """Where the source of the features in the file `path` stands."""
    return path.with_name(f"{path.name.removesuffix('.json')}.source.json")


def save_features(path: Path, features: list[Feature], source: dict[str, Any]) -> None:
    """Write all features of an SAE to `path`, and beside it their source; each file whole or not at all."""
    text = json.dumps([asdict(feature) for feature in features], indent=1, ensure_ascii=False) + "\n"
    write_text(path, text)
    write_json(source_path(path), seal({**source, "features_crc32": f"{zlib.crc32(text.encode()):08x}"}))


def load_features(path: Path, source: dict[str, Any]) -> list[Feature] | None:
    """The features that `save_features` wrote to `path`; None where there are none, they follow from another source, or
    a file was changed since, which is said."""
    beside = source_path(path)
    if not path.is_file() or not beside.is_file():
        return None
    try:
        known = unseal(read_json_object(beside), beside)
        checksum = known.pop("features_crc32", None)
        if known != source:
            return None
        content = read_bytes(path, limit=LARGEST)
        if f"{zlib.crc32(content):08x}" != checksum:
            raise SteersmanError(f"{path} was changed or is damaged")
        with one_error(path):
            return [_feature(entry) for entry in parse_json(content, path)]
    except SteersmanError as error:
        log.warning("%s: the features are found anew", error)
        return None


def _feature(entry: dict[str, Any]) -> Feature:
    return Feature(**{**entry, "contexts": [Context(**context) for context in entry["contexts"]]})
