"""Crosscoders: one code for hook points side by side, and which of them a feature belongs to."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import fails
from support.stopping import stopped_before
from support.training import HOOK, weight_bytes

from steersman.errors import SteersmanError
from steersman.sae import SAE, CrosscoderSAE, SAEConfig, Side
from steersman.sae.formats import convert
from steersman.steer import SteeringVector
from steersman.train import (
    ActivationStore,
    CrosscoderConfig,
    CrosscoderReport,
    HookView,
    SideBySide,
    TrainConfig,
    crosscoder_report,
    evaluate_sae,
    train_sae,
)
from steersman.train.reports.crosscoder import latent_scaling
from steersman.train.run.checkpoints import checkpoint_to_sae
from steersman.train.store.side_by_side import open_sides

HALF = 16
"""Features that both have, that A alone has, that B alone has."""
CONFIG = TrainConfig(
    d_sae=3 * HALF, k=4, architecture="crosscoder", batch_size=128, tokens=128 * 400, seed=1, device="cpu",
    checkpoint_every=500,
)  # fmt: skip
SIDES = (Side(hook_name=HOOK, width=16, model_name="base"), Side(hook_name=HOOK, width=12, model_name="tuned"))


def dictionaries() -> torch.Tensor:
    """[48, 28]: the first 16 rows are of both sides, the next of A alone, the last of B alone; 50 times as large in
    B."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(3 * HALF, d, generator=g), dim=1) for d in (16, 12))
    a[2 * HALF :] = 0
    b[HALF : 2 * HALF] = 0
    return torch.cat([a, 50 * b], dim=1)


def rows(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(n, 3 * HALF, generator=g) < 0.08
    return (active * (0.5 + torch.rand(n, 3 * HALF, generator=g))) @ dictionaries() + 1.0


def write(folder: Path, x: torch.Tensor, model: str, hook: str = HOOK, **changed: np.ndarray) -> ActivationStore:
    n = np.arange(len(x))
    known = {"token_ids": n % 50, "doc_ids": n // 7, "positions": n % 7} | changed
    return ActivationStore.from_tensors([{"x": x, **known}], folder, hook, model_name=model, dtype="float32")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, ActivationStore]:
    folder, x = tmp_path_factory.mktemp("stores"), rows(8_000)
    return write(folder / "a", x[:, :16], "base"), write(folder / "b", x[:, 16:], "tuned")


@pytest.fixture(scope="module")
def both(stores: tuple[ActivationStore, ActivationStore]) -> SideBySide:
    return SideBySide(stores)


@pytest.fixture(scope="module")
def folder(both: SideBySide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("crosscoder") / "run"
    train_sae(both, CONFIG, out)
    return out


@pytest.fixture
def sae(folder: Path) -> CrosscoderSAE:
    found = SAE.load(folder)
    assert isinstance(found, CrosscoderSAE)
    return found


def make(selection: str = "joint", seed: int = 0) -> CrosscoderSAE:
    cfg = SAEConfig(d_in=28, d_sae=40, k=4, architecture="crosscoder", sides=SIDES, options={"selection": selection})
    sae = SAE(cfg, torch.Generator().manual_seed(seed))
    assert isinstance(sae, CrosscoderSAE)
    return sae


def auroc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """How often a positive one scores above another."""
    a, b = scores[positive], scores[~positive]
    return float((a[:, None] > b).double().mean() + 0.5 * (a[:, None] == b).double().mean())


def test_rows_stand_side_by_side_with_the_tokens_of_the_first(
    both: SideBySide, stores: tuple[ActivationStore, ActivationStore]
) -> None:
    assert both.sides == SIDES
    cases: list[dict[str, Any]] = [{}, {"split": "heldout", "shuffle": False}, {"rank": 1, "world_size": 2, "seed": 3}]
    for options in cases:
        batch = next(both.batches(64, **options))
        parts = [store.activations(batch.rows) for store in stores]
        assert torch.equal(batch.x, torch.cat(parts, dim=1))
        assert torch.equal(batch.token_ids, batch.rows % 50)
        assert torch.equal(next(stores[0].batches(64, **options)).rows, batch.rows)
    assert both.n_batches(64) == stores[0].n_batches(64)
    view = HookView(stores[1], HOOK)
    assert torch.equal(next(SideBySide([view, stores[0].path]).batches(8)).x[:, :12], next(view.batches(8)).x)


def test_shared_features_are_told_from_exclusive_ones(sae: CrosscoderSAE) -> None:
    assert sae.cfg.sides == SIDES
    planted = torch.cat([dictionaries()[:, :16], dictionaries()[:, 16:] / 50], dim=1)
    scaled = [part * scale for part, scale in zip(sae.split(sae.W_dec.detach()), sae.side_scale.tolist())]
    learned = torch.cat(scaled, dim=1)
    cosines = torch.nn.functional.normalize(learned, dim=1) @ torch.nn.functional.normalize(planted, dim=1).T
    nearest = cosines.max(dim=1)
    found = nearest.values > 0.7
    assert int(found.sum()) >= 36
    shared = sae.relative_norms().amin(dim=1)
    assert auroc(shared[found], nearest.indices[found] < HALF) >= 0.98
    of_a = sae.relative_norms()[:, 1] < 0.2
    assert bool((found & of_a).any())
    assert set(nearest.indices[found & of_a].tolist()) <= set(range(HALF, 2 * HALF))


def test_each_side_is_rebuilt_in_its_own_units(sae: CrosscoderSAE) -> None:
    x = rows(2000, seed=5)
    y = sae(x)
    recorded = sae.cfg.metadata["heldout_fvu_of_sides"]
    for a, b, fvu in zip(sae.split(x), sae.split(y), recorded):
        measured = float((a - b).square().sum() / (a - a.mean(0)).square().sum())
        assert measured == pytest.approx(fvu, rel=0.15)
        assert measured < 0.25


@pytest.mark.parametrize("selection", ["joint", "sum"])
def test_scales_are_folded_in_exactly(selection: str) -> None:
    g = torch.Generator().manual_seed(2)
    sae, x, scales = make(selection), torch.randn(50, 28, generator=g), torch.tensor([3.0, 0.02])
    torch.nn.init.normal_(sae.b_dec, generator=g)
    sae.threshold.fill_(0.3)
    with torch.no_grad():
        sae.split(sae.W_dec)[1][:10] = 0  # what is selected by differs from feature to feature
        sae.normalize_decoder()
        columns = torch.repeat_interleave(scales, torch.tensor([16, 12]))
        code, y, norms = sae.encode(x * columns), sae(x * columns) / columns, sae.decoder_norms()
        sae.fold_side_scales(scales)
    assert 0 < int((code > 0).sum()) < code.numel()
    torch.testing.assert_close(sae.encode(x), code, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decoder_norms(), norms)
    dense = torch.zeros(50, 40).scatter_add(1, *sae.encode_sparse(x)[::-1])
    torch.testing.assert_close(dense, sae.encode(x))


def test_the_sum_of_norms_weighs_the_selection_alone() -> None:
    """The N*K kept are the largest f_j s_j; their values are the f_j."""
    sae, x = make("sum"), torch.randn(20, 28, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        sae.W_dec[:20, 16:] = 0
        sae.normalize_decoder()
        z = x @ sae.W_enc + sae.b_enc
        weighted = z * sae.decoder_norms().sum(1)
        least = weighted.flatten().topk(80).values[-1]
        code = sae.encode_training(x)
    dense = torch.zeros(20, 40).scatter_add(1, code.order.indices.long(), code.values.detach())
    torch.testing.assert_close(dense, torch.where(weighted >= least, z, 0.0))
    assert code.min_selected is not None
    torch.testing.assert_close(code.min_selected, least)


def test_the_fused_update_is_autograds(both: SideBySide, tmp_path: Path) -> None:
    config = replace(CONFIG, tokens=128 * 4, options={"selection": "sum"})
    one, other = (
        train_sae(both, replace(config, fused_update=fused), tmp_path / str(fused)) for fused in (True, False)
    )
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=2e-3, atol=2e-4)


def test_it_resumes_to_the_same_bytes_and_its_checkpoints_are_crosscoders(both: SideBySide, tmp_path: Path) -> None:
    config = replace(CONFIG, tokens=128 * 24, checkpoint_every=8)
    whole = train_sae(both, config, tmp_path / "whole")
    with stopped_before(18):
        train_sae(both, config, tmp_path / "cut")
    checkpoint = checkpoint_to_sae(tmp_path / "cut")
    assert isinstance(checkpoint, CrosscoderSAE)
    torch.testing.assert_close(checkpoint.side_scale, whole.side_scale)
    train_sae(both, config, tmp_path / "cut")
    assert weight_bytes(tmp_path / "whole") == weight_bytes(tmp_path / "cut")


def test_the_report_names_what_each_has(sae: CrosscoderSAE, both: SideBySide) -> None:
    report = crosscoder_report(sae, both)
    assert isinstance(report, CrosscoderReport)
    assert min(report.counts[kind] for kind in ("shared", "A", "B")) >= 8
    assert sum(report.counts.values()) == 3 * HALF
    assert report.fvu == pytest.approx(sae.cfg.metadata["heldout_fvu_of_sides"], rel=1e-3)
    assert crosscoder_report(sae).fvu == tuple(sae.cfg.metadata["heldout_fvu_of_sides"])
    record = report.to_json(top=2)
    assert record["sides"]["B"]["model_name"] == "tuned"
    assert [one["kind"] for one in record["features"]][:4] == ["shared", "shared", "A", "A"]
    for text in (report.to_text(top=3), report._repr_html_()):
        assert f"{HOOK} of tuned" in text


def test_latent_scaling_finds_a_feature_whose_decoder_row_was_shrunk_away() -> None:
    """Two features of A alone by their decoder rows: one that is in B's error as it is in A, and one that is not."""
    sides = tuple(replace(side, width=16) for side in SIDES)
    cfg = SAEConfig(d_in=32, d_sae=32, k=2, architecture="crosscoder", sides=sides, apply_b_dec_to_input=False)
    sae, g = SAE(cfg), torch.Generator().manual_seed(0)
    assert isinstance(sae, CrosscoderSAE)
    code = torch.rand(4000, 2, generator=g) * (torch.rand(4000, 2, generator=g) < 0.3)
    unit = torch.eye(16)[:2]
    x = torch.cat([code @ unit, code[:, :1] @ unit[:1]], dim=1)  # B has the first of them
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.W_dec, sae.b_dec):
            tensor.zero_()
        sae.W_dec[:2, :16], sae.W_enc[:16, :2] = unit, unit.T
        sae.threshold.zero_()
    source: Any = SimpleNamespace(batches=lambda size, **_: (SimpleNamespace(x=part) for part in x.split(size)))
    found = latent_scaling(sae, source, CrosscoderConfig(tokens=4000))
    torch.testing.assert_close(found.error[:2], torch.tensor([[1.0, 1.0], [1.0, 0.0]]), atol=0.05, rtol=0)
    torch.testing.assert_close(found.rebuilt[:2, 1], torch.zeros(2))
    assert found.really_absent()[:2].tolist() == [[False, False], [False, True]]


def test_one_side_is_a_decoder_to_steer_with(sae: CrosscoderSAE, tmp_path: Path) -> None:
    part = sae.at("B")
    assert torch.equal(part.W_dec, sae.split(sae.W_dec)[1])
    assert (part.cfg.model_name, part.cfg.hook_name, part.cfg.d_in) == ("tuned", HOOK, 12)
    assert torch.equal(sae.at(1).W_dec, sae.at("tuned").W_dec)
    vector = SteeringVector.of_feature(part, 3)
    assert torch.equal(vector.directions[HOOK], part.W_dec[3])
    assert part.feature_stats is not None
    assert (vector.model_name, part.feature_stats.median_norm) == ("tuned", sae.cfg.metadata["median_norms"][1])
    part.save(tmp_path)
    assert torch.equal(SAE.load(tmp_path).W_dec, part.W_dec)
    with pytest.raises(SteersmanError, match="can only add features"):
        part.encode(torch.randn(2, 12))
    with pytest.raises(SteersmanError, match="names several of this crosscoder's sides"):
        sae.at(HOOK)
    with pytest.raises(SteersmanError, match="names none of this crosscoder's sides"):
        sae.at("C")


def test_reports_of_what_does_not_fit_are_refused(
    sae: CrosscoderSAE, both: SideBySide, stores: tuple[ActivationStore, ActivationStore]
) -> None:
    plain = SAE(SAEConfig(d_in=28, d_sae=8, k=2))
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (plain, None, {}, "this is a topk SAE of one hook point"),
        (
            sae,
            SideBySide([stores[1], stores[0]]),
            {},
            r"reads .* of base \[16\], .*in this order; given are .* of t",
        ),
        (sae, stores[0], {}, "in this order; given are"),
        (sae, None, {"latent_scaling": True}, "latent scaling reads activations"),
        (sae, both, {"latent_scaling": True}, "they need one width"),
        (sae, None, {"absent": 0.9}, "absent the lower"),
    ]
    for one, source, settings, message in cases:
        with pytest.raises(SteersmanError, match=message):
            crosscoder_report(one, source, **settings)
    with pytest.raises(SteersmanError, match="needs their stores, in this order: given are 1"):
        open_sides([stores[0].path], sae.cfg.sides)
    with pytest.raises(SteersmanError, match="has no latent scaling"):
        crosscoder_report(sae).confirmed("A")


def test_what_needs_one_hook_point_says_so(sae: CrosscoderSAE, stores: tuple[ActivationStore, ActivationStore]) -> None:
    with pytest.raises(SteersmanError, match="steering needs an SAE of one hook point; this is a crosscoder"):
        sae.check_residual("steering")
    with pytest.raises(SteersmanError, match="which reads .* of base, .* of tuned side by side, not one store"):
        stores[0].hook_of(sae)
    with pytest.raises(SteersmanError, match="the vector of a feature needs an SAE of one hook point"):
        SteeringVector.of_feature(sae, 3)
    with pytest.raises(SteersmanError, match="side by side, not one store"):
        evaluate_sae(sae, stores[0])
    with pytest.raises(SteersmanError, match="SAELens has no crosscoder architecture"):
        convert(sae, "nowhere", to="saelens")
    with pytest.raises(SteersmanError, match="activations of width 16 do not fit an SAE of d_in 28"):
        sae.encode(torch.randn(2, 16))


def test_stores_of_other_tokens_are_refused_by_their_first_row(
    stores: tuple[ActivationStore, ActivationStore], tmp_path: Path
) -> None:
    x, tokens = rows(8_000)[:, 16:], np.arange(8_000) % 50
    tokens[137] = 9
    other = write(tmp_path / "token", x, "tuned", token_ids=tokens)
    with pytest.raises(SteersmanError, match=r"row 137 is token 37 at position 4 of document 19 in .* and token 9 at"):
        SideBySide([stores[0], other])
    other = write(tmp_path / "context", x, "tuned", positions=np.arange(8_000) % 14)
    with pytest.raises(SteersmanError, match=r"row 7 is token 7 at position 0 .* and token 7 at position 7"):
        SideBySide([stores[0], other])
    other = write(tmp_path / "rows", x[:7_500], "tuned")
    with pytest.raises(SteersmanError, match=r"row 7500 is token 0 .* and none \(there are 7,500\)"):
        SideBySide([stores[0], other])
    with pytest.raises(SteersmanError, match="two or more different stores"):
        SideBySide([stores[0], stores[0].path])


def test_what_a_crosscoder_cannot_be_is_refused(
    both: SideBySide, stores: tuple[ActivationStore, ActivationStore], tmp_path: Path
) -> None:
    with pytest.raises(SteersmanError, match="reads two hook points or more"):
        train_sae(stores[0], CONFIG, tmp_path / "run")
    with pytest.raises(SteersmanError, match="hook_out is for transcoders"):
        replace(CONFIG, hook_out=HOOK)
    with pytest.raises(SteersmanError, match="whiten and init are for SAEs of one"):
        replace(CONFIG, whiten="zca")
    cfg = make().cfg
    for wrong, message in (
        ({"sides": SIDES[:1], "d_in": 16}, "reads two hook points or more"),
        ({"d_in": 30}, r"d_in = 30 is not the width .* 16 \+ 12"),
        ({"input_norm": "layer_norm"}, "has no input_norm"),
        ({"options": {"selection": "most"}}, "selection of a crosscoder is joint or sum, got 'most'"),
        ({"architecture": "topk", "options": {}}, "'topk' has no sides"),
    ):
        with pytest.raises(SteersmanError, match=message):
            replace(cfg, **wrong)
    constant = write(tmp_path / "constant", torch.ones(8_000, 12), "tuned")
    with pytest.raises(SteersmanError, match=f"{HOOK} of tuned: the activations do not vary"):
        train_sae(SideBySide([stores[0], constant]), CONFIG, tmp_path / "run")


def test_the_command_takes_several_stores_for_a_crosscoder_alone(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--out", "run", "--d-sae", "8", "--k", "2"]
    for several in (["--store", "a", "--store", "b"], ["--store", "a", "--hook", "g", "--hook", "h"]):
        assert "are for a crosscoder, not topk: add --architecture crosscoder" in fails(
            capsys, "train", *several, *flags
        )


def test_only_a_crosscoder_records_sides(sae: CrosscoderSAE) -> None:
    assert "sides" not in SAEConfig(d_in=4, d_sae=8, k=2).record()
    assert SAEConfig.from_record(sae.cfg.record(), metadata=sae.cfg.metadata) == sae.cfg
