"""Training on several ranks computes what one process computes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.sharded_jobs import select, train_on_every_mesh, trained
from support.training import mixture
from torch import Tensor

from steersman.kernels import reference
from steersman.parallel import Mesh
from steersman.sae import SAE, SAEConfig
from steersman.train import TrainConfig
from steersman.train.mesh.latents import initial_rows

CONFIG = TrainConfig(d_sae=64, k=4, batch_size=128, tokens=128 * 400, seed=3, device="cpu")
CONFIGS = {
    "topk": CONFIG,
    # Dead after two steps: AuxK with fewer dead latents than it may use, and with more.
    # (With k = 1 the first gradient of an encoder row would be zero but for round-off, which Adam would blow up.)
    "few dead": replace(CONFIG, dead_after=256, k_aux=100, k=2, d_sae=128),
    "many dead": replace(CONFIG, dead_after=256, k_aux=2, k=2, d_sae=768),
    "batch_topk": replace(CONFIG, architecture="batch_topk", dead_after=256, k=2),
    "jumprelu": replace(CONFIG, architecture="jumprelu", k=0, target_l0=2.5, dead_after=256),
    "soft decoder": replace(CONFIG, frozen="soft_decoder", lr=0.08, warmup=0.0),
    "crosscoder": replace(CONFIG, architecture="crosscoder", k=2, options={"selection": "sum"}),
    # Groups of 1, 2, 4, 8 and 17 in 32: they end within ranks, and some ranks have none of one.
    "matryoshka": replace(CONFIG, architecture="matryoshka", dead_after=256, d_sae=32, k=2),
    "matryoshka_topk": replace(CONFIG, architecture="matryoshka_topk", dead_after=256, k_aux=2, k=2),
    "relu": replace(CONFIG, architecture="relu", k=0, target_l0=2.5, grad_accumulation=2),
    "gated": replace(CONFIG, architecture="gated", k=0, dead_after=256),
    "ema, clipping, parts": replace(CONFIG, ema=0.9, grad_clip=0.05, grad_accumulation=2),
    "whitened": replace(CONFIG, whiten="zca"),
}
STEPS = 8


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    """`CONFIGS`, and one that starts from an SAE that is there."""
    there = tmp_path_factory.mktemp("initial") / "sae"
    SAE(SAEConfig(d_in=16, d_sae=64, k=4), torch.Generator().manual_seed(8)).save(there)
    return CONFIGS | {"initial": replace(CONFIG, init=str(there))}


@pytest.fixture(scope="module")
def alone(configs: dict[str, TrainConfig]) -> dict[str, Any]:
    return {name: trained(config, mixture(1280), STEPS) for name, config in configs.items()}


@pytest.mark.parametrize(("n", "latent"), [(2, 2), (2, 1), (4, 4), (4, 2)])
def test_every_mesh_gives_what_one_process_gives(
    n: int, latent: int, alone: dict[str, Any], configs: dict[str, TrainConfig]
) -> None:
    parts = run_ranks(n, train_on_every_mesh, configs, mixture(1280), STEPS, latent)
    for name, one in alone.items():
        for mine in parts:  # every rank reads the same metrics
            for a, b in zip(mine[name]["metrics"], one["metrics"]):
                assert a == pytest.approx(b, rel=2e-5, abs=1e-7), name
        for key, expected in one["state"].items():
            found = joined(key, [part[name]["state"][key] for part in parts], n // latent, latent, expected.shape)
            if key == "silent_steps":
                assert torch.equal(found, expected), (name, key)
            else:
                assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4), (name, key)
    assert any(m["aux"] > 0 for m in alone["few dead"]["metrics"])
    assert max(m["dead_share"] for m in alone["many dead"]["metrics"]) * 768 > 64, "more than the candidates"
    assert float(alone["batch_topk"]["state"]["threshold"]) > 0
    first, _ = initial_rows(SAEConfig(d_in=16, d_sae=64, k=4), CONFIG.seed, 0, 64)
    kept = torch.cosine_similarity(alone["soft decoder"]["state"]["W_dec"], first)
    assert float(kept.min()) == pytest.approx(0.8, abs=1e-5), "the edge was reached"


def joined(key: str, parts: list[Tensor], data: int, latent: int, shape: torch.Size) -> Tensor:
    """The whole of a tensor from the parts of all ranks; what several ranks hold must be the same bits on each."""
    name, _, kind = key.partition(".")
    if parts[0].shape == shape:
        assert all(torch.equal(part, parts[0]) for part in parts), key
        return parts[0]
    grid = [parts[d * latent : (d + 1) * latent] for d in range(data)]
    dim = 1 if name == "W_enc" else 0
    if kind:  # optimiser state and averages are held once
        return torch.cat([grid[d][i] for i in range(latent) for d in range(data)], dim=dim)
    for replica in grid[1:]:
        assert all(torch.equal(a, b) for a, b in zip(replica, grid[0])), key
    return torch.cat(grid[0], dim=dim)


def adversarial() -> list[tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(1)
    normal = torch.randn(8, 24, generator=g)
    return [
        (normal, 3),
        (normal.round(), 5),  # many ties
        (torch.ones(8, 24), 4),
        (-normal.abs(), 3),  # nothing positive
        (torch.where(torch.arange(24) < 6, normal.abs() + 9, normal), 7),  # all of it on one rank, more than it has
        (torch.zeros(8, 24), 24),
        (torch.randint(0, 3, (8, 24), generator=g).float(), 2),
    ]


@pytest.mark.parametrize(("n", "latent"), [(2, 2), (4, 4), (4, 2)])
def test_selection_over_shards_is_that_of_one_process(n: int, latent: int) -> None:
    cases = adversarial()
    found = run_ranks(n, select, [(Z, k, latent) for Z, k in cases])
    data = n // latent
    for number, (Z, k) in enumerate(cases):
        eye, zero = torch.eye(24), torch.zeros(24)
        values, indices = reference.topk_encode(Z, eye, zero, k)
        expected = torch.zeros_like(Z).scatter_(1, indices.long(), values)
        values, indices, smallest = reference.batch_topk_encode(Z, eye, zero, k)
        dense = torch.zeros_like(Z).scatter_(1, indices.long(), values)
        for which, wanted in ((0, expected), (1, dense)):
            code = torch.zeros_like(Z)
            for rank, answer in enumerate(found):
                rows = code.chunk(data)[rank // latent]
                rows.scatter_add_(1, answer[number][which][1].long(), answer[number][which][0])
            assert torch.equal(code, wanted), (number, which)
        assert all(float(answer[number][2]) == float(smallest) for answer in found)


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize(("d_in", "d_sae"), [(16, 64), (5, 7), (3, 9001)])
def test_ranks_start_from_the_rows_of_one_process(d_in: int, d_sae: int, transcoder: bool) -> None:
    more: dict[str, Any] = {"transcoder": True, "d_out": d_in + 3, "apply_b_dec_to_input": False}
    cfg = SAEConfig(d_in=d_in, d_sae=d_sae, k=1, **(more if transcoder else {}))
    whole = SAE(cfg, torch.Generator().manual_seed(4))
    parts = [initial_rows(cfg, 4, a, b) for a, b in ((0, d_sae // 3), (d_sae // 3, d_sae))]
    assert torch.equal(torch.cat([encoder for encoder, _ in parts]).T, whole.W_enc)
    assert torch.equal(torch.cat([decoder for _, decoder in parts]), whole.W_dec)


def test_a_mesh_knows_its_places() -> None:
    meshes = [Mesh.over(8, rank=rank, d_sae=80, batch_size=16, latent=4) for rank in range(8)]
    assert sorted(mesh.owned_latents(80) for mesh in meshes) == [(a, a + 10) for a in range(0, 80, 10)]
    for mesh in meshes:
        held, owned = mesh.local_latents(80), mesh.owned_latents(80)
        assert held[0] <= owned[0] < owned[1] <= held[1]
    assert {(mesh.data_index, mesh.latent_index) for mesh in meshes} == {(d, i) for d in range(2) for i in range(4)}
    assert Mesh.over(4, d_sae=8, batch_size=8).latent == 4  # sharding latents is the default way to grow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 3}, "latent_shards = 3 does not divide the 4 ranks.*use one of 1, 2, 4"),
        ({"latent": 0}, "latent_shards = 0"),
        ({"d_sae": 1001}, "d_sae = 1001 cannot be split over 4 ranks; use 1000 or 1004"),
        ({"d_sae": 3}, "d_sae = 3 cannot be split over 4 ranks; use 4"),
        ({"batch_size": 510}, "batch_size = 510 .* use 508 or 512"),
    ],
)
def test_a_mesh_that_does_not_fit_names_the_fix(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh.over(4, **{"d_sae": 1000, "batch_size": 512, **options})
