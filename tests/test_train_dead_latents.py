"""Which latents AuxK looks at: every dead one, whether the host knows their number at once or a step late."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from support.sharded_jobs import train_on_every_mesh_late, trained
from support.stopping import stopped_before
from support.training import assert_equal_weights, mixture, trainer_of

from steersman.parallel import Mesh, Ranks
from steersman.train import ActivationStore, TrainConfig, train_sae
from steersman.train.run import dead_latents
from steersman.train.run.dead_latents import DeadLatents
from steersman.train.run.recipe import Recipe

CONFIG = TrainConfig(
    d_sae=768, k=2, batch_size=128, tokens=128 * 40, seed=3, device="cpu", dead_after=256, k_aux=5, checkpoint_every=15
)


def recipe(dead_after: int, k_aux: int) -> Recipe:
    return Recipe(
        batch_size=8, n_steps=100, lr=0.1, warmup_steps=0, decay_steps=0, k_aux=k_aux, dead_after_steps=dead_after
    )


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("dead_after", [1, 2, 5])
def test_every_dead_latent_is_a_candidate(late: int, dead_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step of a random history, the latents that take part are the dead ones, or the longest silent of them;
    the sizes are those that the counts ask for."""
    monkeypatch.setattr(dead_latents, "steps_late", lambda device: late)
    monkeypatch.setattr(dead_latents, "SIZES", (4, 30))
    L, k_aux, g = 200, 17, torch.Generator().manual_seed(0)
    latents = DeadLatents(L, recipe(dead_after, k_aux), 0.25, Ranks(Mesh()), torch.device("cpu"))
    rarity, soon, sizes = torch.rand(L, generator=g) ** 3, [], set()
    for step in range(96):
        shape = latents.prepare()
        term, dead = latents.aux_term(), latents.silent_steps >= dead_after
        soon.append(int((latents.silent_steps >= dead_after - late).sum()))
        bound = soon[-1 - late] if step >= late else 0
        sizes.add(shape and shape.candidates)
        if term is None:
            assert bound == 0
            assert not dead.any()
        else:
            assert len(term.candidates) == next(size for size in (4, 17, 30, 68) if bound <= size or size == 68)
            used = term.candidates[~term.alive]
            longest = torch.sort(latents.silent_steps, descending=True, stable=True).indices[: min(int(dead.sum()), 68)]
            assert set(used.tolist()) == set(longest.tolist())
            assert float(term.weight) == pytest.approx(min(1.0, int(dead.sum()) / k_aux))
            assert term.k == (17 if bound > 17 else len(term.candidates))
        more = (0.0, 1.5, 0.6, 0.8, 0.9, 0.95, 0.99)[step // 8 % 7]  # now and then, all fire, or nearly all
        latents.step_done((torch.rand(L, generator=g) < rarity + more).float())
    every = late and dead_after == 1  # any latent may be dead in the next step
    assert sizes >= ({None, 68} if every else {None, 4, 68})


@pytest.mark.parametrize("late", [0, 1])
def test_without_auxk_nothing_is_counted(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_latents, "steps_late", lambda device: late)
    latents = DeadLatents(4, recipe(1, 2), 0.0, Ranks(Mesh()), torch.device("cpu"))
    monkeypatch.setattr(latents, "_counts", None)
    latents.prepare()
    assert latents.aux_term() is None
    latents.step_done(torch.zeros(4))
    assert latents.fraction() == 1.0


@pytest.mark.parametrize("fused", [False, True])
def test_training_is_the_same_a_step_late(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = replace(CONFIG, fused_update=fused), []
    for late in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(dead_latents, "steps_late", lambda device, late=late: late)
            trainer = trainer_of(config)
            for x in mixture(128 * 12, seed=1).split(128):
                trainer.step(x)
            found.append(trainer)
    a, b = found
    assert float(a.sums[1]) > 0, "the AuxK loss was never on"
    torch.testing.assert_close(a.sums, b.sums, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.sae.W_dec, b.sae.W_dec, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("latent", [2, 1])
def test_several_ranks_a_step_late(latent: int) -> None:
    """More dead latents than may be candidates, so that the ranks compare theirs."""
    want = trained(CONFIG, mixture(1280), 8)
    parts = run_ranks(2, train_on_every_mesh_late, {"late": CONFIG}, mixture(1280), 8, latent)
    assert max(line["dead_share"] for line in want["metrics"]) * 768 > 64
    for part in parts:
        for mine, one in zip(part["late"]["metrics"], want["metrics"]):
            assert mine == pytest.approx(one, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_that_counts_a_step_late_resumes_with_the_same_sizes_and_bits(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_latents, "steps_late", lambda device: 1)
    monkeypatch.setattr(dead_latents, "SIZES", tuple(range(1, 64)))
    prepare, shapes = DeadLatents.prepare, []
    monkeypatch.setattr(DeadLatents, "prepare", lambda self: shapes.append(prepare(self)) or shapes[-1])
    store = ActivationStore.from_tensors(mixture(20_000).split(5000), tmp_path / "acts", "h", dtype="float32")
    config = replace(CONFIG, d_sae=64, fused_update=fused)
    whole = train_sae(store, config, tmp_path / "whole")
    with stopped_before(22):
        train_sae(store, config, tmp_path / "cut")
    assert_equal_weights(whole, train_sae(store, config, tmp_path / "cut"))
    assert shapes[40:] == shapes[:22] + shapes[15:40]
    assert len(set(shapes)) > 5


def test_late_counts_are_part_of_the_state() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dead_latents, "steps_late", lambda device: 1)
        make = lambda: DeadLatents(6, recipe(2, 2), 0.25, Ranks(Mesh()), torch.device("cpu"))  # noqa: E731
        whole, cut = make(), make()
        for fired in ([1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]):
            whole.prepare()
            whole.step_done(torch.tensor(fired))
        state = whole.state()
        assert state["late_counts"].tolist() == [3]
        cut.restore(**state)
        assert [cut.prepare(), cut.prepare()] == [whole.prepare(), whole.prepare()]
        anew = make()
        anew.restore(state["silent_steps"])  # of a version that had no counts, or of another number of ranks
        assert anew.state()["late_counts"].tolist() == [1]
        anew.restore(state["silent_steps"], torch.tensor([1, 2]))
        assert anew.state()["late_counts"].tolist() == [1]
