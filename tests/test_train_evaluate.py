"""Spliced losses and feature reports against what they must be by construction."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steersman.demo import MODEL_PATH, texts
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE, SAEConfig
from steersman.sae.features import Rows
from steersman.sae.features import summarize_features as summarize_rows
from steersman.train import ActivationStore, HookView, TrainConfig, cache_activations, train_sae
from steersman.train.reports.evaluate import EvaluateConfig, evaluate_sae
from steersman.train.reports.features import Feature, FeaturesConfig, described, features_to_text, summarize_features
from steersman.train.reports.spliced import spliced_loss

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load(str(MODEL_PATH), device="cpu")


@pytest.fixture(scope="module")
def store(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("evaluate") / "acts"
    return cache_activations(lm, texts(150, seed=5), hook=HOOKS, out=str(out), tokens=10_000)


@pytest.fixture(scope="module")
def sae(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> SAE:
    config = TrainConfig(d_sae=128, k=8, device="cpu")
    return train_sae(HookView(store, HOOKS[1]), config, tmp_path_factory.mktemp("evaluate") / "run")


class Perfect(SAE):
    """Rebuilds its input exactly: an identity for testing."""

    activation = "perfect"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_perfect_reconstruction_changes_nothing(lm: LanguageModel, store: ActivationStore) -> None:
    perfect = Perfect(SAEConfig(d_in=128, d_sae=8, k=2, hook_name=HOOKS[1]))
    mean = store.stats(HOOKS[1]).mean
    loss = spliced_loss(perfect, lm, texts(6, seed=8), mean)
    assert loss.ce_with_sae == pytest.approx(loss.ce_clean, abs=1e-6)
    assert loss.ce_loss_score == pytest.approx(1.0, abs=1e-6)
    assert loss.kl == pytest.approx(0.0, abs=1e-6)
    assert loss.ce_mean_ablated > loss.ce_clean + 1


def test_a_reconstruction_of_the_mean_recovers_nothing(lm: LanguageModel, store: ActivationStore) -> None:
    silent = SAE(SAEConfig(d_in=128, d_sae=8, k=2, hook_name=HOOKS[1]))
    mean = store.stats(HOOKS[1]).mean
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
        silent.b_dec.copy_(mean)
    loss = spliced_loss(silent, lm, texts(6, seed=8), mean)
    assert loss.ce_with_sae == pytest.approx(loss.ce_mean_ablated, abs=1e-5)
    assert loss.ce_loss_score == pytest.approx(0.0, abs=1e-5)


def test_a_batch_counts_as_its_texts_one_by_one(lm: LanguageModel, store: ActivationStore, sae: SAE) -> None:
    mean, documents = store.stats(HOOKS[1]).mean, texts(5, seed=8)
    together = spliced_loss(sae, lm, documents, mean, batch_size=5)
    alone = [spliced_loss(sae, lm, [text], mean) for text in documents]
    total = sum(loss.n_predictions for loss in alone)
    assert together.n_predictions == total
    for name in ("ce_clean", "ce_with_sae", "kl"):
        expected = sum(getattr(loss, name) * loss.n_predictions for loss in alone) / total
        assert getattr(together, name) == pytest.approx(expected, abs=1e-4)


def test_the_first_names_of_the_losses_are_written(lm: LanguageModel, store: ActivationStore, sae: SAE) -> None:
    result = evaluate_sae(sae, store, lm, texts(3, seed=8), EvaluateConfig(batch_size=2), split="all")
    loss = result.to_json()["loss"]
    assert list(loss) == ["ce_unsteered", "ce_spliced", "ce_mean_ablated", "ce_recovered", "kl", "n_predictions"]
    assert "ce_recovered" in result.to_text()
    assert result.loss is not None
    assert result.loss.ce_clean == loss["ce_unsteered"]
    assert result.reconstruction.n_tokens == store.n_rows
    with pytest.raises(SteersmanError, match="unknown setting 'spilt'; near it: split"):
        evaluate_sae(sae, store, spilt="all")


def test_baselines_share_the_passes_without_an_sae(
    lm: LanguageModel, store: ActivationStore, sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = texts(3, seed=8)
    earlier = SAE(replace(sae.cfg, hook_name=HOOKS[0], metadata={}))
    others = {"earlier": earlier, "untrained": SAE(replace(sae.cfg, metadata={})), "again": sae}
    alone = {name: evaluate_sae(one, store, lm, given).loss for name, one in others.items()}
    passes: list[int] = []
    logits = lm.logits
    monkeypatch.setattr(lm, "logits", lambda *args: [passes.append(1), logits(*args)][1])
    found = evaluate_sae(sae, store, lm, given, baselines=others)
    assert len(passes) == 1 + 4 + 2  # unchanged, each SAE, the mean at each of two hook points
    assert {name: one.loss for name, one in found.baselines.items()} == alone
    assert found.loss == alone["again"]


def test_evaluation_uses_the_held_out_rows(store: ActivationStore, sae: SAE) -> None:
    result = evaluate_sae(sae, store)
    first, last = store.split_rows("heldout")
    assert result.loss is None
    assert result.reconstruction.n_tokens == last - first
    assert "fvu" in result.to_text()
    with pytest.raises(SteersmanError, match="needs texts"):
        evaluate_sae(sae, store, LanguageModel.load(str(MODEL_PATH), device="cpu"))


def test_contexts_hold_the_token_that_fired(lm: LanguageModel, store: ActivationStore, sae: SAE) -> None:
    assert sae.feature_stats is not None
    ids = sae.feature_stats.max_act.topk(5).indices.tolist()
    report = summarize_features(sae, store, lm, FeaturesConfig(contexts=1), only=tuple(ids), contexts=3)
    described = report.features
    assert [feature.id for feature in described] == ids
    assert len(report.stats.density) == 128
    documents = texts(150, seed=5)
    dense = sae.encode(store.activations(torch.arange(store.n_rows), HOOKS[1]).float()).detach()
    for feature in described:
        tenth = float(dense[:, feature.id].sort(descending=True).values[9])
        assert feature.typical_act == pytest.approx(tenth, rel=1e-5)
        assert len(feature.contexts) == 3
        assert feature.contexts[0].activation == pytest.approx(feature.max_act)
        assert len(feature.promotes) == len(feature.suppresses) == 8
        for context in feature.contexts:
            assert context.before + context.token + context.after in documents[context.document]
            row = next(r for r in range(store.n_rows) if _is(store, r, context.document, context.position))
            x = store.activations(torch.tensor([row]), HOOKS[1]).float()
            assert float(sae.encode(x)[0, feature.id]) == pytest.approx(context.activation, rel=1e-5)
        spread = [context.document for context in feature.contexts]
        assert len(set(spread)) == 3
    text = features_to_text(described)
    assert text.count("«") == 15
    with pytest.raises(SteersmanError, match="out of range"):
        summarize_features(sae, store, lm, only=(128,))


def test_tokens_are_written_out_in_the_table() -> None:
    words = {"fires_on": ["\n", " it's", "\x1b[2J"], "promotes": [" é"], "suppresses": ["\u202e"]}
    feature = Feature(id=1, density=0.1, max_act=2.0, typical_act=1.0, p999=1.5, contexts=[], **words)
    lines = features_to_text([feature]).splitlines()
    assert lines[1:4] == [
        "  fires on    '⏎'  ' it's'  '\\x1b[2J'",
        "  promotes    ' é'",
        "  suppresses  '\\u202e'",
    ]


def _is(store: ActivationStore, row: int, document: int, position: int) -> bool:
    info = store.tokens(row, row + 1)
    return int(info.doc_ids[0]) == document and int(info.positions[0]) == position


def test_what_does_not_belong_together_is_refused(store: ActivationStore, sae: SAE, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="the store .* holds blocks.1"):
        evaluate_sae(SAE(replace(sae.cfg, hook_name="blocks.3.hook_resid_post")), store)
    with pytest.raises(SteersmanError, match="the SAE has width 64, the store .* has width"):
        evaluate_sae(SAE(replace(sae.cfg, d_in=64)), store)
    with pytest.raises(SteersmanError, match="the SAE was made for 'gpt2', the store .* for"):
        evaluate_sae(SAE(replace(sae.cfg, model_name="gpt2")), store)
    with pytest.raises(SteersmanError, match="no hook point"):
        HookView(store, "blocks.0.hook_resid_post")


def test_the_models_loss_reads_no_more_text_than_asked_for(lm: LanguageModel, store: ActivationStore, sae: SAE) -> None:
    given = texts(40, seed=5)
    lengths = lm.encode(given, max_length=20).attention_mask.sum(dim=1)
    n = int((lengths.cumsum(0) < 300).sum()) + 1
    loss = spliced_loss(sae, lm, given, store.stats(store.hook_of(sae)).mean, 7, max_tokens=300, context_length=20)
    assert loss.n_predictions == int((lengths[:n] - 1).sum())


def test_an_encoder_has_no_next_token_loss(
    sae: SAE, store: ActivationStore, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, "can_generate", False)
    with pytest.raises(SteersmanError, match="is an encoder, which sees the next token"):
        evaluate_sae(sae, store, lm, texts(3, seed=5))
    with pytest.raises(SteersmanError, match="is an encoder"):
        spliced_loss(sae, lm, texts(3, seed=5), torch.zeros(128))


def test_contexts_end_where_the_model_stopped_reading(lm: LanguageModel, tmp_path: Path) -> None:
    ids = torch.tensor([lm.token_ids(f" {word}")[0] for word in ["the", "fog", "and", "the", "fox", "ran"]])
    x = torch.eye(128)[:6] + 0.001
    positions = torch.tensor([1, 2, 3, 1, 2, 4])  # two contexts of one document; a token was left out in the second
    for known in (True, False):
        rows = {"x": x, "token_ids": ids.numpy(), "doc_ids": torch.zeros(6, dtype=torch.int64).numpy()}
        if known:
            rows["positions"] = positions.numpy()
        acts = ActivationStore.from_tensors([rows], tmp_path / str(known), "blocks.1.hook_resid_post", dtype="float32")
        identity = SAE(SAEConfig(d_in=128, d_sae=128, k=1, hook_name=acts.hook_name))
        with torch.no_grad():
            identity.W_enc.copy_(torch.eye(128))
        found = described(identity, acts, lm, summarize_rows(identity, [Rows(x, torch.arange(6))], 1.0), [3], 1)
        (context,) = found[0].contexts
        assert found[0].fires_on == [" the"]
        assert (context.before.strip(), context.after.strip()) == ("" if known else "the fog and", "fox ran")
        assert context.position == int(positions[3]) * known
