"""`steersman label`."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steersman.commands.options import ComputeOptions, PrintOptions, features_file, on_kernels
from steersman.config import part_of, setting
from steersman.errors import SteersmanError, UnfinishedError
from steersman.files import check_place
from steersman.lm import LanguageModel
from steersman.reading import read_json
from steersman.sae import SAE, FeatureLabels
from steersman.sae.feature_labels import LABELS
from steersman.steer import (
    DescribeConfig,
    Described,
    FeatureExamples,
    LabelEndpoint,
    LabelEndpointConfig,
    LabelExample,
    LabelJournal,
    TokenLabelConfig,
    describe_features,
    label_features,
    labelling_cost,
    read_neuronpedia,
    vocab_projection,
    words_fired_on,
    write_dashboards,
    write_neuronpedia,
)
from steersman.steer.feature_values import feature_ids
from steersman.steer.labels.tokens import SOURCES
from steersman.text import read_texts
from steersman.train import ActivationStore
from steersman.train.reports.features import summarize_features
from steersman.train.reports.label_examples import Examples, label_examples
from steersman.visible import visible

ANSWERS = "labels.answers.jsonl"
"""Beside the labels: what took long or cost money, for the next run."""
_CONTEXTS = 12
_RAISED = 10
_DASHBOARD, _LOGITS = 20, 10
_LARGEST = 1 << 30


@dataclass(frozen=True, kw_only=True)
class LabelCommand(TokenLabelConfig, DescribeConfig, ComputeOptions, PrintOptions):
    """Label features: from the tokens they fire on and write, in the words of a language model behind an endpoint, or
    from Neuronpedia. What every other command shows of a feature, it shows with its label."""

    sae: str
    """Folder, file or hub id of the SAE."""
    model: str | None = None
    """Folder or hub id of its model; not needed to import or export labels."""
    store: str | None = None
    """Folder of a store of the SAE's hook point: what the features fire on. An endpoint needs it."""
    features: str | None = None
    """In its place the features.json of `steersman features`; by default the one in the SAE's folder."""
    feature: tuple[str, ...] = ()
    """Feature ids to label; all of them if none are given."""
    text: str | None = None
    """File, folder or dataset id of text to clamp features on; by default what they fire on."""
    change_texts: int = 4
    """Texts that each feature is clamped on, a forward pass of each; 0 leaves the change of the logits out."""
    out: str | None = None
    """File of labels to write, and to go on from; by default labels.jsonl in the SAE's folder."""
    replace: bool = False
    """Replace labels that a person wrote too, and by token labels those of a language model or of Neuronpedia."""
    label_endpoint: str | None = None
    """Address of an OpenAI-compatible endpoint to ask for labels, as http://localhost:8000/v1."""
    label_model: str | None = None
    """Name of the model there."""
    key_variable: str = setting("STEERSMAN_LABEL_KEY", identity=False)
    """Environment variable with the endpoint's key; without one none is sent."""
    max_requests: int = setting(1000, identity=False)
    """Requests that may be sent: more than the estimate, or nothing is asked."""
    timeout: float = setting(60.0, identity=False)
    """Seconds that one request may take."""
    retries: int = setting(4, identity=False)
    """Further tries of a request that failed for a reason that may pass."""
    max_wait: float = setting(60.0, identity=False)
    """Longest wait before a further try, in seconds."""
    estimate: bool = setting(False, identity=False)
    """Only say how many requests and tokens the endpoint would be asked for."""
    from_neuronpedia: str | None = None
    """Export of Neuronpedia's explanations to take labels from: .jsonl, .jsonl.gz, or a folder of batches."""
    to_neuronpedia: str | None = None
    """Also write the labels as such an export, to this file or folder (needs --neuronpedia-id); into a folder with
    --store also the features with their texts, as SAEDashboard and Neuronpedia's upload read them."""
    neuronpedia_id: str | None = None
    """Names of the model and the SAE there, as gpt2-small/6-res-jb; by default those that the SAE records."""
    top: int = 20
    """Labels to print."""


@on_kernels
def run(config: LabelCommand) -> None:
    """`steersman label`."""
    _check(config)
    out = _out(config)
    check_place(out, "file")
    known = FeatureLabels.load(out) if out.is_file() else FeatureLabels()
    ids = feature_ids(config.feature)
    sae = config.load_sae(config.sae)
    known.check(sae.cfg, str(out))
    for feature in ids:
        sae.check_feature(feature)
    known, described, lm = known.of(sae.cfg), None, None
    names = _names(config, sae)
    if config.from_neuronpedia is not None:
        found = read_neuronpedia(config.from_neuronpedia, sae.cfg)
        known = _added(known, found, config)
    if config.model is not None:
        with LabelJournal(out.with_name(ANSWERS)) as journal:
            lm = config.load_model(config.model)
            if not config.estimate:
                known = _added(known, _from_tokens(config, lm, sae, ids, journal), config)
                known.save(out)
            if config.label_endpoint is not None:
                described = _from_endpoint(config, lm, sae, ids, journal)
    if config.estimate:
        return
    if described is not None:
        known = _added(known, described.labels, config)
    known.save(out)
    if config.to_neuronpedia is not None and names is not None:
        write_neuronpedia(known, config.to_neuronpedia, **names)
        if config.store is not None and lm is not None and ".jsonl" not in Path(config.to_neuronpedia).suffixes:
            shown = {j: _examples(texts, ()) for j, texts in _texts(config, lm, sae, ids, _DASHBOARD, 0).items()}
            written = vocab_projection(lm, sae, list(shown), n_tokens=_LOGITS)
            write_dashboards(config.to_neuronpedia, sae, shown, written, known, **names)
    shown = [feature for feature in (ids or known) if feature in known]
    record = [{"feature": j, **asdict(known[j]), "label": known.text(j)} for j in shown]
    for entry in record:
        del entry["text"]
    config.show(lambda: _table(known, shown[: config.top]), record)
    config.note(f"{len(known)} of {sae.cfg.d_sae} features have labels in {out}")
    if described is not None:
        config.note(described.to_text())
        if described.refused:
            raise SteersmanError(f"{described.refused}; what came is in {out}")
        if described.missing:
            raise UnfinishedError(
                f"{len(described.missing)} of {len(ids) or sae.cfg.d_sae} features are not labelled or scored in full "
                f"({next(iter(described.missing.values()))}); what came is in {out}, and the same command asks for the "
                "rest"
            )


def _check(config: LabelCommand) -> None:
    """Refuse what cannot be before anything is loaded."""
    if (config.label_endpoint is None) != (config.label_model is None):
        raise SteersmanError("--label-endpoint and --label-model go together: where to ask, and whom")
    if config.label_endpoint is not None and (config.store is None or config.model is None):
        raise SteersmanError("--label-endpoint needs --store and --model: the texts that are shown")
    if config.estimate and config.label_endpoint is None:
        raise SteersmanError("--estimate is of what an endpoint is asked: give --label-endpoint and --label-model")
    if config.model is None and config.from_neuronpedia is None and config.to_neuronpedia is None:
        raise SteersmanError("nothing to make labels from: give --model, or --from-neuronpedia FILE")
    if config.store is not None and config.features is not None:
        raise SteersmanError("give either --store or --features, not both")
    if config.label_endpoint is not None:
        _endpoint(config)


def _endpoint(config: LabelCommand) -> LabelEndpointConfig:
    return LabelEndpointConfig(
        url=config.label_endpoint or "", model=config.label_model or "", key_variable=config.key_variable,
        timeout=config.timeout, retries=config.retries, max_wait=config.max_wait, max_requests=config.max_requests,
    )  # fmt: skip


def _out(config: LabelCommand) -> Path:
    if config.out is not None:
        return Path(config.out)
    if not Path(config.sae).is_dir():
        raise SteersmanError(f"{config.sae} is no folder that labels can be written to: name a file with --out")
    return Path(config.sae) / LABELS


def _names(config: LabelCommand, sae: SAE) -> dict[str, str] | None:
    if config.to_neuronpedia is None:
        return None
    known = config.neuronpedia_id or sae.cfg.metadata.get("neuronpedia_id")
    model, slash, source = str(known or "").partition("/")
    if not (model and slash and source):
        raise SteersmanError("--to-neuronpedia needs --neuronpedia-id MODEL/SOURCE, as gpt2-small/6-res-jb")
    return {"model_id": model, "source_id": source}


def _added(known: FeatureLabels, found: FeatureLabels, config: LabelCommand) -> FeatureLabels:
    """The labels found over those known, but for those known that are worth more: a person's, and beside labels of
    tokens all others."""

    def stays(feature: int, by_tokens: bool) -> bool:
        source = known[feature].source
        return source in ("", "user") or (by_tokens and not _of_tokens(source))

    if config.replace:
        return known.merged(found)
    return known.merged(
        {j: label for j, label in found.items() if j not in known or not stays(j, _of_tokens(label.source))}
    )


def _of_tokens(source: str) -> bool:
    return bool(source) and set(source.split("+")) <= set(SOURCES)


def _from_tokens(
    config: LabelCommand, lm: LanguageModel, sae: SAE, ids: list[int], journal: LabelJournal
) -> FeatureLabels:
    entries = _entries(config, sae, lm)
    fires_on = words_fired_on(entries)
    contexts = [f"{c['before']}{c['token']}{c['after']}" for entry in entries for c in entry.get("contexts", ())]
    texts: list[str] = []
    if config.change_texts and config.text is not None:
        texts = read_texts(config.text, config.change_texts)
    elif config.change_texts and contexts:
        texts = random.Random(config.seed).sample(contexts, min(config.change_texts, len(contexts)))
    settings = part_of(TokenLabelConfig, config)
    return label_features(lm, sae, ids or None, fires_on=fires_on, texts=texts, journal=journal, config=settings)


def _entries(config: LabelCommand, sae: SAE, lm: LanguageModel) -> list[dict[str, Any]]:
    """What `steersman features` says of each feature: from a pass over the store, or from its file."""
    if config.store is not None:
        report = summarize_features(sae, ActivationStore.open(config.store), lm, contexts=_CONTEXTS)
        return [asdict(feature) for feature in report.features]
    path = features_file(config.sae, config.features)
    if path is None:
        config.note("without --store or --features labels are of what features write alone")
        return []
    found = read_json(path, limit=_LARGEST)
    try:
        for feature in words_fired_on(found):
            sae.check_feature(feature)
    except (SteersmanError, TypeError) as error:
        raise SteersmanError(f"{path} is not the features.json of `steersman features` on this SAE: {error}") from error
    return found


def _from_endpoint(
    config: LabelCommand, lm: LanguageModel, sae: SAE, ids: list[int], journal: LabelJournal
) -> Described:
    settings, endpoint = part_of(DescribeConfig, config), _endpoint(config)
    judged = settings.test_examples
    found = _texts(config, lm, sae, ids, settings.shown_examples + judged, judged)
    writes = {one.feature: one.raised for one in vocab_projection(lm, sae, list(found), n_tokens=_RAISED)}
    examples = {feature: _examples(texts, writes[feature]) for feature, texts in found.items()}
    name = endpoint.model
    cost = labelling_cost(examples, name=name, journal=journal, config=settings)
    config.note(cost.to_text())
    if config.estimate:
        if config.json:
            print(json.dumps(cost._asdict()))
        return Described(labels=FeatureLabels(), missing={}, skipped={}, refused="")
    if cost.requests > config.max_requests:
        raise SteersmanError(
            f"{cost.to_text()}; --max-requests {config.max_requests} allows fewer: name features with --feature, ask "
            f"for fewer scores, or give --max-requests {cost.requests}"
        )
    with LabelEndpoint(endpoint) as ask:
        return describe_features(ask, examples, name=name, journal=journal, config=settings)


def _texts(
    config: LabelCommand, lm: LanguageModel, sae: SAE, ids: list[int], active: int, inactive: int
) -> dict[int, Examples]:
    store, wanted = ActivationStore.open(config.store or ""), ids or list(range(sae.cfg.d_sae))
    return label_examples(sae, store, lm, wanted, active=active, inactive=inactive, seed=config.seed)


def _examples(texts: Examples, raised: Sequence[str]) -> FeatureExamples:
    active, inactive = ([LabelExample(*one) for one in part] for part in (texts.active, texts.inactive))
    return FeatureExamples(active=active, inactive=inactive, raised=raised)


def _table(labels: FeatureLabels, features: list[int]) -> str:
    lines = [f"{'feature':>8}  label"]
    for feature in features:
        scores = labels[feature].scores
        told = "  ".join(f"{name} {scores[name]:.2f}" for name in ("detection", "fuzzing") if name in scores)
        lines.append(f"{feature:>8}  {visible(labels.text(feature))}" + (f"   ({told})" if told else ""))
    return "\n".join(lines)
