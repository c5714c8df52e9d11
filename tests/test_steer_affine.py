"""Affine edits and how they are made: the closed forms, from Gaussians whose means and covariances are known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runtime_contract import check_contract, check_off
from support.tiny_models import D, with_text
from torch import Tensor

from steersman.cli import main
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import (
    AffineEdit,
    EditSet,
    HeadEdit,
    LoReFTEdit,
    Steerer,
    TokenGate,
    evaluate_steering,
    fit_affine,
    steered,
)
from steersman.steer.analysis.thresholds import probe_sides
from steersman.steer.methods.affine import AFFINE_METHODS, AffineConfig, AffineMethod, affine_maps
from steersman.steer.methods.gaussians import erasing_direction, gaussian_transport, power, shrunk
from steersman.steer.methods.moments import RunningCovariance

HOOK = "blocks.1.hook_resid_post"


def covariance(width: int, seed: int) -> Tensor:
    a = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / width + 0.1 * torch.eye(width, dtype=torch.float64)


def matrix(edit: AffineEdit) -> Tensor:
    found = edit.as_map(edit.width)
    assert found is not None
    return torch.eye(edit.width, dtype=torch.float64) if found.matrix is None else found.matrix


def offset(edit: AffineEdit) -> Tensor:
    found = edit.as_map(edit.width)
    assert found is not None
    return found.offset


def vector(width: int, seed: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x: Tensor) -> RunningCovariance:
    found = RunningCovariance()
    found.add(x)
    return found


def known(n: int, mean: Tensor, spread: Tensor) -> RunningCovariance:
    """What n samples of this very mean and covariance would leave."""
    return RunningCovariance(n, mean, n * spread)


def test_streamed_covariance_is_that_of_all_samples() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    parts = [moments(x[:1]), moments(x[1:20]), RunningCovariance(), moments(x[20:])]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merged(part)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.mean, x.mean(0))
    assert whole.n == 50
    with pytest.raises(SteersmanError, match="no examples"):
        _ = RunningCovariance().covariance


def test_transport_carries_one_gaussian_into_the_other() -> None:
    source, target = covariance(12, 1), covariance(12, 2)
    a = gaussian_transport(source, target)
    torch.testing.assert_close(a, a.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(a @ source @ a, target, rtol=0, atol=1e-12)
    assert float(torch.linalg.eigvalsh(a)[0]) > 0  # the gradient of a convex function: no other map moves less
    edit = AFFINE_METHODS["mimic"]().fit(known(40, vector(12, 3), source), known(40, vector(12, 4), target), 0.0)
    torch.testing.assert_close(matrix(edit) @ vector(12, 3) + offset(edit), vector(12, 4), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix(edit) @ source @ matrix(edit).T, target, rtol=0, atol=1e-12)


def test_equal_covariances_give_the_difference_of_the_means_and_equal_classes_nothing() -> None:
    spread, a, b = covariance(9, 1), vector(9, 2), vector(9, 3)
    edit = AFFINE_METHODS["mimic"]().fit(known(30, a, spread), known(30, b, spread), 0.0)
    torch.testing.assert_close(matrix(edit), torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-11)
    shift = AFFINE_METHODS["mean"]().fit(known(30, a, spread), known(30, b, spread), 0.0)
    torch.testing.assert_close(offset(shift), b - a)
    torch.testing.assert_close(offset(edit), offset(shift), rtol=0, atol=1e-11)
    h = torch.randn(2, 3, 9)
    assert AffineEdit.of_matrix(torch.eye(9), a.float(), a.float()).change(h).abs().max() == 0


def test_shrinkage_and_the_samples_it_takes_to_do_without() -> None:
    few = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = moments(few).covariance
    assert int((torch.linalg.eigvalsh(s + 1e-7) < 1e-10).sum()) >= 44  # a constant in every entry adds one dimension
    better = shrunk(s, 0.1)
    assert float(torch.linalg.eigvalsh(better)[0]) == pytest.approx(0.1 * float(s.trace()) / 64)
    assert float(better.trace()) == pytest.approx(float(s.trace()))
    pair = (moments(few[:10]), moments(few[10:]))
    for name in ("mimic", "leace", "leace_shift"):
        method = AFFINE_METHODS[name]()
        with pytest.raises(SteersmanError, match="more than 64 samples of each class .* 10 and 10.*shrinkage"):
            method.check(*pair, 0.0)
        method.check(*pair, 0.1)
        assert float(matrix(method.fit(*pair, 0.1)).norm()) < 100
    AFFINE_METHODS["mean"]().check(*pair, 0.0)
    with pytest.raises(SteersmanError, match="no inverse.*shrinkage"):
        gaussian_transport(moments(few).covariance, s)


def erased_by_whitening(x: Tensor, z: Tensor) -> Tensor:
    """LEACE as its paper writes it, for labels [N, c] of any number: x - W^+ P W (x - mu)."""
    mu = x.mean(0)
    s_xx, s_xz = (x - mu).T @ (x - mu) / len(x), (x - mu).T @ (z - z.mean(0)) / len(x)
    values, vectors = torch.linalg.eigh(s_xx)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    span = torch.linalg.svd(whiten @ s_xz, full_matrices=False)
    basis = span.U[:, 1e-9 * span.S[0] < span.S]
    return x - (x - mu) @ (torch.linalg.inv(whiten) @ basis @ basis.T @ whiten).T


def two_classes(n: int, width: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = (torch.rand(n, generator=g) < 0.3).double()
    x = torch.randn(n, width, generator=g, dtype=torch.float64) @ power(covariance(width, 6), 0.5)
    return x + torch.outer(z, 2 * vector(width, 7)) + vector(width, 8), z


def probe_accuracy(x: Tensor, z: Tensor) -> float:
    """Of the best linear probe of the squared error, on the states it was fitted to, over always the larger class."""
    inputs = torch.cat([x - x.mean(0), torch.ones(len(x), 1, dtype=x.dtype)], 1)
    logit = inputs @ (torch.linalg.pinv(inputs, rtol=1e-8) @ (z - 0.5))  # what was erased is no input any more
    return float(((logit > 0) == (z > 0.5)).double().mean()) - float(max(z.mean(), 1 - z.mean()))


def test_after_leace_no_linear_probe_tells_the_classes() -> None:
    x, z = two_classes(500, 10)
    source, target = moments(x[z == 0]), moments(x[z == 1])
    edit = AFFINE_METHODS["leace"]().fit(source, target, 0.0)
    erased = x + edit.change(x)
    torch.testing.assert_close(erased, erased_by_whitening(x, z[:, None]), rtol=0, atol=1e-10)
    centred = z - z.mean()
    torch.testing.assert_close(centred @ erased, torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-9)
    assert probe_accuracy(x, z) > 0.15
    assert abs(probe_accuracy(erased, z)) < 0.01
    assert edit.rank == 1
    # No erasure moves the states less: not that along the difference of the means, which is orthogonal.
    u = target.mean - source.mean
    orthogonal = -torch.outer((x - x.mean(0)) @ u, u) / (u @ u)
    assert edit.change(x).square().sum() < orthogonal.square().sum()
    shifted = AFFINE_METHODS["leace_shift"]().fit(source, target, 0.0)
    moved = x[z == 0] + shifted.change(x[z == 0])
    torch.testing.assert_close(moved.mean(0), target.mean, rtol=0, atol=1e-10)


def test_erasing_of_a_singular_covariance_stays_in_its_range() -> None:
    x, z = two_classes(400, 6)
    flat = torch.cat([x, x[:, :2] @ torch.ones(2, 3, dtype=x.dtype)], 1)  # three columns that are sums of others
    mu = flat.mean(0)
    crossed = (flat - mu).T @ (z - z.mean()) / len(z)
    u, v = erasing_direction(moments(flat).covariance, crossed)
    erased = flat - torch.outer((flat - mu) @ v, u)
    assert float(((z - z.mean()) @ erased).abs().max()) < 1e-8
    torch.testing.assert_close(erased[:, 6:], erased[:, :2] @ torch.ones(2, 3, dtype=x.dtype), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", list(AFFINE_METHODS))
def test_figures_are_of_states_the_map_was_not_made_from(method: str) -> None:
    g = torch.Generator().manual_seed(1)
    spreads, means = (covariance(5, 1), covariance(5, 2)), (vector(5, 3), 3 * vector(5, 4))

    def half() -> tuple[RunningCovariance, RunningCovariance]:
        draws = (torch.randn(4000, 5, generator=g, dtype=torch.float64) for _ in range(2))
        return tuple(moments(m + x @ power(s, 0.5)) for x, m, s in zip(draws, means, spreads))  # pyright: ignore

    halves = {HOOK: (half(), half())}
    edits, figures = affine_maps(halves, AffineConfig(method=method))
    found = figures[HOOK]
    assert found["n_source"] == 8000
    assert found["mean_gap"] < 0.05
    if method == "mimic":
        assert found["distance"] < 0.01
    elif method == "mean":
        assert 0.01 < found["distance"] < 0.3  # the covariances still differ
    assert edits[HOOK].width == 5
    assert affine_maps(halves, AffineConfig(method=method, diagnostics=False))[1][HOOK] == {
        "n_source": 8000, "n_target": 8000,
    }  # fmt: skip


def test_low_rank_and_full_matrices_are_the_same_map() -> None:
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(8, 2, generator=g), torch.randn(8, 2, generator=g)
    mean, shift, h = torch.randn(8, generator=g), torch.randn(8, generator=g), torch.randn(3, 4, 8, generator=g)
    low = AffineEdit(write=u, read=v, mean=mean, shift=shift)
    full = AffineEdit(write=u @ v.T, mean=mean, shift=shift)
    assert (low.rank, full.rank) == (2, 8)
    torch.testing.assert_close(low.change(h), full.change(h), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low.change(h), torch.einsum("bsd,rd,er->bse", h - mean, v.T, u) + shift)
    by_matrix = h.double() @ matrix(low).T + offset(low) - h
    torch.testing.assert_close(low.change(h).double(), by_matrix, rtol=1e-4, atol=1e-5)


def test_what_belongs_together_is_checked() -> None:
    for wrong, said in (
        ({"write": torch.ones(4, 2)}, r"write .* must be \[4, 4\], got \[4, 2\]"),
        ({"write": torch.ones(4, 2), "read": torch.ones(3, 2)}, r"read .* must be \[4, 2\], got \[3, 2\]"),
        ({"write": torch.ones(4, 2), "read": torch.ones(4, 2), "mean": torch.ones(3)}, r"mean .* \[4\], got \[3\]"),
        ({"shift": torch.tensor([1.0, float("nan")])}, "shift .* NaN"),
        ({"read": torch.ones(4, 2), "shift": torch.ones(4)}, "needs a write matrix"),
        ({}, "needs a write matrix"),
    ):  # fmt: skip
        kinds: Any = wrong
        with pytest.raises(SteersmanError, match=said):
            AffineEdit(**kinds)
    lm = with_text("llama")
    with pytest.raises(SteersmanError, match="width 3"):
        Steerer(lm).edit(HOOK, AffineEdit(shift=torch.ones(3)))
    with pytest.raises(SteersmanError, match="holds none"):
        Steerer(lm).edit("blocks.1.hook_attn_mask", AffineEdit(shift=torch.ones(D)))
    with pytest.raises(SteersmanError, match="rank 9"):
        LoReFTEdit(torch.ones(9, 8), torch.ones(9, 8), torch.ones(9))
    with pytest.raises(SteersmanError, match="needs R"):
        LoReFTEdit(torch.ones(2, 8), torch.ones(3, 8), torch.ones(2))


def test_loreft_replaces_the_part_in_its_subspace() -> None:
    g = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(8, 3, generator=g)).Q.T
    weight, bias, h = torch.randn(3, 8, generator=g), torch.randn(3, generator=g), torch.randn(2, 5, 8, generator=g)
    edit = LoReFTEdit(rotation, weight, bias)
    new = h + edit.affine().change(h)
    torch.testing.assert_close(new, h + (h @ weight.T + bias - h @ rotation.T) @ rotation)
    torch.testing.assert_close(new @ rotation.T, h @ weight.T + bias)  # in the subspace: the linear function
    outside = torch.eye(8) - rotation.T @ rotation
    torch.testing.assert_close(new @ outside, h @ outside)
    start = LoReFTEdit.start(8, 3, seed=4)
    torch.testing.assert_close(start.affine().change(h), torch.zeros_like(h), rtol=0, atol=1e-5)
    assert edit.affine().rank == 3


def test_loreft_trains_and_stays_orthonormal(lm: LanguageModel) -> None:
    edit = LoReFTEdit.start(D, 2)
    for tensor in edit.parameters().values():
        tensor.requires_grad_()
    optimizer = torch.optim.Adam(edit.parameters().values(), lr=0.05)
    batch = lm.encode(["w5 w6 w7 w8", "w9 w10 w11 w12"])
    losses = []
    for _ in range(15):
        with Steerer(lm).edit(HOOK, edit):
            logits = lm.logits(batch.input_ids, batch.attention_mask, grad=True)
        loss = -logits[:, -1].log_softmax(-1)[:, 33].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    write = edit.affine().write
    assert write is not None
    torch.testing.assert_close(write.T @ write, torch.eye(2), rtol=0, atol=1e-5)
    lm.model.zero_grad()


TEXTS = [" ".join(f"w{i}" for i in torch.randint(4, 60, (6,), generator=torch.Generator().manual_seed(s)).tolist())
         for s in range(24)]  # fmt: skip
SIDES = [[f"{side} {text}" for text in TEXTS] for side in ("w5 w6 w7", "w8 w9 w10")]


@pytest.mark.parametrize("method", list(AFFINE_METHODS))
def test_fitted_on_texts(lm: LanguageModel, method: str, tmp_path: Path) -> None:
    edits = fit_affine(lm, SIDES[0], SIDES[1], hook=HOOK, method=method, batch_size=7)
    source, target = (
        torch.cat([lm.capture(lm.encode([text]).input_ids, hooks=[HOOK])[HOOK][0, 1:] for text in side]).double()
        for side in SIDES
    )
    edit = edits[HOOK]
    assert isinstance(edit, AffineEdit)
    by_hand = AFFINE_METHODS[method]().fit(moments(source), moments(target), 0.0)
    torch.testing.assert_close(edit.change(source), by_hand.change(source), rtol=1e-3, atol=1e-3)
    moved = source + edit.change(source)
    aim = target + edit.change(target) if method == "leace" else target
    torch.testing.assert_close(moved.mean(0), aim.mean(0), rtol=1e-3, atol=1e-3)
    if method == "mimic":
        torch.testing.assert_close(torch.cov(moved.T), torch.cov(target.T), rtol=1e-2, atol=1e-2)
    figures = edits.metadata["diagnostics"][HOOK]
    assert figures["n_source"] == len(source)
    assert figures["mean_gap"] < 0.8
    edits.save(tmp_path / "e.safetensors")
    again = EditSet.load(tmp_path / "e.safetensors")
    assert (again.method, again.metadata) == (method, edits.metadata)
    batch = lm.encode(TEXTS[:3])
    found = []
    for one in (edits, again):
        with steered(one, lm):
            found.append(lm.logits(batch.input_ids, batch.attention_mask))
    assert torch.equal(*found)
    report = evaluate_steering(lm, edits, ["w5 w6", "w7"], scale=(0.0, 1.0), words=("w7",), max_new_tokens=4)
    assert report.to_text()


def test_behind_the_last_norm_where_the_source_acts(lm: LanguageModel) -> None:
    """The state that the output layer reads: there, the logits follow from the map in closed form."""
    edits = fit_affine(lm, *SIDES, hook="model.norm", method="mimic")
    (edit,) = edits.values()
    assert isinstance(edit, AffineEdit)
    batch = lm.encode(TEXTS[:2])
    h = lm.capture(batch.input_ids, hooks=["model.norm"])["model.norm"]
    with steered(edits, lm, include_bos=True):
        found = lm.logits(batch.input_ids)
    torch.testing.assert_close(found, lm.model.lm_head(h + edit.change(h)), rtol=1e-4, atol=1e-3)


def test_a_method_of_ones_own(lm: LanguageModel) -> None:
    class Middle(AffineMethod):
        """Half of the way."""

        name = "middle"
        source = "a test"
        inverts = False

        def fit(self, source: RunningCovariance, target: RunningCovariance, shrinkage: float) -> AffineEdit:
            return AffineEdit(shift=(target.mean - source.mean) / 2)

    try:
        half, whole = (fit_affine(lm, *SIDES, hook=HOOK, method=name)[HOOK] for name in ("middle", "mean"))
        assert isinstance(half, AffineEdit)
        assert isinstance(whole, AffineEdit)
        torch.testing.assert_close(2 * half.change(torch.zeros(D)), whole.change(torch.zeros(D)))
    finally:
        del AFFINE_METHODS._parts[Middle.name]


def test_what_cannot_be_fitted(lm: LanguageModel) -> None:
    for options, said in (
        ({"positions": "mean", "method": "mimic"}, "needs more than 16 samples .* 5 and 5"),
        ({"method": "nearest"}, "unknown affine method 'nearest'"),
        ({"shrinkage": 2.0}, "between 0 and 1"),
        ({"positions": "answer"}, "reads the answer"),
        ({"hook": [HOOK, HOOK]}, "once"),
        ({"bandwidth": 1}, "bandwidth"),
    ):  # fmt: skip
        settings: Any = {"hook": HOOK, **options}
        with pytest.raises(SteersmanError, match=said):
            fit_affine(lm, SIDES[0][:5], SIDES[1][:5], **settings)
    with pytest.raises(SteersmanError, match="no source examples"):
        fit_affine(lm, [], SIDES[1], hook=HOOK)
    with pytest.raises(SteersmanError, match="same states there"):
        fit_affine(lm, SIDES[0], SIDES[0], hook=HOOK, method="mean")
    wide = fit_affine(lm, SIDES[0][:5], SIDES[1][:5], hook=HOOK, method="mimic", positions="mean", shrinkage=0.5)
    assert wide[HOOK]


def test_only_rows_of_the_source_class_move(lm: LanguageModel) -> None:
    edits = fit_affine(lm, SIDES[0], SIDES[1], hook=HOOK, method="mean")
    batch = lm.encode([SIDES[0][0], SIDES[1][0]])
    clean = lm.logits(batch.input_ids, batch.attention_mask)
    with Steerer(lm).edit(HOOK, edits[HOOK], gate=[1.0, 0.0]) as steering:
        found = lm.logits(batch.input_ids, batch.attention_mask)
    assert torch.equal(found[1], clean[1])
    assert (found[0] - clean[0]).abs().max() > 1e-2
    assert steering.trace.rows == [9, 0]


def test_only_what_a_probe_says_is_of_the_source_moves(lm: LanguageModel) -> None:
    edits = fit_affine(lm, SIDES[0], SIDES[1], hook=HOOK, method="mimic")
    probe = probe_sides(lm, SIDES[0], SIDES[1], hook=HOOK).probe
    batch = lm.encode([SIDES[0][3], SIDES[1][3]])
    before = lm.capture(batch.input_ids, hooks=[HOOK])[HOOK]
    source = probe.values(before.flatten(0, 1))[:, 0].view(2, -1) > 0
    source[:, 0] = False  # the BOS
    with Steerer(lm).edit(HOOK, edits[HOOK], gate=TokenGate(probe, 0.0)) as steering:
        after = lm.capture(batch.input_ids, hooks=[HOOK])[HOOK]
    assert torch.equal((after != before).any(-1), source)
    assert steering.trace.rows == source.sum(1).tolist()
    assert source.any(1).all()


def sharp(family: str) -> LanguageModel:
    """A model sure enough of itself for an edit to change what it writes."""
    lm = with_text(family)
    with torch.no_grad():
        lm.model.lm_head.weight *= 3
    return lm


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["full", "low", "loreft", "heads"])
def test_the_runtime_contract(family: str, kind: str) -> None:
    lm, g = sharp(family), torch.Generator().manual_seed(3)
    full = torch.eye(D) + 0.5 * torch.randn(D, D, generator=g)
    low = torch.randn(D, 2, generator=g)
    made: dict[str, Any] = {
        "full": AffineEdit.of_matrix(full, torch.randn(D, generator=g), torch.randn(D, generator=g) * 4),
        "low": AffineEdit(write=low * 3, read=torch.randn(D, 2, generator=g), mean=torch.ones(D), shift=3 * low[:, 0]),
        "loreft": LoReFTEdit(torch.linalg.qr(low).Q.T, torch.randn(2, D, generator=g), torch.tensor([5.0, -5.0])),
        "heads": HeadEdit(torch.randn(3, 2, 8, generator=g) * 6, torch.tensor([0.0, 1.0])),
    }
    hook = "blocks.1.attn.hook_z" if kind == "heads" else HOOK
    strengths = torch.tensor([1.0, 0.5, 0.75])

    def opened(rows: Sequence[int], strengths: Tensor = strengths) -> Any:
        edit = made[kind]
        if kind == "heads":
            edit = HeadEdit(edit.vectors[list(rows)], edit.keep)
        return Steerer(lm).edit(hook, edit.scaled(strengths[list(rows)]), scope="all")

    check_contract(lm, opened)
    check_off(lm, opened([0, 1, 2], torch.zeros(3)))
    check_off(lm, Steerer(lm).edit(hook, made[kind], gate=0.0))
    saved = made[kind].saved()
    again = type(made[kind]).restored(saved)
    h = torch.randn(3, 2, D, generator=g)
    first, second = (one.as_map(D) for one in (made[kind], again))
    if kind == "heads":
        assert first is second is None
        assert torch.equal(again.vectors, made[kind].vectors)
    else:
        assert first is not None
        assert second is not None
        assert torch.equal(h.double() @ first.matrix.T + first.offset, h.double() @ second.matrix.T + second.offset)


def test_made_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = with_text("llama")
    lm.model.save_pretrained(tmp_path / "llama")
    lm.tokenizer.save_pretrained(tmp_path / "llama")
    for name, side in zip(("from", "to"), SIDES):
        (tmp_path / f"{name}.txt").write_text("\n".join(side) + "\n")
    out = tmp_path / "e.safetensors"
    command = ["vector", "make", "--model", str(tmp_path / "llama"), "--layer", "1", "--method", "mimic"]
    texts = ["--negative", str(tmp_path / "from.txt"), "--positive", str(tmp_path / "to.txt")]
    main([*command, *texts, "--out", str(out)])
    assert "mimic" in capsys.readouterr().out
    made, by_hand = EditSet.load(out)[HOOK], fit_affine(LanguageModel.load(tmp_path / "llama"), *SIDES, hook=1)[HOOK]
    assert isinstance(made, AffineEdit)
    assert isinstance(by_hand, AffineEdit)
    h = torch.randn(3, D)
    torch.testing.assert_close(made.change(h), by_hand.change(h))
    for arguments, said in (
        (["--out", str(out)], "needs examples"),
        ([*texts, "--out", str(tmp_path / "e.gguf")], "whose file is .safetensors"),
        ([*texts, "--out", str(out), "--shrinkage", "2"], "between 0 and 1"),
        ([*texts, "--out", str(out), "--positions", "mean", "--shrinkage", "0.2"], ""),
    ):
        if said:
            with pytest.raises(SystemExit):
                main([*command, *arguments])
            assert said in capsys.readouterr().err
        else:
            main([*command, *arguments])
    assert EditSet.load(out).metadata["settings"]["shrinkage"] == 0.2
