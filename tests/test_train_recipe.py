"""The recipe that fills in what a configuration leaves open."""

import pytest

from steersman.errors import SteersmanError
from steersman.train import TrainConfig, resolve


def test_batches_grow_with_the_run_and_the_rate_falls() -> None:
    config = TrainConfig(d_sae=1024, k=16)
    short, long = resolve(config, 64, 400_000), resolve(config, 64, 50_000_000)
    assert (short.batch_size, long.batch_size) == (512, 4096)
    assert short.lr > long.lr
    assert resolve(config, 1024, 400_000).lr == pytest.approx(short.lr / 4)


def test_what_is_given_stays() -> None:
    config = TrainConfig(d_sae=64, k=4, batch_size=100, lr=0.01, dead_after=1000, k_aux=7, tokens=5000)
    recipe = resolve(config, 16, 1_000_000)
    assert (recipe.batch_size, recipe.n_steps, recipe.lr) == (100, 50, 0.01)
    assert (recipe.dead_after_steps, recipe.k_aux) == (10, 7)


def test_the_rate_rises_stays_and_falls_to_the_end() -> None:
    recipe = resolve(TrainConfig(d_sae=64, k=4, batch_size=10, warmup=0.1, decay=0.25), 16, 1000)
    factors = [recipe.lr_factor(step) for step in range(recipe.n_steps)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:75] == [1.0] * 65
    assert factors[-1] == pytest.approx(1 / 25)
    assert factors[75:] == sorted(factors[75:], reverse=True)


def test_a_batch_is_never_larger_than_the_data() -> None:
    assert resolve(TrainConfig(d_sae=64, k=4), 16, 100).batch_size == 100
    with pytest.raises(SteersmanError, match="needs --tokens"):
        resolve(TrainConfig(d_sae=64, k=4), 16, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 65}, "k = 65 must lie between 1 and d_sae = 64"),
        ({"architecture": "groupmax"}, "cannot train 'groupmax'"),
        ({"architecture": "jumprelu", "k": 0}, "jumprelu needs target_l0"),
        ({"architecture": "jumprelu", "target_l0": 8.0}, "jumprelu reads no k: target_l0 says"),
        ({"architecture": "jumprelu", "k": 0, "target_l0": 64.5}, "target_l0 = 64.5 .* at most d_sae = 64"),
        ({"architecture": "jumprelu", "k": 0, "target_l0": 0.0}, "target_l0 = 0.0 must lie above 0"),
        ({"target_l0": 8.0}, "topk does not read target_l0: it has k"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"tokens": 0}, "tokens = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"ema": 1.0}, "ema = 1.0"),
        ({"heldout_fraction": 0.0}, "heldout_fraction = 0.0"),
        ({"decay": 1.5}, "fractions of the run"),
        ({"grad_accumulation": 0}, "grad_accumulation = 0"),
        ({"architecture": "batch_topk", "grad_accumulation": 2}, "selects over the whole batch"),
        ({"keep_checkpoints": 0}, "keep_checkpoints = 0"),
        ({"log_every": 0}, "at least 1"),
    ],
)
def test_impossible_settings(fields: dict, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        TrainConfig(**{"d_sae": 64, "k": 4, **fields})
