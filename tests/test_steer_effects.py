"""Collecting effects: the same bytes after an interruption and over ranks, and one line for each mistake."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.effect_toys import HOOK, TEXTS, measure_in_a_job, quick, toy
from support.ranks import answers, run_ranks, start_ranks
from support.stores import digests
from support.tiny_models import D, toy_sae

from steersman.errors import SteersmanError
from steersman.steer.effects import collect as module
from steersman.steer.effects.collect import collect_effects
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.folder import Effects
from steersman.steer.effects.vectors import make_vectors
from steersman.steer.vectors.vector import SteeringVector


def test_memory_and_folder_hold_the_same(tmp_path: Path) -> None:
    lm, sae = toy()
    kept = collect_effects(lm, sae, config=quick())
    written = collect_effects(lm, sae, config=quick(out=str(tmp_path / "e")))
    assert [len(shard.vectors) for shard in kept.iterate()] == [3, 3, 1]
    for a, b in zip(kept.iterate(), written.iterate(), strict=True):
        for name in a._fields:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), equal_nan=True, rtol=0, atol=0)
    assert written.column("scale").tolist() == [2.0] * 7
    assert "7 vectors at blocks.1.hook_resid_post" in written.to_text()
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "00000.safetensors", "00001.safetensors", "00002.safetensors", "baseline.safetensors", "manifest.json",
    ]  # fmt: skip


def test_effects_are_differences_to_the_unsteered() -> None:
    lm, sae = toy()
    effects = collect_effects(
        lm, sae, config=quick(rollouts=200, base_rollouts=2000, batch_rows=1000, n_vectors=2, scale_target=8.0)
    )
    nothing = collect_effects(
        lm, sae, config=quick(rollouts=200, base_rollouts=2000, batch_rows=1000, n_vectors=2, scale_target=1e-6)
    )
    (shard,), (still,) = effects.iterate(), nothing.iterate()
    spread = (still.standard_error.square() + nothing.baseline.standard_error.square()).sqrt().clamp_min(1e-4)
    assert float((still.effect / spread).abs().max()) < 5  # next to nothing added: nothing but noise
    assert float((shard.effect / spread).abs().max()) > 10


def test_interrupted_work_is_resumed_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sae = toy()
    options: dict[str, Any] = {"scale_rule": "kl", "scale_target": 0.05}
    collect_effects(lm, sae, TEXTS, quick(out=str(tmp_path / "whole"), **options))
    broken, make = str(tmp_path / "broken"), module._shard
    done = []

    def stop_at_second(*args: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return make(*args)

    monkeypatch.setattr(module, "_shard", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        collect_effects(lm, sae, TEXTS, quick(out=broken, **options))
    with pytest.raises(SteersmanError, match="2 of 3 shards are not measured yet"):
        Effects.open(broken)
    monkeypatch.setattr(module, "_shard", make)
    (tmp_path / "broken" / ".00001.safetensors.tmp").write_bytes(b"half")
    collect_effects(lm, sae, TEXTS, quick(out=broken, **options))
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")
    monkeypatch.setattr(module, "_shard", lambda *args: pytest.fail("measured again"))
    collect_effects(lm, sae, TEXTS, quick(out=broken, **options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of effects that was measured with `quick()`."""
    out = str(tmp_path_factory.mktemp("finished") / "e")
    lm, sae = toy()
    collect_effects(lm, sae, config=quick(out=out))
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"seed was 0, now 1"),
        ({"rollouts": 8}, "rollouts"),
        ({"scope": "generation"}, "scope was 'all', now 'generation'"),
        ({"n_vectors": 5}, "n_vectors"),
    ],
)
def test_other_settings_in_the_same_folder_are_an_error(finished: str, changes: dict[str, Any], message: str) -> None:
    lm, sae = toy()
    with pytest.raises(SteersmanError, match=message):
        collect_effects(lm, sae, config=quick(out=finished, **changes))


def test_other_saes_and_vectors_in_the_same_folder_are_an_error(finished: str, tmp_path: Path) -> None:
    lm, sae = toy()
    with pytest.raises(SteersmanError, match=r"sae\.hash"):
        collect_effects(lm, toy_sae(HOOK, k=8), config=quick(out=finished))
    with pytest.raises(SteersmanError, match="vectors_hash"):
        collect_effects(lm, sae, config=quick(out=finished), vectors=torch.randn(7, D))
    collect_effects(lm, sae, config=quick(out=finished, batch_rows=5))  # decides nothing but rounding
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(SteersmanError, match="holds no effects"):
        collect_effects(lm, sae, config=quick(out=str(tmp_path / "full")))


def test_ranks_share_the_work_and_change_nothing(tmp_path: Path) -> None:
    lm, sae = toy()
    collect_effects(lm, sae, config=quick(out=str(tmp_path / "one")))
    found = run_ranks(2, measure_in_a_job, str(tmp_path / "two"))
    assert [(how, number) for how, _, number in found] == [("done", "7"), ("done", "7")]
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_a_lost_rank_ends_the_job_and_the_next_one_resumes(tmp_path: Path) -> None:
    lm, sae = toy()
    collect_effects(lm, sae, config=quick(out=str(tmp_path / "one"), shard_vectors=2))
    out, settings = str(tmp_path / "two"), {"shard_vectors": 2}
    found = answers(start_ranks(2, partial(measure_in_a_job, **settings), out, "kill", 1))
    assert found[1] == (False, "killed")
    ok, (ended, seconds, message) = found[0]
    assert ok
    assert (ended, seconds < 10) == ("LostRankError", True)
    assert "rank 0 of 2: the connection to another rank was lost" in message
    run_ranks(2, partial(measure_in_a_job, **settings), out)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_a_rank_that_hangs_ends_the_job_in_bounded_time(tmp_path: Path) -> None:
    job = partial(measure_in_a_job, shard_vectors=2, timeout_seconds=2.0)
    started = start_ranks(2, job, str(tmp_path / "two"), "hang", 1)
    ((ok, answer),) = answers(started[:1])
    started[1][0].kill()
    assert ok, answer
    ended, seconds, message = answer
    assert (ended, seconds < 10) == ("LostRankError", True)
    assert "did not answer in time" in message


def test_a_mistake_is_told_by_every_rank(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for ended, _, message in run_ranks(2, measure_in_a_job, str(tmp_path / "full")):
        assert ended == "SteersmanError"
        assert "holds no effects" in message


def test_kinds_of_vectors() -> None:
    _, sae = toy()
    for kind, expected in (("decoder", 40), ("pairs", 8 * D), ("random", 8 * D)):
        x = make_vectors(quick(vectors=kind, n_vectors=None), sae, D)
        assert x.shape == (expected, D)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(expected))
        assert torch.equal(x, make_vectors(quick(vectors=kind, n_vectors=None), sae, D))
        if kind != "decoder":
            assert not torch.equal(x, make_vectors(quick(vectors=kind, n_vectors=None, seed=1), sae, D))
    rows = sae.W_dec.detach()
    x = make_vectors(quick(vectors="decoder", n_vectors=11), sae, D)
    nearest = (x @ rows.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(11))
    assert len(nearest.indices.unique()) == 11
    pair = make_vectors(quick(vectors="pairs", n_vectors=1), sae, D)[0]
    planes = torch.stack([torch.stack([rows[i], rows[j]]) for i in range(40) for j in range(i)])
    left = torch.stack([(pair - torch.linalg.lstsq(p.T, pair).solution @ p).norm() for p in planes])
    assert float(left.min()) < 1e-5  # in the plane of two rows


def test_given_vectors_are_measured_as_they_are() -> None:
    lm, sae = toy()
    v = SteeringVector.of(3.0 * torch.randn(D), hook_name=HOOK, model_name="llama")
    (shard,) = collect_effects(lm, sae, config=quick(), vectors=[v]).iterate()
    torch.testing.assert_close(shard.vectors[0], v.normalized().vector)
    (again,) = collect_effects(lm, sae, config=quick(), vectors=v.vector[None]).iterate()
    torch.testing.assert_close(again.effect, shard.effect)


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (torch.randn(3, D + 1), "vectors must be"),
        (torch.zeros(2, D), "vector 0 of 2 is zero"),
        (torch.full((1, D), float("nan")), "NaN or infinite"),
        ([], "no vectors given"),
        ([SteeringVector.of(torch.randn(D), hook_name=HOOK, model_name="gpt2")], "made for 'gpt2'"),
        ([SteeringVector.of(torch.randn(D), hook_name="blocks.0.hook_resid_post")], "made at 'blocks.0"),
        (
            [SteeringVector.of(torch.randn(D + 2), hook_name=HOOK)],
            "width 18, blocks.1.hook_resid_post of llama has width 16",
        ),
    ],
)
def test_given_vectors_that_do_not_fit(vectors: Any, said: str) -> None:
    lm, sae = toy()
    with pytest.raises(SteersmanError, match=said):
        collect_effects(lm, sae, config=quick(), vectors=vectors)


def test_wrong_requests_have_one_line(tmp_path: Path) -> None:
    lm, sae = toy()
    with pytest.raises(SteersmanError, match="give texts, or use 'norm' or 'fixed'"):
        collect_effects(lm, sae, config=quick(scale_rule="loss"))
    with pytest.raises(SteersmanError, match="unknown setting 'n_vector'; near it: n_vectors"):
        collect_effects(lm, sae, n_vector=3)
    with pytest.raises(SteersmanError, match="records no hook point"):
        collect_effects(lm, toy_sae(""), config=quick())
    with pytest.raises(SteersmanError, match="this SAE was made for 'gpt2', the model is"):
        collect_effects(lm, toy_sae(HOOK, model_name="gpt2"), config=quick())
    with pytest.raises(SteersmanError, match="n_vectors 41 is more than the 40"):
        collect_effects(lm, sae, config=quick(vectors="decoder", n_vectors=41))
    with pytest.raises(SteersmanError, match="reached by none of 7 vectors up to scale"):
        collect_effects(lm, sae, TEXTS, quick(scale_rule="kl", scale_target=50.0, scale_limit=1.0))
    (tmp_path / "file").write_text("")
    with pytest.raises(SteersmanError, match="cannot be used for effects"):
        collect_effects(lm, sae, config=quick(out=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale_rule": "fixed"}, "needs scale_target"),
        ({"rollouts": 1}, "at least 2"),
        ({"n_vectors": 0}, "n_vectors"),
        ({"temperature": 0.0}, "temperature"),
        ({"scale_target": -1.0}, "above 0"),
        ({"batch_rows": 0}, "batch_rows"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SteersmanError, match=said):
        EffectsConfig(**settings)


def test_vectors_that_miss_the_target_take_no_part_in_the_map() -> None:
    lm, sae = toy()
    settings = {"scale_rule": "kl", "scale_target": 0.1, "n_vectors": 40, "shard_vectors": 40}
    free = collect_effects(lm, sae, TEXTS, quick(**settings, scale_limit=50.0))
    limit = float(free.column("scale").quantile(0.75)) / free.baseline.median_norm
    effects = collect_effects(lm, sae, TEXTS, quick(**settings, scale_limit=limit))
    missed = int((~effects.column("reached")).sum())
    assert 5 <= missed <= 15
    assert float(effects.column("scale").max()) <= limit * free.baseline.median_norm * 1.0001
    m = effects.fit(heldout=0)
    assert m.provenance["n_vectors"] == 40 - missed
    assert m.provenance["n_not_reached"] == missed
