"""Some ranks run the model, others train: the run of one process, whatever their numbers and whatever happens."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.ranks import answers, run_ranks, start_ranks
from support.sharded_jobs import bytes_sent_by_model, train, train_from_stream
from support.stores import word_documents
from support.training import assert_same_sae, mixture
from torch import Tensor

from steersman.errors import LostRankError, PreemptedError, SteersmanError
from steersman.sae import SAE
from steersman.train import ActivationStore, TrainConfig, train_sae
from steersman.train.mesh.model_ranks import _ModelRank
from steersman.train.reports.plan import PlanConfig, plan_run

CONFIG = TrainConfig(
    d_sae=64, k=4, batch_size=64, tokens=64 * 60, seed=3, device="cpu", checkpoint_every=20, timeout_seconds=20
)
STREAM: dict[str, Any] = {
    "hook": "model.layers.1", "buffer_rows": 512, "heldout_rows": 300, "context_length": 16, "batch_size": 4,
    "large": 300.0,
}  # fmt: skip
TRANSCODER = replace(CONFIG, hook_out="model.layers.1")
TWO_HOOKS = {"hook": ("blocks.1.hook_resid_pre", "model.layers.1")}
NAME = "sae_weights.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(word_documents(250, shortest=1)))
    return str(path)


@pytest.fixture(scope="module")
def alone(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run_ranks(1, train_from_stream, text, STREAM, CONFIG, str(out))[0][0] == "done"
    return out


@pytest.fixture(scope="module")
def transcoder(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transcoder") / "run"
    assert run_ranks(1, train_from_stream, text, STREAM | TWO_HOOKS, TRANSCODER, str(out))[0][0] == "done"
    return out


@pytest.mark.parametrize(("n", "model_ranks", "latent"), [(2, 1, None), (3, 1, 1), (4, 0, 2), (4, 2, None)])
def test_the_sae_is_that_of_one_process(
    n: int, model_ranks: int, latent: int | None, text: str, alone: Path, tmp_path: Path
) -> None:
    _check_as_alone(n, STREAM, replace(CONFIG, model_ranks=model_ranks, latent_shards=latent), text, alone, tmp_path)


@pytest.mark.parametrize(("n", "model_ranks", "latent"), [(3, 1, 2), (2, 0, 1)])
def test_the_transcoder_is_that_of_one_process(
    n: int, model_ranks: int, latent: int, text: str, transcoder: Path, tmp_path: Path
) -> None:
    config = replace(TRANSCODER, model_ranks=model_ranks, latent_shards=latent)
    _check_as_alone(n, STREAM | TWO_HOOKS, config, text, transcoder, tmp_path)
    assert SAE.load(tmp_path / "run").cfg.hook_name_out == "blocks.1.hook_resid_post"


def _check_as_alone(
    n: int, stream: dict[str, Any], config: TrainConfig, text: str, alone: Path, tmp_path: Path
) -> None:
    model_ranks = config.model_ranks
    found = run_ranks(n, train_from_stream, text, stream, config, str(tmp_path / "run"))
    assert [ended for ended, *_ in found] == ["done"] * n
    passes = [made for *_, made in found]
    assert passes[: n - model_ranks] == [0] * (n - model_ranks) or not model_ranks
    statistics = 10  # passes that every rank, or the first of the model ranks, makes alone
    assert max(passes) - min(passes[n - model_ranks :] or passes) <= 4 + statistics * bool(model_ranks)
    if n - model_ranks == 1:
        assert (tmp_path / "run" / NAME).read_bytes() == (alone / NAME).read_bytes()
    assert_same_sae(alone, tmp_path / "run")
    left_out = [SAE.load(run).cfg.metadata["rows_left_out"] for run in (alone, tmp_path / "run")]
    assert left_out[0] == left_out[1] > 0


def test_activations_may_travel_on_a_wire_of_their_own(text: str, alone: Path, tmp_path: Path) -> None:
    """As between GPUs: by another process group than the messages, and beside the work of model and training."""
    config = replace(CONFIG, model_ranks=2)
    found = run_ranks(3, train_from_stream, text, {**STREAM, "wire": True}, config, str(tmp_path / "run"))
    assert [ended for ended, *_ in found] == ["done"] * 3
    assert (tmp_path / "run" / NAME).read_bytes() == (alone / NAME).read_bytes()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_job_and_the_next_one_ends_with_the_same_bytes(
    victim: int, text: str, alone: Path, tmp_path: Path
) -> None:
    config, out = replace(CONFIG, model_ranks=2), str(tmp_path / "run")
    at = 33 if victim == 0 else 55
    found = answers(start_ranks(3, train_from_stream, text, STREAM, config, out, "kill", at, victim))
    assert found.pop(victim) == (False, "killed")
    for ok, answer in found:
        assert ok, answer
        ended, seconds, message, _ = answer
        assert ended == "LostRankError"
        assert "the connection to another rank was lost" in message
        assert seconds < 10
    run_ranks(2, train_from_stream, text, STREAM, replace(config, model_ranks=1), out)  # with another number of ranks
    assert (tmp_path / "run" / NAME).read_bytes() == (alone / NAME).read_bytes()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_job_in_bounded_time(victim: int, text: str, tmp_path: Path) -> None:
    config = replace(CONFIG, model_ranks=1, timeout_seconds=2.0)
    at = 7 if victim == 0 else 55
    started = start_ranks(2, train_from_stream, text, STREAM, config, str(tmp_path / "run"), "hang", at, victim)
    ok, answer = answers([started[1 - victim]])[0]
    started[victim][0].kill()
    assert ok, answer
    ended, seconds, message, _ = answer
    assert ended == "LostRankError"
    assert "did not answer in time" in message
    assert seconds < 8


@pytest.mark.parametrize(("victim", "at"), [(0, 25), (2, 60)])
def test_a_rank_that_is_asked_to_end_has_all_of_them_save_and_end(
    victim: int, at: int, text: str, alone: Path, tmp_path: Path
) -> None:
    config, out = replace(CONFIG, model_ranks=1), tmp_path / "run"
    found = run_ranks(3, train_from_stream, text, STREAM, config, str(out), "preempt", at, victim)
    assert [ended for ended, *_ in found] == ["PreemptedError"] * 3, found
    newest = max((out / "checkpoints").glob("step_*")).name
    assert all(f"asked to end at step {int(newest[5:])}, which is saved" in message for _, _, message, _ in found)
    assert 0 < int(newest[5:]) < 60
    run_ranks(3, train_from_stream, text, STREAM, config, str(out))
    assert_same_sae(alone, out)


def test_why_they_end_is_said_by_the_first_trainer_though_another_is_gone_already() -> None:
    class Gone:
        """A wire on which the second trainer is gone when something is to be sent, or while it is."""

        def send(self, x: Tensor, to: int) -> Callable[[], Any]:
            if to == 1 and x.numel() == 4 and next(sent) == 0:
                raise LostRankError("rank 1 is gone")

            def finish() -> None:
                if to == 1:
                    raise LostRankError("rank 1 is gone")

            return finish

    sent, requests = itertools.count(), iter([("stop",)] * 5 + [("end", "PreemptedError", "asked to end")])
    channel: Any = SimpleNamespace(
        control=Gone(), rank=2, trainers=range(2), model_ranks=range(2, 3), receive_request=lambda: next(requests)
    )
    pool: Any = None
    with pytest.raises(PreemptedError, match="asked to end"):
        _ModelRank(channel, pytest.fail, pool, 1.0).serve()


def test_the_model_runs_no_further_ahead_than_half_a_buffer(text: str, tmp_path: Path) -> None:
    config, slow = replace(CONFIG, model_ranks=1), {**STREAM, "large": 1.0, "step_seconds": 0.05}
    found = run_ranks(2, train_from_stream, text, slow, config, str(tmp_path / "run"), "preempt", 20, 0)
    step = int(max((tmp_path / "run" / "checkpoints").glob("step_*")).name[5:])
    a_pass = 4 * 15  # rows of a forward pass without the BOS of each context, at most
    held, stats, first = 300, 512, 512 + 2 * 256
    needed = held + stats + first + 64 * step
    rows = found[1][3] * (a_pass - 6)
    assert needed - first < rows < needed + 512 + 2 * 256 + 8 * a_pass
    assert found[0][3] == 0  # trainers run no model


def test_a_model_rank_sends_what_the_plan_says(text: str, tmp_path: Path) -> None:
    config = replace(CONFIG, model_ranks=2, batch_size=1024, tokens=1024 * 6)
    stream = {**STREAM, "large": 1.0, "buffer_rows": 2048, "dtype": "float32"}  # without a pass for the ordinary rows
    _, *sent = run_ranks(3, bytes_sent_by_model, text, stream, config, str(tmp_path / "run"))
    plan = PlanConfig(d_in=16, d_sae=64, k=4, batch_size=1024, model_ranks=2, store_dtype="float32")
    # Four whole batches; before them come those that fit the encoder's scale, after them those of the end.
    steps = np.diff(np.array(sent), axis=1)[:, 5:9]
    shares = steps.sum(0)  # of one batch the model ranks have unequal parts
    assert shares == pytest.approx(2 * plan_run(plan).from_model - 40 * 1024, rel=0.05)
    assert steps[0].sum() == pytest.approx(4 * plan_run(plan).from_model, rel=0.1)


def test_what_takes_long_but_advances_is_waited_for(text: str, alone: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, model_ranks=1, timeout_seconds=2.0)
    out = tmp_path / "run"
    assert run_ranks(2, train_from_stream, text, {**STREAM, "load_seconds": 4}, config, str(out))[0][0] == "done"
    assert (out / NAME).read_bytes() == (alone / NAME).read_bytes()


def assert_every_rank_says(message: str, n: int, *args: Any) -> None:
    """All of n ranks end with this message."""
    found = answers(start_ranks(n, train_from_stream, *args))
    assert all(not ok and answer.startswith("SteersmanError") and message in answer for ok, answer in found), found


NOT_FINITE = "is not finite (NaN or infinite) for token 17"


@pytest.mark.parametrize(
    ("n", "stream", "training", "message"),
    [
        (2, {"hook": "blocks.9.hook_resid_post"}, {"model_ranks": 1}, "blocks.9.hook_resid_post"),
        (2, {"broken": True}, {"model_ranks": 1}, NOT_FINITE),
        (2, {"broken": True}, {}, NOT_FINITE),
        (2, {"on_nonfinite": "skip"}, {"model_ranks": 1}, "on_nonfinite='skip' needs one process"),
        (2, {}, {"model_ranks": 2}, "model_ranks = 2 leaves none of the 2 ranks"),
        (3, {}, {"model_ranks": 1, "d_sae": 63}, "d_sae = 63 cannot be split over 2 ranks"),
    ],
)
def test_a_mistake_is_told_by_every_rank_and_nobody_waits(
    n: int, stream: dict[str, Any], training: dict[str, Any], message: str, text: str, tmp_path: Path
) -> None:
    assert_every_rank_says(message, n, text, {**STREAM, **stream}, replace(CONFIG, **training), str(tmp_path / "run"))


@pytest.mark.parametrize(("n", "training"), [(2, {}), (3, {"model_ranks": 1})])
def test_what_only_one_rank_meets_while_training_is_told_by_every_rank(
    n: int, training: dict[str, Any], text: str, tmp_path: Path
) -> None:
    words = Path(text).read_text().replace("w17", "w18").splitlines()
    late, out = tmp_path / "late.txt", tmp_path / "run"
    late.write_text("\n".join([*words[:200], "w17", *words[200:]]))
    assert_every_rank_says(NOT_FINITE, n, str(late), {**STREAM, "broken": True}, replace(CONFIG, **training), str(out))
    assert len((out / "metrics.jsonl").read_text().splitlines()) > 2


def test_another_text_on_one_rank_is_told_by_every_rank(text: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("w9 w8 w7\n" * 500)
    stream = {**STREAM, "text_of_rank": {2: str(other)}}
    config = replace(CONFIG, model_ranks=2)
    assert_every_rank_says("rank 2 has another model, text or settings", 3, text, stream, config, str(tmp_path / "run"))


def test_a_store_needs_no_model_ranks(tmp_path: Path) -> None:
    ActivationStore.from_tensors([mixture(500)], tmp_path / "acts", "blocks.0.hook_resid_post")
    found = answers(start_ranks(2, train, str(tmp_path / "acts"), replace(CONFIG, model_ranks=1), str(tmp_path / "r")))
    assert all(not ok and "a store needs no model to run" in answer for ok, answer in found), found
    with pytest.raises(SteersmanError, match="leaves none of the 1 ranks"):
        train_sae(ActivationStore.open(tmp_path / "acts"), replace(CONFIG, model_ranks=1), tmp_path / "r")
