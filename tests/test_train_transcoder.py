"""Training a transcoder: what one hook point says of another, in the units of both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import make_sae
from support.ranks import run_ranks
from support.sharded_jobs import train
from support.stopping import stopped_before
from support.training import assert_equal_weights, assert_same_sae, stats_of, weight_bytes

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE, SAEConfig
from steersman.sae.training import TrainingState
from steersman.train import ActivationStore, HookView, TrainConfig, Trainer, evaluate_sae, resolve, train_sae
from steersman.train.reports.spliced import spliced_loss
from steersman.train.run.checkpoints import checkpoint_to_sae
from steersman.train.run.optim import FusedUpdater
from steersman.train.store.manifest import Manifest
from steersman.train.store.writer import StoreWriter

IN, OUT = "blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"
CONFIG = TrainConfig(
    d_sae=64, k=4, hook_out=OUT, skip_connection=True, batch_size=128, tokens=128 * 60, seed=3, device="cpu",
    checkpoint_every=20, timeout_seconds=20,
)  # fmt: skip


def pairs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixtures of 3 of 20 planted directions [n, 16], and of their partners [n, 10], 50 times as large."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    read, write = (torch.nn.functional.normalize(torch.randn(20, d, generator=fixed), dim=1) for d in (16, 10))
    active = torch.rand(n, 20, generator=g).topk(3, dim=1).indices
    strength = torch.rand(n, 3, generator=g)[..., None] + 0.5
    return (read[active] * strength).sum(1) + 0.1, 50 * (write[active] * strength).sum(1) - 7.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    x, y = pairs(20_000)
    out = tmp_path_factory.mktemp("data") / "acts"
    manifest = Manifest(model_name="m", dtype="float32", hooks={IN: 16, OUT: 10}, config={})
    writer = StoreWriter.begin(out, manifest, shard_rows=5000)
    rows = np.arange(len(x))
    writer.append({IN: x, OUT: y}, rows % 50, rows // 7, rows)
    writer.finish()
    return ActivationStore.open(out)


def test_a_transcoder_predicts_the_other_hook_point(store: ActivationStore, tmp_path: Path) -> None:
    """In the units of both, although it was trained on inputs and targets of unit variance."""
    sae = train_sae(store, replace(CONFIG, tokens=128 * 400, skip_connection=False), tmp_path / "run")
    assert (sae.cfg.transcoder, sae.cfg.out_width) == (True, 10)
    assert (sae.cfg.hook_name, sae.cfg.hook_name_out) == (IN, OUT)
    x, y = pairs(2000, seed=1)
    fvu = float((sae(x) - y).square().sum() / (y - y.mean(0)).square().sum())
    assert fvu < 0.3
    assert sae.cfg.metadata["heldout"]["fvu"] == pytest.approx(fvu, rel=0.1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert_equal_weights(sae, SAE.load(tmp_path / "run"))


def test_a_transcoder_is_measured_on_what_it_predicts(store: ActivationStore, tmp_path: Path) -> None:
    sae = train_sae(store, CONFIG, tmp_path / "run")
    found, recorded = evaluate_sae(sae, store).reconstruction.record(), sae.cfg.metadata["heldout"]
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in recorded.items()}


def test_the_models_loss_is_measured_with_the_prediction_where_it_writes(lm: LanguageModel) -> None:
    places: dict[str, Any] = {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    sae = make_sae("topk", d_in=16, transcoder=True, skip_connection=True, **places)
    batch = lm.encode(["w5 w6 w7 w8 w9"])
    clean = lm.capture(batch.input_ids, hooks=list(places.values()))
    predicted = sae(clean[places["hook_name"]])
    predicted[:, 0] = clean[places["hook_name_out"]][:, 0]  # the BOS stays
    with lm.edit(places["hook_name_out"], lambda h, fwd: predicted):
        logits = lm.logits(batch.input_ids, batch.attention_mask)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch.input_ids[0, 1:])
    found = spliced_loss(sae, lm, ["w5 w6 w7 w8 w9"], torch.zeros(16))
    assert found.ce_with_sae == pytest.approx(float(expected), rel=1e-5)
    assert found.ce_with_sae != pytest.approx(found.ce_clean, rel=1e-3)


def test_the_skip_connection_has_the_scales_folded_in_too() -> None:
    cfg = SAEConfig(d_in=4, d_out=3, d_sae=8, k=2, transcoder=True, skip_connection=True, apply_b_dec_to_input=False)
    sae, x = SAE(cfg), torch.randn(5, 4)
    torch.nn.init.normal_(sae.W_skip)
    torch.nn.init.normal_(sae.b_dec)
    expected = sae(x * 3) / 0.5
    sae.fold_scales(3, 0.5)
    torch.testing.assert_close(sae(x), expected)


def test_it_resumes_to_the_same_bytes_and_its_checkpoints_are_transcoders(
    store: ActivationStore, tmp_path: Path
) -> None:
    config = replace(CONFIG, checkpoint_every=30, tokens=128 * 31, decay=0.0, lr=0.0001, ema=0.5)
    whole = train_sae(store, config, tmp_path / "whole")
    with stopped_before(30):
        train_sae(store, config, tmp_path / "cut")
    cut = train_sae(HookView(store, IN), config, tmp_path / "cut")
    assert weight_bytes(tmp_path / "whole") == weight_bytes(tmp_path / "cut")
    x, _ = pairs(500, seed=2)
    one_step_before = checkpoint_to_sae(tmp_path / "whole" / "checkpoints" / "step_00000030")(x)
    assert float((one_step_before - whole(x)).norm() / whole(x).norm()) < 0.05
    assert_equal_weights(whole, cut)


def transcoder_of(config: TrainConfig, width: int = 16) -> tuple[Trainer, torch.Tensor]:
    """A trainer of what predicts `width` numbers from 16, and rows of both."""
    x, y = pairs(4000)
    y = torch.cat([y, 2 * x[:, :6]], dim=1)[:, :width]
    cfg = SAEConfig(
        d_in=16, d_out=width, d_sae=64, k=config.k, architecture=config.architecture, transcoder=True,
        skip_connection=config.skip_connection, apply_b_dec_to_input=False, options=config.options,
        group_sizes=config.group_sizes,
    )  # fmt: skip
    trainer = Trainer(config, resolve(config, 16, 4000), [stats_of(x), stats_of(y)], cfg)
    rows = torch.cat([x, y], dim=1)
    trainer.fit_encoder_scale(rows[:128])
    return trainer, rows


FORMS = sorted(
    name for name, kind in SAE.architectures.items()
    if kind.trainable and not kind.supervised and not kind.side_by_side and kind.__module__.startswith("steersman")
)  # fmt: skip


@pytest.mark.parametrize("architecture", FORMS)
def test_every_form_gives_the_skip_connection_the_gradient_of_its_losses(architecture: str) -> None:
    """Losses are quadratic in it, so differences around a point give the gradient."""
    kind = SAE.architectures[architecture]
    config = replace(
        CONFIG, architecture=architecture, k=4 if kind.uses_k else 0, target_l0=4.0 if kind.target_l0 else None
    )
    trainer, rows = transcoder_of(config)
    torch.nn.init.normal_(trainer.sae.W_skip, std=0.1)
    x, target = trainer.scaled(rows[:64])
    state = TrainingState(config=config)

    def losses() -> torch.Tensor:
        step = trainer.updater.backward(x, target, 1, state)
        return step.loss.detach().double()

    losses()
    gradient = trainer.sae.W_skip.grad
    assert gradient is not None
    found, moved = gradient.clone(), torch.zeros_like(gradient).uniform_(-0.1, 0.1)
    trainer.sae.W_skip.data += moved
    above = losses()
    trainer.sae.W_skip.data -= 2 * moved
    assert float((above - losses()) / 2) == pytest.approx(float((found * moved).sum()), rel=1e-2, abs=0.2)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_the_fused_update_trains_it_as_autograd_does(architecture: str) -> None:
    trained = []
    for fused in (True, False):
        config = replace(CONFIG, architecture=architecture, fused_update=fused, dead_after=128 * 4)
        trainer, rows = transcoder_of(config)
        for batch in rows.split(128)[:12]:
            trainer.step(batch)
        trained.append(trainer)
    fused, ordinary = trained
    assert isinstance(fused.updater, FusedUpdater)
    assert float(ordinary.sums[1]) > 0, "the AuxK loss was never on"
    torch.testing.assert_close(fused.sums, ordinary.sums, rtol=1e-3, atol=1e-3)
    assert float(ordinary.sae.W_skip.detach().abs().max()) > 0.05
    torch.testing.assert_close(fused.sae.W_skip, ordinary.sae.W_skip, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{"optimizer": "signum"}, {"state_dtype": "bfloat16"}, {"grad_accumulation": 2}])
def test_every_updater_moves_the_skip_connection_from_zero(settings: dict[str, Any]) -> None:
    trainer, rows = transcoder_of(replace(CONFIG, **settings), 10)
    assert not trainer.sae.W_skip.any()
    for batch in rows.split(128)[:3]:
        trainer.step(batch)
    assert trainer.sae.W_skip.all()
    assert trainer.read_metrics()["fvu"] < 1


@pytest.mark.parametrize("latent", [2, 1], ids=["shards", "replicas"])
def test_two_ranks_give_the_transcoder_of_one_process(latent: int, store: ActivationStore, tmp_path: Path) -> None:
    config = replace(CONFIG, dead_after=512)
    train_sae(store, config, tmp_path / "one")
    run_ranks(2, train, str(store.path), replace(config, latent_shards=latent), str(tmp_path / "two"))
    assert_same_sae(tmp_path / "one", tmp_path / "two", tolerance=1e-2)


def test_a_source_without_the_other_hook_point_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="holds no hook point 'blocks.9.hook_mlp_out'; it has"):
        train_sae(store, replace(CONFIG, hook_out="blocks.9.hook_mlp_out"), tmp_path / "run")
    with pytest.raises(SteersmanError, match=f"needs it beside one other hook point, and the source has {IN}, {OUT}"):
        train_sae(HookView(store, [IN, OUT]), replace(CONFIG, hook_out="blocks.0.hook_resid_post"), tmp_path / "run")
    with pytest.raises(SteersmanError, match=f"hook_out = {OUT} is what is read: a transcoder predicts another"):
        train_sae(HookView(store, OUT), CONFIG, tmp_path / "run")
    with pytest.raises(SteersmanError, match=f"hook_out = {IN} comes before {OUT} in the model"):
        train_sae(HookView(store, OUT), replace(CONFIG, hook_out=IN), tmp_path / "run")
    with pytest.raises(
        SteersmanError, match="this transcoder reads 16 and predicts 10 numbers: use fused_update=False"
    ):
        train_sae(store, replace(CONFIG, fused_update=True), tmp_path / "run")
    with pytest.raises(SteersmanError, match="skip_connection is of a transcoder: say what it predicts with hook_out"):
        replace(CONFIG, hook_out=None)


def test_hook_points_side_by_side_are_one_input(store: ActivationStore, tmp_path: Path) -> None:
    sae = train_sae(HookView(store, [IN, OUT]), replace(CONFIG, hook_out=None, skip_connection=False), tmp_path / "run")
    assert sae.cfg.d_in == 26
    assert not sae.cfg.transcoder
