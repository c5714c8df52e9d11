"""A supervised latent: it learns its label, costs no reconstruction, never crowds, and steers exactly."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ranks import run_ranks
from support.tiny_models import D, with_text
from support.training import mixture, trainer_of
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import SteersmanError
from steersman.ranking import auroc
from steersman.sae import SAE, SAEConfig, SupervisedTopKSAE, TopKSAE
from steersman.sae.training import TrainingState
from steersman.steer import Steerer
from steersman.train import ActivationStore, HookView, TrainConfig, train_many, train_sae
from steersman.train.run.sweep import SweepRun

HOOK = "blocks.1.hook_resid_post"
N, ROWS, WIDTH, ATOMS = 400, 25, 64, 100
"""Texts, tokens of each, width of a row, and directions that it is a mixture of."""
SETTINGS: dict[str, Any] = {"d_sae": 128, "k": 4, "batch_size": 256, "tokens": 80_000, "heldout_fraction": 0.2}
pytestmark = pytest.mark.usefixtures("no_progress")


def planted(hidden: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a sparse mixture with a direction more where the text's label is 1; the labels, of which a share `hidden`
    is not known; and the true ones."""
    g = torch.Generator().manual_seed(0)
    truth = (torch.rand(N, generator=g) < 0.4).long().repeat_interleave(ROWS)
    y = F.normalize(torch.randn(WIDTH, generator=g), dim=0)
    amount = 1 + 2 * torch.rand(N * ROWS, 1, generator=g)
    x = mixture(N * ROWS, WIDTH, ATOMS) + truth[:, None] * amount * y
    unknown = (torch.rand(N, generator=g) < hidden).repeat_interleave(ROWS)
    return x, torch.where(unknown, -1, truth), truth


def store_of(x: Tensor, labels: Tensor | None, out: Path) -> ActivationStore:
    def batches() -> Iterator[dict[str, Any]]:
        doc_ids = torch.arange(len(x)) // ROWS
        for part in torch.arange(len(x)).split(1000):
            given = {} if labels is None else {"labels": labels[part].numpy()}
            yield {"x": x[part], "doc_ids": doc_ids[part].numpy(), **given}

    return ActivationStore.from_tensors(batches(), out, HOOK, dtype="float32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, SAE, SAE, Tensor]:
    """A labelled store, the SAE trained on its labels, one that does not weigh them, and the true labels."""
    folder = tmp_path_factory.mktemp("supervised")
    x, labels, truth = planted()
    store = store_of(x, labels, folder / "acts")
    with_it, without = (
        train_sae(store, out=folder / f"run{c}", architecture="supervised_topk", options={"coefficient": c}, **SETTINGS)
        for c in (1.0, 0.0)
    )
    return store, with_it, without, truth


def test_the_latent_tells_the_label_of_texts_that_were_held_out(trained: Any) -> None:
    store, sae, without, truth = trained
    start, stop = store.split_rows("heldout", 0.2)
    x = store.activations(torch.arange(start, stop))
    y = truth[start:stop].bool()[:, None]
    assert float(auroc(sae.label_logits(x)[:, None], y)) > 0.95
    texts = sae.label_logits(x).view(-1, ROWS).mean(1)
    assert float(auroc(texts[:, None], y.view(-1, ROWS)[:, :1])) > 0.99
    bce, untaught = (
        float(F.binary_cross_entropy_with_logits(one.label_logits(x), y[:, 0].float())) for one in (sae, without)
    )
    assert bce < 0.1  # log-odds as they were trained, after the scale of training is folded in
    assert untaught > 3 * bce


def test_reconstruction_is_no_worse_than_without_the_label(trained: Any) -> None:
    _, sae, without, _ = trained
    fvu, plain = (one.cfg.metadata["heldout"]["fvu"] for one in (sae, without))
    assert fvu < plain * 1.02
    assert sae.cfg.metadata["heldout"]["l0"] < without.cfg.metadata["heldout"]["l0"]  # on where its label is


def test_labels_that_nobody_knows_train_the_plain_sae(tmp_path: Path) -> None:
    x, labels, _ = planted()
    short = {**SETTINGS, "tokens": 5000}
    nothing = store_of(x, torch.full_like(labels, -1), tmp_path / "nothing")
    plain = train_sae(store_of(x, None, tmp_path / "plain"), out=tmp_path / "a", **short)
    blind = train_sae(nothing, out=tmp_path / "b", architecture="supervised_topk", **short)
    assert isinstance(blind, TopKSAE)
    assert blind.cfg.architecture == "topk"
    for name, value in plain.state_dict().items():
        assert torch.equal(blind.state_dict()[name], value), name


def test_unknown_labels_leave_every_bit_of_a_step_alone() -> None:
    rows = mixture(2048)
    weights = []
    for labels, coefficient in ((torch.full((2048,), -1.0), 1.0), (torch.ones(2048), 0.0)):
        config = TrainConfig(
            d_sae=48, k=4, architecture="supervised_topk", batch_size=256, options={"coefficient": coefficient}
        )
        trainer = trainer_of(config, rows)
        for part in torch.cat([rows, labels[:, None]], 1).split(256):
            trainer.step(part)
        weights.append({name: value.clone() for name, value in trainer.sae.state_dict().items()})
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_the_loss_is_the_definitions() -> None:
    torch.manual_seed(0)
    options = {"coefficient": 0.7, "positive_weight": 3.0}
    sae = SAE(SAEConfig(d_in=6, d_sae=20, k=3, architecture="supervised_topk", options=options))
    x, y = torch.randn(50, 6), torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0]).repeat(10)
    assert isinstance(sae, SupervisedTopKSAE)
    with torch.no_grad():
        sae.log_gain.fill_(0.4)
    step = sae.training_step(x, x, TrainingState(labels=y))
    z = math.exp(0.4) * ((x - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, 0]
    known = y >= 0
    weight = torch.where(y == 1, 3.0, 1.0)
    bce = -weight * torch.where(y == 1, F.logsigmoid(z), F.logsigmoid(-z))
    torch.testing.assert_close(step.losses["label"] / x.numel(), 0.7 * bce[known].mean())
    step.losses["label"].backward()
    assert sae.W_enc.grad is not None
    assert bool((sae.W_enc.grad[:, 1:] == 0).all())
    assert sae.b_dec.grad is None or bool((sae.b_dec.grad == 0).all())
    with pytest.raises(SteersmanError, match="got none"):
        sae.training_step(x, x, TrainingState())


def test_latent_0_is_always_there_and_never_crowds() -> None:
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_in=6, d_sae=20, k=3, architecture="supervised_topk"))
    x = torch.randn(40, 6)
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = torch.zeros_like(z)
    top = z[:, 1:].topk(3, dim=1)
    expected[:, 1:].scatter_(1, top.indices, top.values.relu())
    expected[:, 0] = z[:, 0].relu()
    torch.testing.assert_close(sae.encode(x), expected)
    code = sae.encode_sparse(x)
    assert code.values.shape == (40, 4)
    assert bool((code.values[:, :-1] >= code.values[:, 1:]).all())
    some = torch.tensor([0, 5, 0, 19])
    torch.testing.assert_close(sae.encode_features(x, some), expected[:, some])
    x_hat, _ = sae.reconstruct(x)
    torch.testing.assert_close(x_hat, expected @ sae.W_dec + sae.b_dec)


def test_it_comes_back_from_its_folder_and_other_programs_read_it_as_topk(trained: Any, tmp_path: Path) -> None:
    store, sae, _, _ = trained
    sae.save(tmp_path / "sae")
    again = SAE.load(tmp_path / "sae")
    assert isinstance(again, SupervisedTopKSAE)
    x = store.activations(torch.arange(50))
    assert torch.equal(again.label_logits(x), sae.label_logits(x))
    assert again.cfg.options == {"coefficient": 1.0}
    assert set(load_file(tmp_path / "sae" / "sae_weights.safetensors")) == {"W_enc", "W_dec", "b_enc", "b_dec"}
    fields = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert (fields["architecture"], fields["k"]) == ("topk", 4)
    del fields["metadata"]["steersman"]
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(fields))
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    save_file(load_file(weights), weights)
    assert type(SAE.load(tmp_path / "sae")) is TopKSAE


def test_steering_by_it_at_scale_1_changes_no_bit_and_beyond_it_only_its_tokens() -> None:
    lm = with_text("llama")
    cfg = SAEConfig(d_in=D, d_sae=40, k=4, architecture="supervised_topk", hook_name=HOOK)
    sae = SAE(cfg, torch.Generator().manual_seed(0))
    ids = lm.encode("w5 w6 w7 w8 w9 w10").input_ids
    h = lm.capture(ids, hooks=[HOOK])[HOOK][0]
    base, st = lm.logits(ids), Steerer(lm)
    with st.features(sae, {0: 1.0}, mode="scale", scope="all"):
        assert torch.equal(lm.logits(ids), base)
    with st.features(sae, {0: -5.0}, mode="scale", scope="all", include_bos=True):
        changed = lm.capture(ids, hooks=[HOOK])[HOOK][0]
    active = sae.encode(h)[:, 0] > 0
    assert 0 < int(active.sum()) < len(active)
    assert torch.equal((changed != h).any(1), active)
    expected = h - 6 * sae.encode(h)[:, :1] * sae.W_dec[0]
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)


def test_runs_with_and_without_labels_share_a_store_and_a_stopped_one_resumes(tmp_path: Path) -> None:
    x, labels, _ = planted()
    store = store_of(x, labels, tmp_path / "acts")
    short = {**SETTINGS, "tokens": 5000}
    plain, mine = TrainConfig(**short), TrainConfig(architecture="supervised_topk", **short)
    runs = {"plain": SweepRun(config=plain), "mine": SweepRun(config=mine)}
    found = train_many(store, runs, out=tmp_path / "many")
    alone = train_sae(HookView(store, HOOK), mine, out=tmp_path / "alone", checkpoint_every=7)
    for name, value in alone.state_dict().items():
        assert torch.equal(found["mine"].state_dict()[name], value), name
    (tmp_path / "alone" / "cfg.json").unlink()  # as if it had been stopped before it was saved
    resumed = train_sae(store, mine, out=tmp_path / "alone", checkpoint_every=7)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in alone.state_dict().items())
    a, b = (cast(SupervisedTopKSAE, sae).label_logits(x[:9]) for sae in (resumed, alone))
    assert torch.equal(a, b)


def _train_on_a_rank(folder: str) -> str:
    try:
        train_sae(f"{folder}/acts", out=f"{folder}/run", architecture="supervised_topk", **SETTINGS)
    except SteersmanError as error:
        return str(error)
    return "trained"


def test_what_it_cannot_be_trained_on_is_said_at_once(tmp_path: Path) -> None:
    x, labels, _ = planted()
    plain = store_of(x[:2000], None, tmp_path / "plain")
    with pytest.raises(
        SteersmanError, match="trains on labels, and .* has none: cache labelled text with label_column"
    ):
        train_sae(plain, out=tmp_path / "run", architecture="supervised_topk", **SETTINGS)
    assert not (tmp_path / "run" / "config.json").exists()
    store_of(x[:2000], labels[:2000], tmp_path / "acts")
    assert all("trains in one process" in said for said in run_ranks(2, _train_on_a_rank, str(tmp_path)))
    for options, message in (({"coefficient": -1.0}, "must be a number of 0 or more"), ({"coef": 1.0}, "no option")):
        with pytest.raises(SteersmanError, match=message):
            SAEConfig(d_in=4, d_sae=8, k=2, architecture="supervised_topk", options=options)
    with pytest.raises(SteersmanError, match="lower k"):
        SAEConfig(d_in=4, d_sae=8, k=8, architecture="supervised_topk")
