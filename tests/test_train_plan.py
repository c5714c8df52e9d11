"""The tables of `steersman plan` are those of the code."""

from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.sharded_jobs import bytes_sent
from support.training import TRAINABLE, mixture, trainer_of

from steersman.errors import SteersmanError
from steersman.train.reports.plan import PlanConfig, plan_run

SHAPE: dict[str, Any] = {"d_in": 96, "d_sae": 512, "k": 8, "batch_size": 512, "store_dtype": "float32"}
LARGE = {**SHAPE, "d_in": 1024, "d_sae": 1 << 16}  # the update is what needs most


@pytest.mark.parametrize(
    ("ranks", "latent", "more"),
    [
        (2, 2, {}),
        (2, 1, {}),
        (4, 2, {}),
        (2, 2, {"architecture": "batch_topk"}),
        (2, 2, {"architecture": "matryoshka", "dead": 20, "k_aux": 48}),
        (2, 2, {"dead": 20, "k_aux": 48}),  # all of them dead from the first step on
        (2, 2, {"dead": 512, "k_aux": 16}),
        (2, 2, {"fused": True, "d_sae": 4096, "dead": 512, "k_aux": 16}),
    ],
)
def test_bytes_sent_are_those_of_the_table(ranks: int, latent: int, more: dict[str, Any]) -> None:
    config = PlanConfig(**{**SHAPE, **more}, ranks=ranks, latent_shards=latent)
    expected = plan_run(config).network_bytes
    for sent in run_ranks(ranks, bytes_sent, config):
        assert sent == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_weights_and_their_state_are_those_of_a_trainer(name: str) -> None:
    config = PlanConfig(d_in=16, d_sae=64, k=4, architecture=name)
    memory, trainer = plan_run(config).memory, trainer_of(config._training())
    assert memory["weights"] == sum(p.numel() * 4 for p in trainer.sae.parameters())
    rows = mixture(512)
    rows = torch.cat([rows, rows[:, :1] > 1], dim=1) if trainer.labelled else rows
    trainer.fit_encoder_scale(rows)
    trainer.step(rows)
    moments = [value for key, value in trainer.updater.state().items() if value.ndim and not key.endswith("n_steps")]
    assert memory["optimiser state"] == sum(value.numel() * 4 for value in moments)


def test_a_transcoders_weights_have_both_widths() -> None:
    skip = PlanConfig(**{**SHAPE, "d_out": 32, "skip_connection": True})
    assert plan_run(skip).memory["weights"] == 4 * (512 * (96 + 32 + 1) + 32 + 96 * 32)
    whitened = plan_run(PlanConfig(**{**SHAPE, "whiten": True}))
    assert whitened.memory["whitening"] == 4 * 96 * 96
    plain = plan_run(PlanConfig(**SHAPE))
    assert whitened.checkpoint - plain.checkpoint == 4 * 96 * 96
    assert {"whitening"} == whitened.seconds.keys() - plain.seconds.keys()


def test_what_does_not_grow_with_latents_is_what_latent_sharding_moves() -> None:
    def network(**more: Any) -> float:
        return plan_run(PlanConfig(**{**SHAPE, "ranks": 4, **more})).network_bytes

    assert network(d_sae=512) == network(d_sae=1 << 20)
    assert network(latent_shards=1, d_sae=1 << 20) > 100 * network(latent_shards=1, d_sae=1 << 10)


def test_memory_falls_with_the_ranks_that_share_it() -> None:
    one, four = (plan_run(PlanConfig(**{**LARGE, "ranks": n})).memory for n in (1, 4))
    for item in ("weights", "gradients", "optimiser state"):
        assert four[item] == pytest.approx(one[item] / 4, rel=1e-3)
    replicas = plan_run(PlanConfig(**{**LARGE, "ranks": 4, "latent_shards": 1})).memory
    assert replicas["weights"] == one["weights"]
    assert replicas["optimiser state"] == pytest.approx(one["optimiser state"] / 4, rel=1e-3)


def test_memory_is_that_of_the_moment_that_needs_most() -> None:
    few_rows, many_rows = (plan_run(PlanConfig(**{**LARGE, "batch_size": n})).memory for n in (512, 1 << 20))
    assert "update, exchange" in few_rows
    assert "update, exchange" not in many_rows
    assert many_rows["batch"] == (1 << 20) * 1024 * (2 * 4 + 4 * 4)


def test_graphs_keep_the_memory_of_a_step_beside_that_of_a_step() -> None:
    def memory(**more: Any) -> dict[str, float]:
        return plan_run(PlanConfig(**{**LARGE, **more})).memory

    plain, fused, graphs = memory(), memory(fused=True), memory(fused=True, cuda_graph=True)
    assert "gradients" in plain
    assert "gradients" not in fused
    assert fused["weights in bf16"] == 2 * 1024 * (1 << 16) * 2
    held = sum(fused[item] for item in ("weights", "weights in bf16", "optimiser state", "counters", "libraries"))
    assert graphs.keys() == fused.keys() | {"memory of the graphs"}
    in_flight = 512 * 1024 * 4  # the batch that is read ahead is that of no graph, which has one of its own
    assert graphs["memory of the graphs"] == sum(fused.values()) - held - 2 * in_flight + in_flight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3}, "d_sae = 512 cannot be split over 3 ranks; use 510 or 513"),
        ({"k": 513}, "k = 513 must be at most d_sae = 512"),
        ({"cuda_graph": True}, "cuda_graph=True needs fused=True and ranks=1"),
        (
            {"matryoshka_widths": (64, 256), "architecture": "matryoshka"},
            r"\[64, 256\] must rise and end at d_sae = 512",
        ),
        ({"flops": 0.0}, "flops = 0.0 must be above 0"),
        ({"skip_connection": True}, "skip_connection is a transcoder's: give d_out"),
        ({"d_out": 8, "whiten": True}, "whiten is for SAEs: a transcoder has two kinds of rows"),
        ({"d_out": 8, "fused": True}, "the fused update trains transcoders of equal widths, not 96 and 8"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        plan_run(PlanConfig(**{**SHAPE, **options}))


def test_the_command_prints_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    from steersman.cli import run

    run(["plan", "--d-in", "2304", "--d-sae", "65536", "--k", "64", "--batch-size", "4096", "--ranks", "8"])
    text = capsys.readouterr().out
    assert "1 data x 8 latent ranks" in text
    for item in ("optimiser state", "reconstruction", "network", "together"):
        assert item in text
