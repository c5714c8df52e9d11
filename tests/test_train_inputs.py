"""What rows are to an SAE in training: whitened and folded back exactly, or in the units of an SAE that is there."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stopping import stopped_before
from support.training import HOOK, TRAINABLE, assert_equal_weights, mixture, trainer_of, weight_bytes
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae import SAE, SAEConfig
from steersman.sae.formats import convert
from steersman.sae.metrics import measure_reconstruction
from steersman.train import ActivationStore, TrainConfig, train_sae
from steersman.train.run.checkpoints import checkpoint_to_sae
from steersman.train.run.initial import InitialSAE
from steersman.train.run.inputs import WhitenedInputs

CONFIG = TrainConfig(d_sae=40, k=3, batch_size=128, tokens=3840, seed=3, device="cpu", checkpoint_every=12)
WHITEN = replace(CONFIG, whiten="zca", whiten_shrinkage=0.01)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.train.run.run.plot_run", lambda *_: None)


def uneven(n: int, seed: int = 0) -> Tensor:
    """Mixtures of planted directions [n, 16] that vary 30 times as much along some axes as along others."""
    stretch = torch.logspace(0, -1.5, 16)
    return mixture(n, seed=seed) * stretch


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("data") / "acts"
    return ActivationStore.from_tensors(uneven(6000).split(1000), out, HOOK, model_name="toy", dtype="float32")


@pytest.fixture(scope="module")
def there(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained SAE."""
    out = tmp_path_factory.mktemp("there") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steersman.train.run.run.plot_run", lambda *_: None)
        train_sae(store, CONFIG, out)
    return out


# Whitening


@pytest.mark.parametrize("how", ["zca", "pca"])
def test_whitened_rows_vary_alike_in_all_directions(how: str) -> None:
    x = uneven(4000)
    mean, covariance = x.mean(0), torch.cov(x.T.double(), correction=0)
    cfg = SAEConfig(d_in=16, d_sae=40, k=3)
    z, target = WhitenedInputs.of_covariance(cfg, mean, covariance, how, 0.0).scaled(x)
    assert target is z
    torch.testing.assert_close(torch.cov(z.T.double(), correction=0), torch.eye(16).double(), atol=1e-3, rtol=0)
    half = WhitenedInputs.of_covariance(cfg, mean, covariance, how, 0.5)
    C = torch.cov(half.scaled(x)[0].T.double(), correction=0)  # the closed form: v / (v / 2 + mean(v) / 2), scaled
    v = torch.linalg.eigvalsh(covariance)
    want = v / (v + v.mean())
    torch.testing.assert_close(torch.linalg.eigvalsh(C), (want / want.mean()).sort().values, atol=1e-3, rtol=1e-3)
    if how == "zca":
        torch.testing.assert_close(half.matrix, half.matrix.T)


@pytest.mark.parametrize(
    ("architecture", "k"), [("topk", 3), ("batch_topk", 3), ("abs_topk", 3), ("relu", 0), ("jumprelu", 0), ("gated", 0)]
)
def test_folded_back_it_is_the_same_sae_of_rows_as_they_are(architecture: str, k: int) -> None:
    x = uneven(500, seed=5)
    mean, covariance = x.mean(0), torch.cov(x.T.double())
    cfg = SAEConfig(d_in=16, d_sae=40, k=k, architecture=architecture)
    inputs = WhitenedInputs.of_covariance(cfg, mean, covariance, "pca", 0.001)
    sae, generator = SAE(cfg), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in sae.state_dict().values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.1)  # pyright: ignore[reportCallIssue]
    sae.normalize_decoder()
    z = inputs.scaled(x)[0]
    code, rebuilt = sae.encode(z), sae(z)
    inputs.fold(sae)
    torch.testing.assert_close(sae.encode(x), code, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(inputs.scaled_target(sae(x)), rebuilt, atol=1e-4, rtol=1e-5)
    lengths = sae.W_dec.detach().norm(dim=1)
    assert float(lengths.max() / lengths.min()) > 2  # no longer of one length


def test_a_whitened_run_resumes_exactly_and_reports_rows_as_they_are(store: ActivationStore, tmp_path: Path) -> None:
    whole = train_sae(store, WHITEN, tmp_path / "whole")
    with stopped_before(20):
        train_sae(store, WHITEN, tmp_path / "cut")
    early = checkpoint_to_sae(tmp_path / "cut")
    assert_equal_weights(whole, train_sae(store, WHITEN, tmp_path / "cut"))
    assert weight_bytes(tmp_path / "whole") == weight_bytes(tmp_path / "cut")
    rows = torch.cat([batch.x for batch in store.batches(50, split="heldout", shuffle=False, drop_last=False)])
    fvu = measure_reconstruction(whole, [rows]).fvu
    assert whole.cfg.metadata["heldout"]["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert measure_reconstruction(early, [rows]).fvu < 1  # a checkpoint is opened in the units of rows, too
    assert (whole.cfg.metadata["training"]["whiten"], whole.cfg.apply_b_dec_to_input) == ("zca", True)
    with pytest.raises(SteersmanError, match=r"training.whiten_shrinkage was 0.01, now None"):
        train_sae(store, replace(WHITEN, whiten_shrinkage=None), tmp_path / "cut")


def test_whitening_finds_directions_that_vary_little() -> None:
    """On planted directions, most of which differ along axes of little variance."""
    atoms = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    planted = torch.nn.functional.normalize(atoms * torch.logspace(0, -1.5, 16), dim=1)
    rows, found = uneven(6400), {}
    for config in (CONFIG, WHITEN):
        trainer = trainer_of(replace(config, tokens=25_600), rows)
        trainer.fit_encoder_scale(rows[:128])
        for step in range(trainer.recipe.n_steps):
            low = step * 128 % 6400
            trainer.step(rows[low : low + 128])
        decoder = torch.nn.functional.normalize(trainer.finish().W_dec.detach(), dim=1)
        found[config.whiten] = float((planted @ decoder.T).max(dim=1).values.mean())
    assert found["zca"] > found[None] + 0.05, found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"whiten": "zca", "hook_out": "b"}, "whiten is for SAEs: a transcoder has two kinds of rows"),
        ({"whiten_shrinkage": 0.1}, "whiten_shrinkage is a setting of whiten"),
        ({"whiten": "zca", "whiten_shrinkage": 1.0}, "whiten_shrinkage = 1.0 must be at least 0 and below 1"),
        ({"whiten": "zca", "init": "x"}, "use whiten or init"),
        ({"whiten": "all"}, "whiten is 'all', it should be"),
    ],
)
def test_whitening_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        replace(CONFIG, **settings)


def test_too_few_rows_to_whiten_by(tmp_path: Path) -> None:
    few = ActivationStore.from_tensors([mixture(30)], tmp_path / "few", HOOK, dtype="float32")
    config = replace(WHITEN, tokens=128, batch_size=8, heldout_fraction=0.2)
    with pytest.raises(SteersmanError, match=r"whitening 16 dimensions needs at least 32 rows .* there are 24"):
        train_sae(few, config, tmp_path / "run")


# Fine-tuning


@pytest.mark.parametrize("layout", ["saelens", "sparsify"])
def test_no_step_gives_back_the_sae_that_was_there(layout: str, there: Path, tmp_path: Path) -> None:
    path = there
    if layout != "saelens":
        path = tmp_path / "other"
        convert(there, path, to=layout)
    before, x = SAE.load(path), uneven(300, seed=9)
    trainer = trainer_of(replace(CONFIG, init=str(path)), uneven(2000, seed=4))
    z = trainer.scaled(x)[0]
    torch.testing.assert_close(trainer.sae.encode(z), before.encode(x) * trainer.inputs.scale, atol=1e-4, rtol=1e-4)
    after = trainer.finish()
    torch.testing.assert_close(after.encode(x), before.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after(x), before(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [name for name, kind in TRAINABLE.items() if not (kind.side_by_side or kind.supervised)],
)
def test_every_architecture_can_be_trained_on(name: str, tmp_path: Path) -> None:
    kind = SAE.architectures[name]
    sparsity: dict[str, Any] = {"target_l0": 3.0} if kind.target_l0 == "required" else {"k": 3 if kind.uses_k else 0}
    config = replace(CONFIG, **{"k": 0, **sparsity}, architecture=name, init=str(tmp_path / "sae"))
    cfg = SAEConfig(d_in=16, d_sae=40, k=config.k, architecture=name, group_sizes=config.group_sizes)
    before, x, generator = SAE(cfg, torch.Generator().manual_seed(1)), uneven(200), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, value in before.state_dict().items():
            if key not in ("W_enc", "W_dec"):
                value.add_(0.05 * torch.rand(value.shape, generator=generator) + (value < 0).float())
    before.save(tmp_path / "sae")
    after = trainer_of(config, uneven(2000)).finish()
    torch.testing.assert_close(after.encode(x), before.encode(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after(x), before(x), atol=1e-5, rtol=1e-4)


def test_a_fine_tuned_run_goes_on_from_its_weights(there: Path, store: ActivationStore, tmp_path: Path) -> None:
    config = replace(CONFIG, init=str(there), tokens=1280)
    before = SAE.load(there)

    sae = train_sae(store, config, tmp_path / "a")
    alike = (sae.W_dec * before.W_dec).detach().sum(1)
    assert float(alike.min()) > 0.9  # moved, and by little
    assert not torch.equal(sae.W_dec, before.W_dec)
    assert sae.cfg.metadata["heldout"]["fvu"] < before.cfg.metadata["heldout"]["fvu"]
    plain = train_sae(store, replace(config, init=None), tmp_path / "b")
    rates = [one.cfg.metadata["training"]["lr"] for one in (sae, plain)]
    assert rates[0] == pytest.approx(rates[1] / 5)
    with stopped_before(7):
        train_sae(store, replace(config, checkpoint_every=5), tmp_path / "c")
    assert_equal_weights(sae, train_sae(store, config, tmp_path / "c"))
    before.b_dec.data[0] += 1e-3
    before.save(tmp_path / "other")
    with pytest.raises(SteersmanError, match=r"another configuration \(init was '\w{16}', now '\w{16}'\)"):
        train_sae(store, replace(config, init=str(tmp_path / "other")), tmp_path / "a")


def test_what_a_run_cannot_start_from(there: Path, store: ActivationStore, tmp_path: Path, caplog: Any) -> None:
    def start(path: Path | str = there, **settings: Any) -> None:
        train_sae(store, replace(CONFIG, **{"init": str(path), "tokens": 256, **settings}), tmp_path / "never")

    for settings, message in [
        (
            {"architecture": "batch_topk"},
            r"is an SAE of architecture topk, and this run trains architecture batch_topk",
        ),
        ({"d_sae": 48}, r"is an SAE of d_sae 40, and this run trains d_sae 48"),
        ({"path": tmp_path / "nothing"}, "nothing"),
    ]:
        with pytest.raises(SteersmanError, match=message):
            start(**settings)
    changes: list[tuple[dict[str, Any], str]] = [
        (
            {"hook_name": "blocks.1.hook_resid_post"},
            r"is an SAE of blocks.1.hook_resid_post, and this run reads blocks.0",
        ),
        ({"input_norm": "layer_norm"}, r"normalises each token \(layer_norm\)"),
    ]
    for number, (change, message) in enumerate(changes):
        sae = SAE.load(there)
        sae.cfg = replace(sae.cfg, **change)
        sae.save(tmp_path / str(number))
        with pytest.raises(SteersmanError, match=message):
            start(tmp_path / str(number))
    sae = SAE.load(there)
    sae.W_dec.data[3] *= 1.5
    sae.save(tmp_path / "long")
    with pytest.raises(
        SteersmanError, match=r"decoder rows of lengths 1 to 1.5: .* a topk SAE would choose other features"
    ):
        start(tmp_path / "long")
    assert not (tmp_path / "never").exists()
    sae = SAE.load(there)
    sae.cfg = replace(sae.cfg, model_name="base")
    sae.save(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        start(tmp_path / "base", k=4)
    assert "is of base; the features go on with toy" in caplog.text
    assert "has k 3; it goes on with k 4" in caplog.text


def test_rows_of_any_length_are_made_unit_where_nothing_depends_on_them(there: Path, tmp_path: Path) -> None:
    cfg = SAEConfig(d_in=16, d_sae=40, architecture="relu", hook_name=HOOK)
    sae, x = SAE(cfg, torch.Generator().manual_seed(0)), uneven(200)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 3, 40)[:, None])
        sae.b_enc.add_(0.1)
    sae.save(tmp_path / "relu")
    initial = InitialSAE(str(tmp_path / "relu"), cfg).sae
    torch.testing.assert_close(initial(x), sae(x))
    torch.testing.assert_close(initial.W_dec.norm(dim=1), torch.ones(40))
