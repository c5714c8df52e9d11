"""Weights that stay random while the rest trains, and the baselines that are made of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import HOOK, assert_equal_weights, mixture, stats_of, trainer_of
from torch.nn import functional as F

from steersman.errors import SteersmanError
from steersman.sae import SAE, SAEConfig
from steersman.train import (
    ActivationStore,
    Dictionary,
    FrequencyBucket,
    TrainConfig,
    Trainer,
    evaluate_sae,
    random_baselines,
    resolve,
    train_sae,
)
from steersman.train.run.frozen import Frozen

CONFIG = TrainConfig(d_sae=64, k=4, batch_size=128, tokens=128 * 20, lr=0.02, seed=3, device="cpu", checkpoint_every=10)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Rows of 200 tokens, token t on every row whose number ends in it but for the rare ones below 3."""
    rows = mixture(3000)
    ids = torch.arange(3000) % 200
    ids[ids < 3] = 3
    ids[[0, 2999]] = torch.tensor([0, 1])
    batch = {"x": rows, "token_ids": ids}
    return ActivationStore.from_tensors([batch], tmp_path_factory.mktemp("baselines") / "acts", HOOK, dtype="float32")


@pytest.fixture(scope="module")
def sae(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> SAE:
    return train_sae(store, CONFIG, tmp_path_factory.mktemp("baselines") / "run")


def moved(config: TrainConfig, n: int = 12) -> tuple[SAE, SAE]:
    """The SAE as it begins and after some steps."""
    rows = mixture(128 * n)
    first, trainer = trainer_of(config, rows).sae, trainer_of(config, rows)
    for part in rows.split(128):
        trainer.step(part)
    return first, trainer.sae


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
@pytest.mark.parametrize("more", [{"lr": 0.06}, {"optimizer": "signum", "lr": 0.04}], ids=["adam", "signum"])
def test_what_is_frozen_stays_and_the_rest_trains(architecture: str, more: dict[str, object]) -> None:
    config = replace(CONFIG, architecture=architecture, **more)
    first, decoder = moved(replace(config, frozen="decoder"))
    assert torch.equal(decoder.W_dec, first.W_dec)
    assert not torch.equal(decoder.W_enc, first.W_enc)
    _, encoder = moved(replace(config, frozen="encoder"))
    assert torch.equal(encoder.W_enc, first.W_enc)
    assert not torch.equal(encoder.W_dec, first.W_dec)
    assert not torch.equal(encoder.b_enc, first.b_enc), "what decides when a feature fires trains"
    free, soft = (moved(replace(config, frozen=frozen))[1] for frozen in (None, "soft_decoder"))
    cosine = F.cosine_similarity(soft.W_dec, first.W_dec).detach()
    assert float(F.cosine_similarity(free.W_dec, first.W_dec).min().detach()) < 0.75
    assert float(cosine.min()) == pytest.approx(0.8, abs=1e-5)
    torch.testing.assert_close(soft.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize("frozen", ["encoder", "soft_decoder"])
def test_a_restored_run_goes_on_with_the_same_bits(frozen: Frozen) -> None:
    config, parts = replace(CONFIG, frozen=frozen, lr=0.06), mixture(128 * 12).split(128)
    whole, cut = trainer_of(config), trainer_of(config)
    for trainer in (whole, cut):
        for part in parts[:8]:
            trainer.step(part)
    again = trainer_of(config)
    again.sae.load_state_dict(cut.sae.state_dict())
    again.updater.restore(cut.updater.state())
    again.dead_latents.restore(cut.dead_latents.silent_steps)
    again.n_steps_done = 8
    for trainer in (whole, again):
        for part in parts[8:]:
            trainer.step(part)
    assert_equal_weights(whole.sae, again.sae)


def test_a_run_says_its_recipe(sae: SAE) -> None:
    training = sae.cfg.metadata["training"]
    assert "frozen" not in training
    config = TrainConfig.of_run(training)
    expected = replace(CONFIG, k_aux=training["k_aux"], dead_after=config.dead_after)
    assert replace(config, device="cpu", checkpoint_every=10) == expected
    with pytest.raises(SteersmanError, match="no record of a run"):
        TrainConfig.of_run({"d_sae": 4})
    with pytest.raises(SteersmanError, match="frozen=decoder keeps some: use fused_update=False"):
        replace(CONFIG, frozen="decoder", fused_update=True)
    with pytest.raises(SteersmanError, match="init begins from an SAE's: use one"):
        replace(CONFIG, frozen="decoder", init="runs/other")
    record = {**CONFIG.record(), "frozen": "decoder"}
    assert record == replace(CONFIG, frozen="decoder").record(), "a run with frozen weights is another run"


def test_baselines_stand_beside_the_sae(store: ActivationStore, sae: SAE, tmp_path: Path) -> None:
    baselines = random_baselines(sae, store, tmp_path / "baselines", device="cpu")
    assert list(baselines) == ["frozen decoder", "soft-frozen decoder", "frozen encoder"]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = random_baselines(sae, store, tmp_path / "baselines", device="cpu")
    assert_equal_weights(again["frozen encoder"], baselines["frozen encoder"])
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}, "none was made again"
    start = trainer_of(CONFIG).sae
    torch.testing.assert_close(baselines["frozen decoder"].W_dec, start.W_dec.detach())
    found = evaluate_sae(sae, store, baselines=baselines, split="all")
    alone = evaluate_sae(baselines["frozen decoder"], store, split="all")
    assert found.baselines["frozen decoder"].to_json() == alone.to_json()
    assert found.to_json()["baselines"]["frozen encoder"]["reconstruction"]["l0"] > 0
    head, fvu = found.to_text().splitlines()[:2]
    assert head.split("  ")[-3:] == list(baselines)
    assert fvu.split()[1:] == [f"{one.reconstruction.fvu:.4f}" for one in (found, *found.baselines.values())]
    assert found.reconstruction.fvu < min(one.reconstruction.fvu for one in found.baselines.values())
    assert "frozen encoder" in found._repr_html_()
    with pytest.raises(SteersmanError, match="records no training"):
        random_baselines(SAE(SAEConfig(d_in=16, d_sae=8, k=2, hook_name=HOOK)), store, tmp_path / "none")


def test_what_the_dictionary_is_like(store: ActivationStore, sae: SAE) -> None:
    found = evaluate_sae(sae, store, split="all")
    rows = F.normalize(sae.W_dec.detach().double(), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(0)
    dictionary = found.dictionary
    assert isinstance(dictionary, Dictionary)
    assert dictionary.decoder_cosine == pytest.approx(float(cosines.abs().sum()) / (64 * 63), rel=1e-5)
    nearest = cosines.fill_diagonal_(-1).amax(dim=1).mean()
    assert dictionary.nearest_cosine == pytest.approx(float(nearest), rel=1e-5)
    density = (sae.encode(store.activations(torch.arange(3000))) > 0).double().mean(dim=0)
    assert set(dictionary.dense_features) == set((density > 0.1).nonzero()[:, 0].tolist())
    assert dictionary.dense_features[0] == int(density.argmax())
    assert f"tokens: {dictionary.dense_features[0]} " in found.to_text() + " "


def test_rows_of_rare_tokens_stand_by_themselves(store: ActivationStore, sae: SAE) -> None:
    """Of the rows trained on token 3 has 2 %, 0 one row, the others 0.5 %; token 1 is in a row held out alone."""
    buckets = evaluate_sae(sae, store, split="all").by_frequency
    assert all(isinstance(bucket, FrequencyBucket) for bucket in buckets)
    assert [bucket.n_tokens for bucket in buckets] == [59, 2939, 1, 0, 1]
    assert [bucket.at_least for bucket in buckets] == [1e-2, 1e-3, 1e-4, 1e-5, 0.0]
    x = store.activations(torch.arange(3000)).double()
    error, variance = (x - sae(x.float())).square().sum(1), (x - x.mean(0)).square().sum(1)
    frequent = store.tokens(0, 3000).token_ids == 3
    assert buckets[0].fvu == pytest.approx(float(error[frequent].sum() / variance[frequent].sum()), rel=1e-4)
    assert buckets[4].fvu == pytest.approx(float(error[-1] / variance[-1]), rel=1e-4)
    whole = sum(float(variance[part].sum()) * bucket.fvu for part, bucket in
                zip((frequent, ~frequent), (buckets[0], buckets[1])))  # fmt: skip
    assert whole == pytest.approx(float(error.sum()), rel=0.02)


@pytest.mark.parametrize(("frozen", "random"), [("decoder", True), ("soft_decoder", True), ("encoder", False)])
def test_the_frozen_decoder_of_a_transcoder_is_random(frozen: Frozen, random: bool) -> None:
    """The first batch fits the decoder of a transcoder that learns."""
    x, y = mixture(256), mixture(256, seed=1)
    places: dict[str, Any] = {
        "transcoder": True,
        "d_out": 16,
        "apply_b_dec_to_input": False,
        "hook_name_out": "blocks.1.hook_mlp_out",
    }
    config = TrainConfig(d_sae=32, k=3, hook_out="blocks.1.hook_mlp_out", frozen=frozen, batch_size=128, device="cpu")
    cfg = SAEConfig(d_in=16, d_sae=32, k=3, **places)
    trainer = Trainer(config, resolve(config, 16, 1280), [stats_of(x), stats_of(y)], cfg)
    before = trainer.sae.W_dec.detach().clone()
    trainer.fit_encoder_scale(torch.cat([x, y], dim=1))
    assert torch.equal(trainer.sae.W_dec, before) == random
