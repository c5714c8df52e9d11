"""Features with their texts in the two forms that dashboards are made from, at most 128 features a file.

- `dashboards/batch-N.json`: SAEDashboard's batches (`NeuronpediaDashboardBatch`), from which its export makes all that
  Neuronpedia's importer reads. They have no place for labels: those are `write_neuronpedia`'s.
- `upload/batch-N.json`: bodies of Neuronpedia's `POST /api/feature/upload-batch`, labels included, without the features
  of which no text is known, as the site wants at least one.

Comparisons with neurons and histograms, which SAEDashboard has room for, are left empty.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from steersman.files import make_folder, write_text
from steersman.sae import SAE, FeatureLabels
from steersman.steer.labels.describe import FeatureExamples
from steersman.steer.labels.neuronpedia import LONGEST_DESCRIPTION
from steersman.steer.labels.prompts import LabelExample
from steersman.steer.scores.output_tokens import OutputTokens

FEATURES_A_FILE = 128
_LOGITS = 20
_EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "freq_hist_data_bar_values", "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector",
)  # fmt: skip
"""Of `NeuronpediaDashboardFeature`, the lists that nothing is known for."""


def write_dashboards(
    path: str | PathLike[str],
    sae: SAE,
    examples: Mapping[int, FeatureExamples],
    written: Sequence[OutputTokens],
    labels: FeatureLabels,
    *,
    model_id: str,
    source_id: str,
    dataset: str = "",
) -> None:
    """Write both kinds of files into the folder `path`.

    Args:
        path: the folder.
        sae: the SAE, for the features' densities, where it has statistics.
        examples: texts of each feature to write.
        written: the tokens that these features raise and lower.
        labels: labels of the SAE's features.
        model_id: the model's name on Neuronpedia.
        source_id: the SAE's name there: its layer and set, as 6-res-jb.
        dataset: what text the examples are from.
    """
    tokens = {one.feature: one for one in written}
    known = [feature for feature in examples if feature in tokens]
    density = {j: 0.0 if sae.feature_stats is None else float(sae.feature_stats.density[j]) for j in known}
    layer, _, name = source_id.partition("-")
    about = {
        "model_id": model_id,
        "layer": int(layer) if layer.isdigit() else sae.cfg.hook_layer or 0,
        "sae_set": name if layer.isdigit() else source_id,
        "sae_id_suffix": None,
    }
    shown = [_dashboard(j, density[j], tokens[j], examples[j], dataset) for j in known]
    _write(Path(path) / "dashboards", [{**about, "features": part} for part in _parts(shown)])
    bodies = [_upload(j, density[j], tokens[j], examples[j], labels.text(j)) for j in known if examples[j].active]
    names = {"modelId": model_id.lower(), "source": source_id.lower()}
    _write(Path(path) / "upload", [{**names, "features": part} for part in _parts(bodies)])


def _parts(features: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    return (features[start : start + FEATURES_A_FILE] for start in range(0, len(features), FEATURES_A_FILE))


def _write(folder: Path, files: list[dict[str, Any]]) -> None:
    make_folder(folder)
    for number, content in enumerate(files):
        write_text(folder / f"batch-{number}.json", json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


def _dashboard(
    feature: int, density: float, tokens: OutputTokens, examples: FeatureExamples, dataset: str
) -> dict[str, Any]:
    largest = max((max(one.activations) for one in examples.active), default=0.0)
    return {
        "feature_index": feature,
        **{name: [] for name in _EMPTY},
        "pos_str": list(tokens.raised[:_LOGITS]),
        "pos_values": list(tokens.raised_by[:_LOGITS]),
        "neg_str": list(tokens.lowered[:_LOGITS]),
        "neg_values": list(tokens.lowered_by[:_LOGITS]),
        "frac_nonzero": density,
        "n_prompts_total": len(examples.active),
        "n_tokens_in_prompt": max((len(one.tokens) for one in examples.active), default=0),
        "dataset": dataset,
        "activations": [
            {
                "bin_min": 0.0,
                "bin_max": largest,
                "bin_contains": 1.0,
                "tokens": list(one.tokens),
                "values": list(one.activations),
                "qualifying_token_index": _strongest(one),
            }
            for one in examples.active
        ],
    }


def _strongest(example: LabelExample) -> int:
    return max(range(len(example.tokens)), key=example.activations.__getitem__)


def _upload(
    feature: int, density: float, tokens: OutputTokens, examples: FeatureExamples, label: str
) -> dict[str, Any]:
    def logits(texts: Sequence[str], values: Sequence[float]) -> list[dict[str, Any]]:
        pairs = [(text, value) for text, value in zip(texts, values) if text]
        return [{"token": text, "value": value} for text, value in pairs[:_LOGITS]]

    return {
        "index": feature,
        "density": density,
        "topLogits": logits(tokens.raised, tokens.raised_by),
        "bottomLogits": logits(tokens.lowered, tokens.lowered_by),
        "explanations": [{"text": label[:LONGEST_DESCRIPTION]}] if label else [],
        "activations": [{"tokens": list(one.tokens), "values": list(one.activations)} for one in examples.active],
    }
