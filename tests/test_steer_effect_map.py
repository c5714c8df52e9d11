"""Effect maps: both ends of `solve` and between, the rotation's direction, files, and one line for each mistake."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_models import toy_sae
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae import SAE, SAEConfig
from steersman.steer.effects.folder import Effects
from steersman.steer.effects.map import EffectMap
from steersman.steer.vectors.vector import SteeringVector
from steersman.tensor_files import save_tensors

D, L, N = 12, 30, 400
HOOK = "blocks.1.hook_resid_post"


def toy_map(seed: int = 0, heldout: float = 0.1, dead: int | None = None) -> tuple[EffectMap, SAE, Tensor, Tensor]:
    """A map fitted to effects that are exactly linear, its SAE, and the true M and b in float64."""
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(D, L, generator=g, dtype=torch.float64)
    b = torch.randn(L, generator=g, dtype=torch.float64)
    if dead is not None:
        M[:, dead], b[dead] = 0, 0
    x = torch.nn.functional.normalize(torch.randn(N, D, generator=g, dtype=torch.float64), dim=1)
    sae = SAE(SAEConfig(d_in=D, d_sae=L, k=4, hook_name=HOOK, model_name="toy"), g)
    effects = Effects.from_tensors(x, x @ M + b, sae=sae)
    return effects.fit(ridge=0.0, heldout=heldout), sae, M, b


def test_a_linear_toy_is_recovered() -> None:
    m, _, M, b = toy_map()
    torch.testing.assert_close(m.M.double(), M, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(m.b.double(), b, atol=1e-6, rtol=1e-6)
    assert float(m.r2.min()) > 1 - 1e-6
    assert m.provenance["n_heldout"] == 40
    x = torch.randn(D)
    torch.testing.assert_close(m.predict(x).double(), (x / x.norm()).double() @ M + b, atol=1e-5, rtol=1e-5)


TARGETS: list[dict[int, float]] = [{7: 1.0}, {3: 2.0, 11: -1.0}]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("bias_weight", [1.0, 0.0, 0.5])
def test_the_end_that_is_sae_ts(targets: dict[int, float], bias_weight: float) -> None:
    m, _, M, b = toy_map()
    t = torch.zeros(L, dtype=torch.float64)
    for j, w in targets.items():
        t[j] = w
    s = M @ t / (M @ t).norm() - bias_weight * (M @ b) / (M @ b).norm()
    v = m.solve(targets, bias_weight=bias_weight)
    torch.testing.assert_close(v.vector.double(), s / s.norm(), atol=1e-6, rtol=1e-5)
    assert (v.hook_name, v.model_name, v.method) == (HOOK, "toy", "sae_ts")
    far = m.solve(targets, bias_weight=bias_weight, ridge=1e9 * m.ridge_unit)
    torch.testing.assert_close(far.vector, v.vector, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("targets", TARGETS)
def test_the_end_that_is_the_pseudo_inverse(targets: dict[int, float]) -> None:
    m, _, M, b = toy_map()
    t = torch.zeros(L, dtype=torch.float64)
    for j, w in targets.items():
        t[j] = w
    c = (M @ b).norm() / (M @ t).norm()
    x = torch.linalg.lstsq(M.T, (c * t - b)[:, None]).solution[:, 0]  # the x whose effect xM + b is nearest to c t
    v = m.solve(targets, ridge=0.0)
    torch.testing.assert_close(v.vector.double(), x / x.norm(), atol=1e-5, rtol=1e-4)
    near = m.solve(targets, ridge=1e-9 * m.ridge_unit)
    torch.testing.assert_close(near.vector, v.vector, atol=1e-5, rtol=1e-4)
    assert v.method == "pseudo_inverse"
    assert v.cosine(m.solve(targets)) < 0.999


def test_between_the_ends() -> None:
    m, _, M, b = toy_map()
    t = torch.zeros(L, dtype=torch.float64)
    t[7] = 1
    c = (M @ b).norm() / (M @ t).norm()
    x = torch.linalg.solve(M @ M.T + 5.0 * torch.eye(D, dtype=torch.float64), M @ (c * t - 0.3 * b))
    v = m.solve(7, ridge=5.0, bias_weight=0.3)
    torch.testing.assert_close(v.vector.double(), x / x.norm(), atol=1e-6, rtol=1e-5)


def test_targets_may_be_written_in_many_ways() -> None:
    m, _, _, _ = toy_map()
    t = torch.zeros(L)
    t[3] = t[5] = 1
    one = m.solve({3: 1.0, 5: 1.0}).vector
    for form in ([3, 5], (5, 3), t, {3: 2, 5: 2}):
        torch.testing.assert_close(m.solve(form).vector, one)
    torch.testing.assert_close(m.solve(4).vector, m.solve({4: 0.1}).vector)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({L: 1.0}, f"feature {L} is out of range"),
        ({-1: 1.0}, "out of range"),
        ({}, "no target"),
        ({3: 0.0}, "no target"),
        ({3: math.nan}, "must be finite"),
        ("3", "targets are"),
        (torch.ones(L + 1), "one for each feature"),
    ],
)
def test_targets_that_are_none(targets: Any, said: str) -> None:
    m, _, _, _ = toy_map()
    with pytest.raises(SteersmanError, match=said):
        m.solve(targets)


def test_a_target_without_signal_is_an_error_that_says_how_weak() -> None:
    m, _, _, _ = toy_map(dead=9)
    with pytest.raises(SteersmanError, match=r"no signal for feature 9 \(0 times noise\)"):
        m.solve(9)
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(N, D, generator=g), dim=1)
    y = x @ torch.randn(D, L, generator=g)
    y[:, 4] = torch.randn(N, generator=g)
    sae = SAE(SAEConfig(d_in=D, d_sae=L, k=4, hook_name=HOOK))
    noisy = Effects.from_tensors(x, y, sae=sae).fit()
    with pytest.raises(SteersmanError, match=r"feature 4 \([01]\.\d* times noise\); 2 is asked for"):
        noisy.solve({4: 1.0, 5: 1.0})
    assert noisy.solve({4: 1.0, 5: 1.0}, min_signal=0).norm() == pytest.approx(1)


@pytest.mark.parametrize("ridge", [-1.0, math.nan])
def test_ridges_that_are_none(ridge: float) -> None:
    m, _, _, _ = toy_map()
    with pytest.raises(SteersmanError, match="ridge must be"):
        m.solve(3, ridge=ridge)


def test_a_planted_rotation_is_applied_in_its_direction() -> None:
    g = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=D, d_sae=L, k=4, hook_name=HOOK), g)
    R = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
    M = (torch.rand(L, 1, generator=g) + 0.5) * (sae.W_dec.detach().double() @ R.T)  # column j of M is along R d_j
    x = torch.nn.functional.normalize(torch.randn(N, D, generator=g, dtype=torch.float64), dim=1)
    m = Effects.from_tensors(x, x @ M.T + 0.1, sae=sae).fit(ridge=0.0)
    torch.testing.assert_close(m.rotation(sae), R, atol=1e-5, rtol=0)
    assert float((m.rotation(sae) - R.T).abs().max()) > 0.3
    v = m.solve_rotated(6, sae)
    torch.testing.assert_close(v.vector.double(), R @ sae.W_dec[6].detach().double(), atol=1e-5, rtol=0)
    assert v.cosine(m.solve(6, bias_weight=0.0)) > 1 - 1e-6
    other = SAE(SAEConfig(d_in=D, d_sae=50, k=4, hook_name=HOOK), g)  # features that the map never measured
    w = m.solve_rotated({40: 2.0}, sae, of=other)
    torch.testing.assert_close(w.vector.double(), R @ other.W_dec[40].detach().double(), atol=1e-5, rtol=0)
    with pytest.raises(SteersmanError, match="out of range"):
        m.solve_rotated(40, sae)
    with pytest.raises(SteersmanError, match="too few for a rotation"):
        m.rotation(sae, min_signal=math.inf)


def test_the_rotation_leaves_noise_out() -> None:
    g = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=D, d_sae=60, k=4, hook_name=HOOK), g)
    R = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
    x = torch.nn.functional.normalize(torch.randn(N, D, generator=g, dtype=torch.float64), dim=1)
    y = x @ (R @ sae.W_dec.detach().double().T)
    y[:, 20:] = 0.1 * torch.randn(N, 40, generator=g, dtype=torch.float64)
    m = Effects.from_tensors(x, y, sae=sae).fit(ridge=0.0)
    good = float(m.signal[:20].min())
    torch.testing.assert_close(m.rotation(sae, good), R, atol=1e-5, rtol=0)
    assert float((m.rotation(sae, min_signal=0.0) - R).abs().max()) > 0.1


def test_another_sae_is_an_error() -> None:
    m, sae, _, _ = toy_map()
    m.check_sae(sae)
    with torch.no_grad():
        sae.b_enc[0] += 1
    with pytest.raises(SteersmanError, match="made with another SAE: hash"):
        m.rotation(sae)
    with pytest.raises(SteersmanError, match="d_sae 30 there, 40 here"):
        m.check_sae(toy_sae(HOOK))


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        (torch.randn(D + 1), "this vector has width 13, the effect map has width 12"),
        (torch.zeros(D), "zero or not finite"),
        (torch.full((D,), math.nan), "zero or not finite"),
        (SteeringVector.of(torch.randn(D), hook_name="blocks.2.hook_resid_post", model_name="toy"), "was made at"),
        (SteeringVector.of(torch.randn(D), hook_name=HOOK, model_name="gpt2"), "was made for 'gpt2'"),
    ],
)
def test_vectors_that_do_not_fit(vector: Any, said: str) -> None:
    m, _, _, _ = toy_map()
    with pytest.raises(SteersmanError, match=said):
        m.predict(vector)


def test_fits_that_cannot_be() -> None:
    g = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=D, d_sae=L, k=4, hook_name=HOOK), g)
    few = Effects.from_tensors(torch.randn(D, D), torch.randn(D, L), sae=sae)
    with pytest.raises(SteersmanError, match="too few for a map of width 12"):
        few.fit()
    with pytest.raises(SteersmanError, match="unknown method"):
        few.fit(method="sgd")
    with pytest.raises(SteersmanError, match="settings of method='adam'"):
        few.fit(epochs=3)
    with pytest.raises(SteersmanError, match="heldout"):
        few.fit(heldout=1.0)
    with pytest.raises(SteersmanError, match="do not fit"):
        Effects.from_tensors(torch.randn(5, D), torch.randn(5, L + 1), sae=sae)


def test_adam_is_the_same_map_in_the_end() -> None:
    _, sae, M, b = toy_map()
    x = torch.nn.functional.normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(5)), dim=1)
    effects = Effects.from_tensors(x, (x.double() @ M + b).float(), sae=sae)
    m = effects.fit(method="adam", lr=2e-2, epochs=120)
    torch.testing.assert_close(m.M.double(), M, atol=0.05, rtol=0)
    assert m.provenance["method"] == "adam"
    assert m.provenance["r2"] > 0.999


def test_a_saved_map_is_the_same(tmp_path: Path) -> None:
    m, _, _, _ = toy_map()
    m.save(tmp_path / "new" / "map.safetensors")
    for path in (tmp_path / "new" / "map.safetensors", tmp_path / "new"):
        again = EffectMap.load(path)
        for name in ("M", "b", "signal", "noise", "r2", "ceiling"):
            assert torch.equal(getattr(again, name), getattr(m, name))
        assert again.provenance == m.provenance
        assert (again.sae, again.hook_name, again.model_name) == (m.sae, m.hook_name, m.model_name)
        assert torch.equal(again.solve(3).vector, m.solve(3).vector)
    assert "held-out R2" in m.to_text()


def test_files_that_are_no_map(tmp_path: Path) -> None:
    m, _, _, _ = toy_map()
    path = tmp_path / "map.safetensors"
    m.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(SteersmanError, match="damaged"):
        EffectMap.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(SteersmanError, match="no effect map"):
        EffectMap.load(tmp_path / "other.safetensors")
    header = {"format": "steersman.effect_map", "version": "9"}
    save_file(tensors, tmp_path / "late.safetensors", metadata=header)
    with pytest.raises(SteersmanError, match="version 9"):
        EffectMap.load(tmp_path / "late.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors", metadata={**header, "version": "1"})
    with pytest.raises(SteersmanError, match="not readable as JSON"):
        EffectMap.load(tmp_path / "bare.safetensors")
    with pytest.raises(SteersmanError, match="no such file"):
        EffectMap.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"median_norm": "x"}, "median_norm"),
        ({"median_norm": 10**400}, "median_norm"),
        ({"model_name": 5}, "model_name"),
        ({"sae": {"hash": "a", "d_sae": 3}}, "sae"),
        ({"provenance": []}, "provenance"),
        ({"provenance": {"median_scale": "large"}}, "provenance.median_scale"),
        ({"provenance": {"r2": True}}, "provenance.r2"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "model_name, hook_name"),
    ],
)
def test_a_header_that_says_what_cannot_be(change: Any, said: str, tmp_path: Path) -> None:
    m, _, _, _ = toy_map()
    m.save(tmp_path / "map.safetensors")
    with safe_open(tmp_path / "map.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    text = change if isinstance(change, str) else json.dumps({**about, **change})
    header = {"format": "steersman.effect_map", "version": "1", "about": text}
    save_tensors(tmp_path / "map.safetensors", load_file(tmp_path / "map.safetensors"), header)
    with pytest.raises(SteersmanError, match=said) as error:
        EffectMap.load(tmp_path / "map.safetensors")
    assert "map.safetensors" in str(error.value)


def test_every_flipped_bit_of_a_map_is_noticed(tmp_path: Path) -> None:
    m, _, _, _ = toy_map()
    path = tmp_path / "map.safetensors"
    m.save(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(SteersmanError):
            EffectMap.load(path)
    m.save(path)
    assert path.read_bytes() == whole
