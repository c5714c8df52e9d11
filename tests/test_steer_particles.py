"""The particle decoder on a chain whose every text can be listed: what it should come to is known in closed form."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.chains import STATES, STEPS, Chain, ChainSource, count_zeros, distance, histogram, zeros
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.steer.decoding import (
    POTENTIALS,
    RESAMPLERS,
    Constraint,
    FunctionCritic,
    FunctionMask,
    Multinomial,
    Never,
    ParticleSet,
    Potential,
    Proposal,
    Resampler,
    Reward,
    Systematic,
    Truncation,
    Twist,
    WithoutReplacement,
    Writer,
    decode,
)
from steersman.steer.decoding.proposals import draw
from steersman.steer.decoding.resampling import Chosen, effective_size


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain()


def reward(lam: float = 1.0, kind: Any = "diff") -> Reward:
    return Reward(count_zeros, lam, kind=kind, of="ids")


def mean_reward(sets: list[ParticleSet]) -> float:
    return float(np.mean([found.mean(count_zeros(found.tokens)) for found in sets]))


def mean_z(sets: list[ParticleSet]) -> tuple[float, float]:
    """The mean of Z over populations and its standard error."""
    z = [math.exp(found.log_z) for found in sets if found.log_z is not None]
    return float(np.mean(z)), float(np.std(z) / len(z) ** 0.5)


def never_2_after_0(prefix: tuple[int, ...]) -> Tensor:
    return torch.tensor([True, True, not (prefix and prefix[-1] == 0)])


def kept(text: tuple[int, ...]) -> float:
    return float(not any(a == 0 and b == 2 for a, b in pairwise(text)))


# The five numbers


def test_the_chain_has_the_numbers_it_is_known_by(chain: Chain) -> None:
    base, _ = chain.target(lambda text: 1.0)
    tilted, z = chain.target(lambda text: math.exp(zeros(text)))
    assert sum(p * zeros(text) for text, p in base.items()) == pytest.approx(1.18, abs=0.005)
    assert sum(p * zeros(text) for text, p in tilted.items()) == pytest.approx(1.925, abs=0.001)
    assert z == pytest.approx(chain.value(()))


def test_an_exact_critic_proposes_the_target_itself(chain: Chain) -> None:
    """CriticControl: the product of its proposals is p exp(lam r) / Z, so that every weight is Z."""
    critic = FunctionCritic(lambda prefixes: [chain.value(prefix) for prefix in prefixes])
    proposal, (target, z) = Proposal(critic=critic), chain.target(lambda text: math.exp(zeros(text)))
    for text, share in target.items():
        q = 1.0
        for i, x in enumerate(text):
            row, _ = proposal.twisted(chain.next(text[:i]).log()[None], [text[:i]], None)
            q *= float(row[0, x].exp())
        assert q == pytest.approx(share, abs=1e-16, rel=1e-13)
    [found] = chain.run(400, proposal=proposal, potentials=[reward()], resampler="never")
    assert torch.allclose(found.log_weights, torch.tensor(math.log(z), dtype=torch.float64), atol=1e-12)
    assert found.effective_size == pytest.approx(400)
    assert found.mean(count_zeros(found.tokens)) == pytest.approx(1.925, abs=0.15)


@pytest.mark.parametrize(("k", "runs", "expected", "best"), [(4, 600, 1.64, 2.03), (32, 100, 1.86, 2.95)])
def test_few_feynman_kac_particles_fall_short_and_their_argmax_is_no_sample(
    chain: Chain, k: int, runs: int, expected: float, best: float
) -> None:
    sets = chain.run(k, runs, potentials=[reward()])
    assert mean_reward(sets) == pytest.approx(expected, abs=0.08)
    assert np.mean([zeros(found.tokens[found.best()]) for found in sets]) == pytest.approx(best, abs=0.12)
    z, error = mean_z(sets)
    assert abs(z - chain.value(())) < 4 * error
    assert all(found.cost.reward_calls == sets[0].cost.reward_calls for found in sets)


class Forgets(Resampler):
    """The authors' adaptive branch: where it does not resample it drops the weights that were pending."""

    def choose(self, log_shares: Tensor, n: int, generator: torch.Generator) -> Chosen:
        if effective_size(log_shares) < n / 2:
            return Multinomial().choose(log_shares, n, generator)
        return Chosen(torch.arange(n), (log_shares.logsumexp(0) - math.log(n)).expand(n).clone())


@pytest.mark.parametrize(("k", "runs", "expected"), [(4, 400, 1.31), (32, 60, 1.39)])
def test_a_step_without_resampling_must_not_forget_its_weights(
    chain: Chain, k: int, runs: int, expected: float
) -> None:
    forgetful = chain.run(k, runs, potentials=[reward()], resampler=Forgets())
    assert mean_reward(forgetful) == pytest.approx(expected, abs=0.08)
    assert mean_reward(chain.run(k, runs, potentials=[reward()])) > mean_reward(forgetful) + 0.2


@pytest.mark.parametrize("resampler", [WithoutReplacement(3), Multinomial(), Multinomial(1.0), Systematic(), Never()])
def test_z_is_unbiased_under_a_mask(chain: Chain, resampler: Resampler) -> None:
    _, z = chain.target(kept)
    assert z == pytest.approx(0.3603, abs=1e-4)
    sets = chain.run(8, 200, proposal=Proposal(mask=FunctionMask(never_2_after_0, STATES)), resampler=resampler)
    found, error = mean_z(sets)
    assert abs(found - z) < 4 * error
    assert error < 0.015
    assert all(kept(text) for one in sets for text, w in zip(one.tokens, one.log_weights) if w > -math.inf)


# What many particles come to


@pytest.mark.parametrize("kind", ["diff", "max", "add", "rt", "final"])
def test_every_kind_of_potential_has_the_same_target(chain: Chain, kind: str) -> None:
    target, z = chain.target(lambda text: math.exp(0.7 * zeros(text)))
    sets = chain.run(1500, 2, potentials=[reward(0.7, kind)])
    assert distance(histogram(sets), target) < 0.08
    assert np.mean([math.exp(found.log_z or 0) for found in sets]) == pytest.approx(z, rel=0.05)


def test_potentials_add_and_masks_multiply(chain: Chain) -> None:
    even = Constraint(lambda text: sum(text) % 2 == 0, of="ids", final=True)
    guess = Twist(lambda texts: [0.3 * len(text) for text in texts], of="ids")
    target, z = chain.target(lambda text: kept(text) * math.exp(zeros(text)) * (sum(text) % 2 == 0))
    proposal = Proposal(mask=FunctionMask(never_2_after_0, STATES), temperature=1.4)
    for resampler in (Multinomial(), WithoutReplacement(2)):
        sets = chain.run(1000, 2, potentials=[reward(), even, guess], proposal=proposal, resampler=resampler)
        assert distance(histogram(sets), target) < 0.1
        assert np.mean([math.exp(found.log_z or 0) for found in sets]) == pytest.approx(z, rel=0.08)


def test_more_particles_come_nearer_to_the_target(chain: Chain) -> None:
    target, _ = chain.target(kept)
    mask = FunctionMask(never_2_after_0, STATES)
    far, near = (
        np.mean([distance(histogram([one]), target) for one in chain.run(n, 6, proposal=Proposal(mask=mask))])
        for n in (20, 2000)
    )
    assert near < 0.06 < 0.15 < far


def chi_square(counts: dict[Any, float], expected: dict[Any, float]) -> float:
    n = sum(counts.values())
    return sum((counts.get(text, 0) - n * p) ** 2 / (n * p) for text, p in expected.items())


@pytest.mark.parametrize(
    "options",
    [
        {"proposal": Proposal(mask=FunctionMask(lambda prefix: torch.ones(STATES, dtype=torch.bool), STATES))},
        {"potentials": [Constraint(lambda text: True, of="ids")]},
        {"potentials": [reward(lam=0.0)], "resampler": Multinomial(1.0)},
        {"potentials": [Reward(lambda texts: [5.0] * len(texts), of="ids")], "resampler": Truncation(1)},
        {"proposal": Proposal(critic=FunctionCritic(lambda prefixes: [0.3] * len(prefixes)))},
    ],
    ids=["true mask", "true constraint", "lam 0", "constant reward under truncation", "constant critic"],
)
def test_what_says_nothing_leaves_the_base_distribution(chain: Chain, options: dict[str, Any]) -> None:
    """One particle of each of many populations: 81 texts, so that chi-square has 80 degrees of freedom."""
    base, _ = chain.target(lambda text: 1.0)
    counts: dict[Any, float] = {}
    for found in chain.run(3, 1000, seed=5, **options):
        text = found.tokens[found.sample(seed=len(counts) + zeros(found.tokens[0]))[0]]
        counts[text] = counts.get(text, 0) + 1
    common = {text: p for text, p in base.items() if p > 0.005}
    rest = 1 - sum(common.values())
    seen = {text: n for text, n in counts.items() if text in common}
    seen["rest"] = sum(n for text, n in counts.items() if text not in common)
    assert chi_square(seen, {**common, "rest": rest}) < len(common) + 4.5 * (2 * len(common)) ** 0.5


def test_temperature_and_top_k_change_nothing_but_the_variance(chain: Chain) -> None:
    base, _ = chain.target(lambda text: 1.0)
    hot = chain.run(4000, 2, proposal=Proposal(temperature=3.0), resampler="never")
    assert distance(histogram(hot), base) < 0.07
    assert hot[0].effective_size < 3000
    own = chain.run(4000, proposal=Proposal(temperature=3.0, corrected=False), resampler="never")[0]
    assert own.effective_size == pytest.approx(4000)
    assert distance(histogram([own]), base) > 0.2
    narrow = chain.run(2000, proposal=Proposal(top_k=1), resampler="never")[0]
    assert len(set(narrow.tokens)) == 1
    assert narrow.log_weights[0] == pytest.approx(math.log(chain.probability(narrow.tokens[0])))
    assert torch.allclose(narrow.log_prior, narrow.log_weights)


def test_a_guide_proposes_and_the_model_stays_the_target(chain: Chain) -> None:
    other, n, runs = Chain(seed=4), 2000, 3
    base, _ = chain.target(lambda text: 1.0)
    sets = decode(
        ChainSource(chain, n * runs),
        Writer(prompt_ids=[[]] * runs),
        n,
        max_new_tokens=STEPS,
        guide=ChainSource(other, n * runs),
        resampler="never",
    )
    assert distance(histogram(sets), base) < 0.1
    proposed = {text: sum(one.tokens.count(text) for one in sets) / (n * runs) for text in chain.texts}
    assert distance(proposed, other.target(lambda text: 1.0)[0]) < 0.06
    assert sets[0].cost.forward_passes == 2 * STEPS


# What is returned


def test_the_returned_set_is_whole(chain: Chain) -> None:
    potential = reward()
    found = chain.run(6, 3, potentials=[potential], resampler="multinomial")[1]
    assert len(found) == 6
    assert found.ancestors.shape == (STEPS, 6)
    assert found.log_z == pytest.approx(float(found.log_weights.logsumexp(0)) - math.log(6))
    assert found.log_potential.tolist() == count_zeros(found.tokens)
    assert [math.log(chain.probability(text)) for text in found.tokens] == pytest.approx(found.log_prior.tolist())
    assert found.probabilities.sum() == pytest.approx(1.0)
    best = found.best()
    assert found.log_potential[best] == found.log_potential.max()
    assert found.log_weights[found.best("weight")] == found.log_weights.max()
    assert found.log_prior[found.best("prior")] == found.log_prior.max()
    assert set(found.sample(20, seed=3)) <= set(range(6))
    assert set(found.roots.tolist()) <= set(range(6))
    assert not bool(found.ended.any())
    with pytest.raises(SteersmanError, match="potential, weight, prior"):
        found.best("luck")  # pyright: ignore[reportArgumentType]


def test_the_cost_is_exact(chain: Chain) -> None:
    asked: list[Any] = []

    def counted(texts: list[list[int]]) -> list[float]:
        asked.extend(tuple(text) for text in texts)
        return count_zeros(texts)

    potential = Reward(counted, of="ids")
    [found] = chain.run(5, potentials=[potential])
    assert found.cost.reward_calls == len(asked) == len(set(asked)) <= 5 * STEPS
    assert found.cost.forward_passes == STEPS  # what the last token would give is not asked for
    assert found.cost.rows == 5 * STEPS
    again = chain.run(5, potentials=[potential])[0]
    assert again.tokens == found.tokens
    assert again.cost == found.cost
    [late] = chain.run(5, potentials=[potential], every=STEPS)
    assert late.cost.reward_calls == len(set(late.tokens))


def test_a_population_does_not_depend_on_its_neighbours(chain: Chain) -> None:
    together = chain.run(5, 3, seed=2, potentials=[reward()])
    for i, found in enumerate(together):
        alone = chain.run(5, 1, seed=6 + i, potentials=[reward()])[0]
        assert alone.tokens == found.tokens
        assert torch.equal(alone.log_weights, found.log_weights)
        assert torch.equal(alone.ancestors, found.ancestors)


def test_finished_particles_keep_their_weight_and_take_part(chain: Chain) -> None:
    """Token 1 ends a text: Z = E[exp(zeros)] over texts of different lengths."""

    def ended(text: tuple[int, ...]) -> tuple[int, ...]:
        return text[: text.index(1) + 1] if 1 in text else text

    target: dict[Any, float] = {}
    for text in chain.texts:
        target[ended(text)] = target.get(ended(text), 0) + chain.probability(text)
    weighted = {text: p * math.exp(zeros(text)) for text, p in target.items()}
    z = sum(weighted.values())
    for resampler in (Multinomial(), WithoutReplacement(2), Never()):
        sets = chain.run(800, 2, potentials=[reward()], stop_ids=[1], resampler=resampler)
        assert distance(histogram(sets), {text: w / z for text, w in weighted.items()}) < 0.08
        assert all(one.ended.tolist() == [1 in text for text in one.tokens] for one in sets)


# Resamplers


@pytest.mark.parametrize("m", [1, 3, 9])
def test_without_replacement_keeps_expected_shares_and_takes_nothing_twice(m: int) -> None:
    g = torch.Generator().manual_seed(m)
    shares = torch.randn(m, generator=g, dtype=torch.float64) * 2
    total, taken, runs = torch.zeros(m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64), 1200
    resampler, n = WithoutReplacement(), 4
    for _ in range(runs):
        chosen = resampler.choose(shares, n, g)
        alive = chosen.log_shares > -math.inf
        assert len(set(chosen.index[alive].tolist())) == int(alive.sum()) == min(n, m)
        total.index_add_(0, chosen.index, chosen.log_shares.exp())
        taken[chosen.index[alive]] += 1
    p = taken / runs
    error = ((1 - p) / (p * runs)).sqrt()  # of a binomial count, relative
    assert bool(((total / runs / shares.exp() - 1).abs() <= 4 * error + 1e-3).all())


def test_heavy_candidates_are_kept_with_their_own_weight() -> None:
    shares = torch.tensor([0.5, 0.4, 0.04, 0.03, 0.03], dtype=torch.float64).log()
    chosen = WithoutReplacement().choose(shares, 3, torch.Generator().manual_seed(0))
    assert chosen.index[:2].tolist() == [0, 1]
    assert torch.equal(chosen.log_shares[:2], shares[:2])
    assert chosen.log_shares[2].exp() == pytest.approx(0.1)  # 1 / c


def test_truncation_keeps_the_best_in_their_places_and_copies_them() -> None:
    shares = torch.tensor([0.0, 3.0, 1.0, 2.0, -math.inf], dtype=torch.float64)
    chosen = Truncation(2).choose(shares, 5, torch.Generator().manual_seed(0))
    index, kept_shares = chosen.index, chosen.log_shares
    assert index[1] == 1
    assert index[3] == 3
    assert set(index.tolist()) == {1, 3}
    assert torch.equal(kept_shares, shares[index])
    assert not Truncation.proper


def test_truncation_to_one_is_greedy_search_over_blocks(chain: Chain) -> None:
    [found] = chain.run(50, potentials=[reward()], resampler=Truncation(1))
    assert len({text[:-1] for text in found.tokens}) == 1
    assert found.log_z is None
    assert zeros(found.tokens[0][:-1]) == STEPS - 1


def test_resamplers_and_potentials_are_found_by_name() -> None:
    assert {"never", "multinomial", "systematic", "without_replacement", "truncation"} <= set(RESAMPLERS)
    assert {"reward", "constraint", "twist", "rollout_value", "state", "feature"} <= set(POTENTIALS)

    class Surprising(Potential):
        name = "surprising"

        def value(self, candidates: Any, memory: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(candidates), dtype=torch.float64), memory

    assert POTENTIALS["surprising"] is Surprising


def test_draws_follow_the_distribution_and_never_take_what_has_none() -> None:
    log_q = torch.tensor([[-math.inf, 0.25, 0.5, 0.25, -math.inf], [1.0, -math.inf, -math.inf, -math.inf, -math.inf]])
    log_q[0, 1:4] = log_q[0, 1:4].log()
    log_q[1, 0] = 0.0
    u = torch.stack([torch.linspace(0, 1 - 1e-12, 1001, dtype=torch.float64)] * 2)
    drawn = draw(log_q, u)
    assert torch.bincount(drawn[0], minlength=5).tolist() == pytest.approx([0, 250, 500, 250, 0], abs=2)
    assert set(drawn[1].tolist()) == {0}


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"potentials": [Constraint(lambda text: False, of="ids")]},
            r"all 3 particles of prompt 0 are dead at token 1",
        ),
        (
            {"proposal": Proposal(mask=FunctionMask(lambda prefix: [0, 1] if len(prefix) < 2 else [], STATES))},
            r"dead at token 3: the mask <lambda> leaves none",
        ),
        ({"potentials": [Reward(lambda texts: [math.nan] * len(texts), of="ids")]}, "returned nan for"),
        ({"potentials": [Reward(lambda texts: [math.inf] * len(texts), of="ids")]}, "returned inf for"),
        ({"potentials": [Reward(lambda texts: [1.0], of="ids")]}, "returned 1 numbers for"),
        ({"potentials": [Reward(lambda texts: ["good"] * len(texts), of="ids")]}, "one number for each text"),
        ({"potentials": [Reward(lambda texts: [1.0] * len(texts))]}, "has no text: score token ids"),
        ({"proposal": Proposal(mask=FunctionMask(lambda prefix: [7], STATES))}, "allows a token that"),
        (
            {"proposal": Proposal(mask=FunctionMask(lambda p: torch.ones(2, dtype=torch.bool), STATES))},
            r"expected \[3\]",
        ),
        ({"proposal": Proposal(critic=FunctionCritic(lambda p: [0.0] * len(p)))}, "finite and above 0"),
        ({"resampler": "bootstrap"}, "unknown resampler 'bootstrap'"),
        ({"resampler": 3}, "a resampler is one of"),
    ],
)
def test_mistakes_get_one_line(chain: Chain, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message) as caught:
        chain.run(3, 2, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Proposal(temperature=0.0), "corrected=False"),
        (lambda: Proposal(temperature=-1.0), "0 or more"),
        (lambda: Proposal(top_k=0), "top_k"),
        (lambda: Proposal(top_p=0.0), "top_p"),
        (lambda: Multinomial(0.0), "threshold"),
        (lambda: WithoutReplacement(0), "copies"),
        (lambda: Truncation(0), "keep"),
        (lambda: Reward(count_zeros, kind="sum"), "kind must be"),  # pyright: ignore[reportArgumentType]
        (lambda: Reward(count_zeros, of="words"), "of must be"),  # pyright: ignore[reportArgumentType]
        (lambda: Reward(count_zeros, lam=math.nan), "lam"),
    ],
)
def test_wrong_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        make()


def test_a_particle_that_dies_alone_has_no_weight_and_no_nan(chain: Chain) -> None:
    [found] = chain.run(
        64, potentials=[Constraint(lambda text: text[-1] != 1, of="ids"), reward()], resampler="never", seed=1
    )
    broken = torch.tensor([1 in text for text in found.tokens])
    assert bool(broken.any())
    assert bool((found.log_weights[broken] == -math.inf).all())
    assert not bool(torch.isnan(found.log_weights).any())
    assert not broken[found.best()]
    assert not any(broken[i] for i in found.sample(50))
