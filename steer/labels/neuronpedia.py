"""Neuronpedia's explanations of features, in and out.

An export is JSON lines, plain or gzipped, or several `batch-N.jsonl.gz` in a folder `explanations/`, as lie under
https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/index.html?prefix=v1/. A row is a feature's explanation:

| column | holds |
|---|---|
| `modelId` | the model's name there, as gpt2-small |
| `layer` | the source: the SAE's layer and set, as 6-res-jb |
| `index` | feature id, a string |
| `description` | the explanation |
| `typeName`, `explanationModelName` | the method and the model that it was made with; null for neither |
| `notes` | free text; here the label's source and scores, so that what was written is read again as it was |

and `id`, `authorId` and columns of the site's own, which are not read. An older export is one JSON list of such rows.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.files import make_folder, write_bytes
from steersman.reading import check_regular, parse_json, shown
from steersman.sae.config import SAEConfig
from steersman.sae.feature_labels import FeatureLabel, FeatureLabels
from steersman.steer.labels.journal import digest

__all__ = ["read_neuronpedia", "write_neuronpedia"]

_LONGEST_LINE = 1 << 20
_MOST_LINES = 1 << 23
_LARGEST_LIST = 1 << 28
LONGEST_DESCRIPTION = 512
"""Characters of a description that the site takes."""
_SOURCE = "neuronpedia"
_AUTHOR = "clkht01d40000jv08hvalcvly"
"""Whose the rows are, unless said: the user that SAEDashboard's export names too."""


def read_neuronpedia(path: str | PathLike[str], cfg: SAEConfig | None = None) -> FeatureLabels:
    """The explanations in an export, a file or a folder of them, as labels; the first of each feature.

    With `cfg`, the configuration of an SAE, they must be of that SAE: its features, its layer and, where its origin
    says which page of Neuronpedia is its, that one.

    Raises SteersmanError, naming file and line, for what is no such export, one of several sources, or another SAE's.
    """
    labels: dict[int, FeatureLabel] = {}
    pages: set[tuple[str, str]] = set()
    for row, where in _rows(Path(path)):
        feature, page, label = _read(row, where)
        pages.add(page)
        if len(pages) > 1:
            raise SteersmanError(
                f"{where}: a row of {page[0]}/{page[1]} in an export of another source: give one alone"
            )
        labels.setdefault(feature, label)
    if not pages:
        raise SteersmanError(f"{path} holds no explanations")
    found = FeatureLabels(labels)
    if cfg is not None:
        _check_page(*pages.pop(), cfg, str(path))
        found = found.of(cfg)
        found.check(cfg, str(path))
    return found


def _check_page(model: str, source: str, cfg: SAEConfig, path: str) -> None:
    known = cfg.metadata.get("neuronpedia_id")
    if isinstance(known, str) and known.casefold() != f"{model}/{source}".casefold():
        raise SteersmanError(f"{path} explains {model}/{source}, and this SAE is {known}")
    layer, own = re.match(r"\d+(?=-)", source), cfg.hook_layer
    if layer is not None and own is not None and int(layer[0]) not in (own, own + _pre(cfg)):
        raise SteersmanError(f"{path} explains layer {layer[0]} ({source}), and this SAE is at {cfg.hook_name}")


def _pre(cfg: SAEConfig) -> int:
    """1 for an SAE of a layer's output, which some sets count as the input of the next layer."""
    return int(cfg.hook_name.endswith("hook_resid_post"))


def _rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Each row and where it stands."""
    if path.is_dir():
        files = sorted(path.glob("batch-*.jsonl*")) or sorted((path / "explanations").glob("batch-*.jsonl*"))
        if not files:
            raise SteersmanError(f"{path} has no batch-0.jsonl.gz, nor a folder explanations with one")
        for file in files:
            yield from _rows(file)
        return
    size = check_regular(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            if file.read(1) == b"[":
                if size > _LARGEST_LIST:
                    raise SteersmanError(f"{path}: a JSON list of {size:,} bytes; at most {_LARGEST_LIST:,} are read")
                content = b"[" + file.read(_LARGEST_LIST)
                for number, row in enumerate(parse_json(content, path), 1):
                    yield row, f"{path}, entry {number}"
                return
            file.seek(0)
            for number in range(1, _MOST_LINES):
                line = file.readline(_LONGEST_LINE + 1)
                where = f"{path}, line {number}"
                if not line:
                    return
                if len(line) > _LONGEST_LINE:
                    raise SteersmanError(f"{where}: longer than {_LONGEST_LINE:,} bytes")
                if line.strip():
                    yield parse_json(line, where), where
    except (OSError, EOFError, zlib.error) as error:
        raise SteersmanError(f"{path} cannot be read: {error}") from error


def _read(row: Any, where: str) -> tuple[int, tuple[str, str], FeatureLabel]:
    if not isinstance(row, dict):
        raise SteersmanError(f"{where}: a row is {shown(row)}, not a JSON object")
    model, source, index, text = (row.get(name) for name in ("modelId", "layer", "index", "description"))
    if not all(isinstance(value, str) for value in (model, source, text)):
        raise SteersmanError(f"{where}: a row needs modelId, layer, index and description")
    if not re.fullmatch(r"\d{1,9}", str(index)):
        raise SteersmanError(f"{where}: index is {shown(index)}, not a feature id")
    own = _own(row.get("notes"))
    if own is None:
        made = [str(row[name]) for name in ("typeName", "explanationModelName") if row.get(name)]
        own = {"source": ":".join([_SOURCE, "/".join(made)]) if made else _SOURCE, "scores": {}}
    label = FeatureLabel(text=" ".join(str(text).split()), source=own["source"], scores=own["scores"])
    return int(str(index)), (str(model), str(source)), label


def _own(notes: Any) -> dict[str, Any] | None:
    """What `write_neuronpedia` put into the notes; None where it did not write them."""
    try:
        found = json.loads(notes)["steersman"]
        scores = {str(name): float(value) for name, value in found["scores"].items()}
        return {"source": str(found["source"]), "scores": scores}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def write_neuronpedia(
    labels: FeatureLabels,
    path: str | PathLike[str],
    *,
    model_id: str,
    source_id: str,
    author_id: str = _AUTHOR,
) -> None:
    """Write labels as an export that Neuronpedia's importer reads, `explanations/batch-0.jsonl.gz` where `path` is a
    folder (a name without .jsonl or .jsonl.gz), else that file.

    `model_id` and `source_id` are the model's and the SAE's names there (gpt2-small, 6-res-jb). A label that came from
    there keeps its method and model; others have none, as the site knows only its own. Longer texts than the 512
    characters that it takes are cut.
    """
    target = Path(path)
    if not re.search(r"\.jsonl(\.gz)?$", target.name):
        target = target / "explanations" / "batch-0.jsonl.gz"
    make_folder(target.parent)
    lines = []
    for feature, label in labels.items():
        kind, by = _made_with(label.source)
        row = {
            "id": f"c{digest(model_id, source_id, feature, label.text)[:24]}",
            "modelId": model_id,
            "layer": source_id,
            "index": str(feature),
            "authorId": author_id,
            "description": label.text[:LONGEST_DESCRIPTION],
            "typeName": kind,
            "explanationModelName": by,
        }
        if not label.source.startswith(_SOURCE) or label.scores:
            row["notes"] = json.dumps({"steersman": {"source": label.source, "scores": dict(label.scores)}})
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    content = "".join(lines).encode()
    write_bytes(target, gzip.compress(content, mtime=0) if target.suffix == ".gz" else content)


def _made_with(source: str) -> tuple[str | None, str | None]:
    found = re.fullmatch(rf"{_SOURCE}:([^/]+)(?:/(.+))?", source)
    return (found[1], found[2]) if found else (None, None)
