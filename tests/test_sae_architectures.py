"""What an architecture owns: its name, its rules, its training step; and that one from outside the package is like any
other."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.helpers import make_sae
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import sparse_decode, topk_encode, with_gradient
from steersman.kernels.torch_ops import batch_topk_encode
from steersman.sae import (
    SAE,
    AuxTerm,
    BatchTopKSAE,
    GatedSAE,
    ReLUSAE,
    SAEConfig,
    SparseCode,
    Step,
    TopKSAE,
    TrainingState,
    auxk_gradients,
    auxk_loss,
)
from steersman.sae.features import Rows, summarize_features
from steersman.sae.formats import convert
from steersman.sae.metrics import measure_reconstruction


def seeded(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class SparseReLU(ReLUSAE):
    """A ReLU SAE from outside: an L1 penalty that grows, and how many latents are active, logged."""

    name = "sparse_relu"
    trainable = True
    defaults: ClassVar = {"l1": 0.1}

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        step = super().training_step(x, target, state)
        penalty = self.latents.total(step.code.values.sum())
        losses = step.losses | {"l1": self.options["l1"] * state.progress * penalty}
        return Step(step.code, losses, {"active": step.code.active.sum()})


# The training step


def todays_formula(sae: SAE, x: Tensor, aux: AuxTerm | None) -> Tensor:
    """The loss as the trainer wrote it before architectures owned theirs."""
    rows, bias = sae.W_enc.T, sae.b_dec
    if sae.name == "topk":
        values, order = topk_encode(x, rows, sae.b_enc, sae.cfg.k, bias)
    else:
        with torch.no_grad():
            values, indices, _ = batch_topk_encode(x, rows, sae.b_enc, sae.cfg.k, bias)
        values, order = with_gradient(x, rows, sae.b_enc, bias, values, indices)
    residual = x - sparse_decode(values, order, sae.W_dec, sae.b_dec)
    loss = residual.square().sum()
    if aux is not None:
        Z = torch.addmm(sae.b_enc[aux.candidates], x - bias.detach(), sae.W_enc.T[aux.candidates].T)
        Z = Z.masked_fill(aux.alive, float("-inf"))
        best, chosen = Z.topk(min(aux.k, len(aux.candidates)), dim=1, sorted=False)
        code = torch.zeros_like(Z).scatter(1, chosen, best.relu())
        rebuilt = code @ sae.W_dec[aux.candidates]
        loss = loss + aux.coefficient * (aux.weight * (rebuilt - residual.detach()).square().sum())
    return loss


@pytest.mark.parametrize("with_aux", [False, True])
@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_the_step_has_the_bits_that_it_always_had(name: str, with_aux: bool) -> None:
    x = seeded(50, 8)
    alive = torch.tensor([False, False, True, False, True, False])
    term = AuxTerm(torch.tensor([3, 60, 7, 11, 12, 40]), alive, torch.tensor(0.7), 2, 0.3)
    aux = term if with_aux else None
    was, now = make_sae(name), make_sae(name)
    want = todays_formula(was, x, aux)
    step = now.training_step(x, x, TrainingState(aux=aux))
    (want / x.numel()).backward()
    (step.loss / x.numel()).backward()
    assert torch.equal(step.loss, want)
    for mine, before in zip(now.parameters(), was.parameters(), strict=True):
        assert mine.grad is not None
        assert before.grad is not None
        assert torch.equal(mine.grad, before.grad)
    assert list(step.losses) == ["squared_error", "aux"][: 1 + with_aux]
    if with_aux:
        torch.testing.assert_close(step.losses["aux"], 0.3 * step.logged["aux"])


def test_the_threshold_follows_the_smallest_value_that_was_selected() -> None:
    sae = SAE(SAEConfig(d_in=8, d_sae=64, k=5, architecture="batch_topk"), torch.Generator().manual_seed(0))
    assert isinstance(sae, BatchTopKSAE)
    first = sae.training_step(seeded(50, 8), seeded(50, 8), TrainingState())
    sae.after_step(first, TrainingState())
    assert first.code.min_selected is not None
    assert torch.equal(sae.threshold, first.code.min_selected)
    second = sae.training_step(seeded(50, 8, seed=2), seeded(50, 8, seed=2), TrainingState())
    sae.after_step(second, TrainingState())
    assert second.code.min_selected is not None
    torch.testing.assert_close(sae.threshold, 0.99 * first.code.min_selected + 0.01 * second.code.min_selected)


def test_progress_goes_from_nothing_to_all() -> None:
    assert [TrainingState(step=step, n_steps=5).progress for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert TrainingState().progress == 0


# An architecture from outside


def test_a_loss_from_outside_has_its_gradients() -> None:
    cfg = SAEConfig(d_in=8, d_sae=32, architecture="sparse_relu", options={"l1": 0.5})
    sae = SAE(cfg, torch.Generator().manual_seed(0))
    assert isinstance(sae, SparseReLU)
    x = seeded(20, 8)
    step = sae.training_step(x, x, TrainingState(step=1, n_steps=3))
    step.loss.backward()
    got = [p.grad for p in sae.parameters()]
    for p in sae.parameters():
        p.grad = None
    f = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    want = {"squared_error": (x - f @ sae.W_dec - sae.b_dec).square().sum(), "l1": 0.25 * f.sum()}
    torch.testing.assert_close(step.losses, want)
    assert int(step.logged["active"]) == int((f > 0).sum())
    sum(want.values(), torch.zeros(())).backward()
    for mine, p in zip(got, sae.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-4)


def test_options_are_those_that_the_architecture_has() -> None:
    assert SAE(SAEConfig(d_in=8, d_sae=32, architecture="sparse_relu")).options == {"l1": 0.1}
    with pytest.raises(SteersmanError, match="architecture 'sparse_relu' has no option 'l2'; it has l1"):
        SAEConfig(d_in=8, d_sae=32, architecture="sparse_relu", options={"l2": 1.0})
    with pytest.raises(SteersmanError, match="'topk' has no option 'l1'"):
        SAEConfig(d_in=8, d_sae=32, k=2, options={"l1": 1.0})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("relu", {"penalty": "l2"}, "penalty = 'l2' must be one of l1, tanh, p_annealed"),
        ("gated", {"p_end": 1.5}, "p_end = 1.5 must be a number between 0 and 1"),
        ("jumprelu", {"bandwidth": 0.0}, "bandwidth must be a number above 0, got 0.0"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        SAEConfig(d_in=8, d_sae=32, architecture=name, options=options)


def test_an_unknown_name_lists_those_that_are_known() -> None:
    with pytest.raises(SteersmanError, match="unknown architecture 'batchtopk'; have .*nearest is 'batch_topk'"):
        SAEConfig(d_in=8, d_sae=32, k=2, architecture="batchtopk")


def test_a_name_belongs_to_one_class() -> None:
    with pytest.raises(SteersmanError, match="architecture 'topk' is already that of .*TopKSAE; choose another"):
        type("Mine", (TopKSAE,), {"name": "topk"})
    before = dict(SAE.architectures)
    unnamed = type("Unnamed", (TopKSAE,), {})
    assert dict(SAE.architectures) == before
    assert type(unnamed(SAEConfig(d_in=4, d_sae=8, k=2))) is unnamed


@pytest.mark.parametrize("name", ["groupmax"])
def test_what_cannot_be_trained_says_what_can(name: str) -> None:
    sae = make_sae(name)
    assert not sae.trainable
    with pytest.raises(SteersmanError, match=f"training of '{name}' SAEs is not supported; use one of .*topk"):
        sae.training_step(seeded(2, 8), seeded(2, 8), TrainingState())


# Gradients against a dense definition


@dataclass(frozen=True)
class Settings:
    """What of a run's settings a training step reads."""

    target_l0: float | None = None
    grad_accumulation: int = 1


def dense_jumprelu(sae: SAE, x: Tensor, config: Settings) -> Tensor:
    """The loss with the pseudo-derivatives of arXiv 2407.14435, eqs. 11 and 12, over all pre-activations."""
    theta, width, wanted = sae.threshold, sae.options["bandwidth"], config.target_l0
    assert isinstance(theta, Tensor)
    assert wanted is not None
    Z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    above = (theta < Z).float()
    near = (((Z - theta).abs() < width / 2) & (Z > 0)).float().detach() / width
    moved = theta - theta.detach()
    code = Z * above - theta.detach() * near * moved
    l0 = (above - near * moved).sum() / len(x)
    error = (x - code @ sae.W_dec - sae.b_dec).square().sum()
    return error + sae.options["l0_coefficient"] * x.numel() * (l0 / wanted - 1).square()


def penalty(code: Tensor, sae: SAE, p: float) -> Tensor:
    """At the middle of the run, where the power is p."""
    unit, options = 8**0.5, sae.options
    form = {
        "l1": lambda f: f,
        "tanh": lambda f: options["tanh_scale"] * unit * (f / options["tanh_scale"] / unit).tanh(),
        "p_annealed": lambda f: unit * ((f / unit + 1e-3) ** p - 1e-3**p),
    }[options["penalty"]]
    return options["coefficient"] * unit * form(code).sum()


def dense_relu(sae: SAE, x: Tensor, config: Settings) -> Tensor:
    code = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    return (x - code @ sae.W_dec - sae.b_dec).square().sum() + penalty(code, sae, 0.6)


def dense_gated(sae: SAE, x: Tensor, config: Settings) -> Tensor:
    """arXiv 2404.16014, eqs. 6 to 10."""
    assert isinstance(sae, GatedSAE)
    products = (x - sae.b_dec) @ sae.W_enc
    gates = (products + sae.b_gate).relu()
    code = (gates > 0).float() * (sae.r_mag.exp() * products + sae.b_mag).relu()
    error = (x - code @ sae.W_dec - sae.b_dec).square().sum()
    frozen = (x - gates @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum()
    return error + penalty(gates, sae, 0.6) + frozen


DENSE = {
    "jumprelu": (dense_jumprelu, Settings(target_l0=3.0), {"bandwidth": 0.6, "l0_coefficient": 0.7}),
    "relu": (dense_relu, Settings(), {}),
    "relu tanh": (dense_relu, Settings(), {"penalty": "tanh", "coefficient": 0.3}),
    "relu p_annealed": (dense_relu, Settings(), {"penalty": "p_annealed"}),
    "gated": (dense_gated, Settings(), {}),
}


@pytest.mark.parametrize("name", DENSE)
def test_gradients_are_those_of_the_dense_definition(name: str) -> None:
    loss, config, options = DENSE[name]
    sae, x = make_sae(name.split()[0], options=options), seeded(50, 8)
    with torch.no_grad():
        sae.prepare_training(config)
        sae.begin_training(x, config)
        sae.scale_code(torch.tensor(0.9))
    wanted = loss(sae, x, config)
    wanted.backward()
    gradients = {of: parameter.grad for of, parameter in sae.named_parameters()}
    sae.zero_grad()
    step = sae.training_step(x, x, TrainingState(config=config, step=5, n_steps=11))
    step.loss.backward()
    torch.testing.assert_close(step.loss, wanted, rtol=1e-5, atol=1e-5)
    for of, parameter in sae.named_parameters():
        assert bool((gradients[of] != 0).any()), of
        torch.testing.assert_close(parameter.grad, gradients[of], rtol=1e-4, atol=1e-4)


# The old name


def test_the_old_name_of_the_architecture_still_works() -> None:
    with pytest.warns(DeprecationWarning, match=r"SAEConfig\(activation=...\) is architecture now"):
        cfg = SAEConfig(d_in=8, d_sae=32, activation="relu")  # pyright: ignore[reportCallIssue]
    assert cfg.architecture == "relu"
    with pytest.warns(DeprecationWarning, match="SAEConfig.activation is architecture now"):
        assert cfg.activation == "relu"  # pyright: ignore[reportAttributeAccessIssue]
    assert SAEConfig.from_record(cfg.record()) == cfg
    assert cfg.record()["activation"] == "relu"


# AbsTopK (arXiv 2510.00404)


def dense_abs_topk(x: Tensor, sae: SAE) -> Tensor:
    """The definition: the K pre-activations of largest magnitude, with their signs; the others 0."""
    Z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = torch.zeros_like(Z).scatter(1, Z.abs().topk(sae.cfg.k, dim=1).indices, 1.0)
    return Z * kept


@pytest.mark.parametrize(("n", "d_sae", "k"), [(1, 64, 5), (33, 64, 1), (20, 7, 7), (50, 300, 12)])
def test_abs_topk_is_its_definition(n: int, d_sae: int, k: int) -> None:
    sae, x = make_sae("abs_topk", d_sae=d_sae, k=k), seeded(n, 8)
    want = dense_abs_topk(x, sae).detach()
    assert bool((want < 0).any())
    torch.testing.assert_close(sae.encode(x), want, rtol=1e-5, atol=1e-5)
    code = sae.encode_sparse(x)
    assert code.active.sum() == n * k
    assert bool((code.values[:, :-1].abs() >= code.values[:, 1:].abs()).all())
    torch.testing.assert_close(sae(x), (want @ sae.W_dec + sae.b_dec).detach(), rtol=1e-4, atol=1e-4)
    ids = torch.tensor([d_sae - 1, 0, 3, 3])
    assert torch.equal(sae.encode_features(x, ids), sae.encode(x)[:, ids])


def test_abs_topk_selects_for_single_features_as_for_all() -> None:
    sae, x = make_sae("abs_topk", d_sae=400), seeded(2000, 8)
    ids = torch.tensor([7, 399, 0, 12, 90, 200])
    torch.testing.assert_close(sae.encode_features(x, ids), sae.encode(x)[:, ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_aux", [False, True])
def test_abs_topk_has_the_gradients_of_its_definition(with_aux: bool) -> None:
    x, target, upstream = seeded(40, 8), seeded(40, 8, seed=2), 0.7
    dead, alive = torch.tensor([3, 60, 11, 40]), torch.tensor([7, 12])
    candidates = torch.cat([dead, alive])
    aux = AuxTerm(candidates, torch.arange(6) >= 4, torch.tensor(0.5), 2, 0.3) if with_aux else None
    mine, plain = make_sae("abs_topk"), make_sae("abs_topk")
    step = mine.training_step(x, target, TrainingState(aux=aux))
    (upstream * step.loss).backward()
    residual = target - dense_abs_topk(x, plain) @ plain.W_dec - plain.b_dec
    loss = residual.square().sum()
    torch.testing.assert_close(step.losses["squared_error"], loss, rtol=1e-5, atol=1e-4)
    if with_aux:
        Z = ((x - plain.b_dec.detach()) @ plain.W_enc + plain.b_enc)[:, dead]
        code = Z * torch.zeros_like(Z).scatter(1, Z.abs().topk(2, dim=1).indices, 1.0)
        rebuilt = (code @ plain.W_dec[dead] - residual.detach()).square().sum()
        torch.testing.assert_close(step.losses["aux"], 0.15 * rebuilt, rtol=1e-5, atol=1e-4)
        loss = loss + 0.15 * rebuilt
    (upstream * loss).backward()
    for (name, got), want in zip(mine.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["topk", "abs_topk"])
def test_the_gradients_of_auxk_without_autograd(name: str) -> None:
    sae, x = make_sae(name), seeded(40, 8)
    residual, candidates = seeded(40, 8, seed=2), torch.tensor([3, 60, 11, 40, 7, 12])
    alive, scale = torch.arange(6) >= 4, torch.tensor(0.3)
    loss = auxk_loss(sae, x, residual, candidates, alive, 2)
    (scale * loss).backward()
    rows = sae.W_enc.detach().T, sae.W_dec.detach()
    got, parts = auxk_gradients(
        sae, *rows, x - sae.b_dec.detach(), residual, AuxTerm(candidates, alive, torch.tensor(1.0), 2, 1.0), scale
    )
    torch.testing.assert_close(got, loss.detach())
    assert parts.latents.tolist() == [3, 60, 11, 40, 64, 64]
    grads = sae.W_enc.grad, sae.b_enc.grad, sae.W_dec.grad
    for mine, whole in zip(parts[1:], grads, strict=True):
        assert whole is not None
        by_latent = whole.T if whole.shape == (8, 64) else whole
        torch.testing.assert_close(mine[:4], by_latent[candidates[:4]], rtol=1e-4, atol=1e-5)
        assert not bool(mine[4:].any())


def test_statistics_of_a_signed_code() -> None:
    sae, x = make_sae("abs_topk", k=3), seeded(200, 8)
    f = sae.encode(x)
    fired = (f != 0).double()
    measured = measure_reconstruction(sae, [x[:120], x[120:]])
    assert measured.l0 == pytest.approx(3)
    summary = summarize_features(sae, [Rows(x, torch.arange(200))], median_norm=2.0, n_examples=4)
    stats = summary.stats
    torch.testing.assert_close(stats.max_act, f.abs().amax(0))
    torch.testing.assert_close(stats.density, fired.mean(0).float())
    torch.testing.assert_close(stats.mean_act, (f.sum(0) / fired.sum(0).clamp_min(1)).float())
    best = f.abs().topk(4, dim=0).indices.T
    torch.testing.assert_close(summary.example_values.abs(), f.abs().T.gather(1, best))
    there = summary.example_rows >= 0
    latent = torch.arange(64)[:, None].expand_as(there)[there]
    assert torch.equal(summary.example_values[there], f[summary.example_rows[there], latent])
    assert bool((summary.example_values < 0).any())
    assert bool((summary.p999 <= stats.max_act).all())


def test_entries_that_are_no_numbers_are_not_active() -> None:
    values = torch.tensor([[2.0, -1.0, 0.0, float("nan")]])
    assert SparseCode(values, torch.zeros(1, 4, dtype=torch.int64)).active.tolist() == [[True, True, False, False]]


# Files


class Scaled(TopKSAE):
    """An architecture with a parameter, a buffer of its own shape and one number as a buffer."""

    name = "scaled"
    shift: Tensor
    counted: Tensor

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        self.gain = torch.nn.Parameter(torch.ones(cfg.d_sae))
        self.register_buffer("shift", torch.zeros(cfg.d_in))
        self.register_buffer("counted", torch.tensor(0))

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = super()._select(x - self.shift)
        return values * self.gain[indices.long()], indices


def test_an_architecture_from_outside_is_saved_with_all_it_has(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(d_in=8, d_sae=32, k=3, architecture="scaled"), torch.Generator().manual_seed(0))
    assert isinstance(sae, Scaled)
    with torch.no_grad():
        sae.gain.copy_(seeded(32).abs())
        sae.shift.copy_(seeded(8, seed=2))
        sae.counted.fill_(7)
    sae.save(tmp_path / "sae")
    back = SAE.load(tmp_path / "sae", dtype=torch.bfloat16)
    assert isinstance(back, Scaled)
    assert back.gain.dtype == torch.bfloat16
    back = SAE.load(tmp_path / "sae")
    assert back.cfg == sae.cfg
    for name, value in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    x = seeded(10, 8, seed=3)
    assert torch.equal(back(x), sae(x))
    for target in ("saelens", "sparsify", "dictionary_learning"):
        with pytest.raises(SteersmanError, match="scaled"):
            convert(sae, tmp_path / target, to=target)


def test_options_are_saved(tmp_path: Path) -> None:
    cfg = SAEConfig(d_in=8, d_sae=32, architecture="sparse_relu", options={"l1": 0.5}, metadata={"a": 1})
    SAE(cfg).save(tmp_path)
    assert SAE.load(tmp_path).cfg == cfg
    assert "options" not in make_sae().cfg.record()


def test_files_of_an_architecture_that_nobody_defined_name_those_there_are(tmp_path: Path) -> None:
    make_sae().save(tmp_path)
    fields = json.loads((tmp_path / "cfg.json").read_text())
    own = fields["metadata"]["steersman"]
    del own["crc32"]
    own["config"]["activation"] = "top_q"
    (tmp_path / "cfg.json").write_text(json.dumps(fields))
    with pytest.raises(SteersmanError, match=r"cfg.json: unknown architecture 'top_q'; have .*topk.* import"):
        SAE.load(tmp_path)
