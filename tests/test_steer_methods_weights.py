"""Weights, centring and layers together: `east`, `icv`, `style`, and examples in groups, on planted states."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import D, V
from torch import Tensor

from steersman import SteeringVector
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import ContrastConfig, Steerer, contrast
from steersman.steer.methods import (
    Example,
    Examples,
    action_entropy,
    capped,
    check_apart,
    read_examples,
    split_groups,
    style_vectors,
)
from steersman.steer.methods.east import WeightedStates
from steersman.steer.methods.icv import MeanAndComponent
from steersman.steer.methods.reading import Part

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
HOOKS = [f"blocks.{i}.hook_resid_post" for i in range(3)]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_text(n: int, g: torch.Generator) -> str:
    return " ".join(f"w{i}" for i in torch.randint(4, V, (n,), generator=g).tolist())


G = generator()
POSITIVE = ["w7 " + random_text(n, G) for n in (3, 5, 2, 7, 4)]
NEGATIVE = ["w9 " + random_text(n, G) for n in (3, 5, 2, 7, 4)]


def last(lm: LanguageModel, text: str, hook: str = HOOK) -> Tensor:
    return lm.capture(lm.encode([text]).input_ids, hooks=[hook])[hook][0, -1]


def part(x: Tensor, weight: Tensor, group: Tensor) -> Part:
    n = len(x)
    step, positive = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)
    return Part(x=x, positive=positive, unit=torch.arange(n), weight=weight.double(), group=group, step=step)


def observed(*parts: Part, **config: Any) -> WeightedStates:
    found = WeightedStates(ContrastConfig(method="east", **config))
    for each in parts:
        found.observe(each)
    return found


# EAST


def test_east_finds_what_the_entropy_moves() -> None:
    """z = h a + noise, with a mean of its own in every episode: v is along a; permuted h gives nothing."""
    g = generator(0)
    a = torch.randn(32, generator=g)
    a = a / a.norm()
    group = torch.arange(600) // 20
    h = torch.rand(600, generator=g)
    x = 4 * h[:, None] * a + 0.3 * torch.randn(600, 32, generator=g) + 5 * torch.randn(30, 32, generator=g)[group]
    v = observed(part(x, h, group)).direction().float()
    assert torch.cosine_similarity(v, a, dim=0) > 0.95
    shuffled = [h[torch.randperm(600, generator=g)] for _ in range(20)]
    others = [observed(part(x, w, group)).direction().float() for w in shuffled]
    cosines = torch.stack([torch.cosine_similarity(other, a, dim=0) for other in others])
    assert abs(float(cosines.mean())) < 0.25
    assert max(float(other.norm()) for other in others) < 0.3 * v.norm()


def test_east_by_hand_and_in_any_batches() -> None:
    g = generator(1)
    x, h, group = torch.randn(12, 5, generator=g), torch.rand(12, generator=g), torch.arange(12) % 3
    expected = torch.zeros(5, dtype=torch.float64)
    for k in range(3):
        z = x[group == k].double()
        expected += (h[group == k].double()[:, None] * (z - z.mean(0))).sum(0)
    expected /= h.double().abs().sum()
    torch.testing.assert_close(observed(part(x, h, group)).direction(), expected)
    pieces = [part(x[i : i + 5], h[i : i + 5], group[i : i + 5]) for i in (0, 5, 10)]
    torch.testing.assert_close(observed(*pieces).direction(), expected)
    torch.testing.assert_close(observed(*pieces[:1]).merged(observed(*pieces[1:])).direction(), expected)
    wide = x.double()
    corpus = observed(part(x, h, group), centre="corpus").direction()
    torch.testing.assert_close(corpus, (h.double() @ (wide - wide.mean(0))) / h.double().sum())
    plain = observed(part(x, h, group), centre="none").direction()
    torch.testing.assert_close(plain, (h.double() @ wide) / h.double().sum())


def test_an_episode_of_constant_entropy_adds_nothing(lm: LanguageModel) -> None:
    g = generator(2)
    x, group = torch.randn(10, 4, generator=g), torch.arange(10) // 5
    h = torch.where(group == 0, torch.rand(10, generator=g), torch.tensor(0.75))
    both, varying = observed(part(x, h, group)), observed(part(x[:5], h[:5], group[:5]))
    torch.testing.assert_close(both.direction() * both.size, varying.direction() * varying.size, rtol=1e-6, atol=1e-12)
    constant = [{"text": t, "weight": 0.5, "group": "one"} for t in POSITIVE]
    with pytest.raises(SteersmanError, match="do not vary with the states within an episode"):
        contrast(lm, constant, hook=HOOK, method="east")


def test_east_from_a_log(lm: LanguageModel, tmp_path: Path) -> None:
    """The lines of an agent's log, through a file."""
    weights, groups = [0.1, 0.9, 0.4, 0.3, 0.8], ["a", "a", "b", "b", "b"]
    lines = [f'{{"text": "{t}", "weight": {w}, "group": "{k}"}}' for t, w, k in zip(POSITIVE, weights, groups)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    examples = read_examples(tmp_path / "log.jsonl")
    v = contrast(lm, examples.positive, hook=HOOK, method="east")
    z = torch.stack([last(lm, t) for t in POSITIVE])
    w = torch.tensor(weights)
    first, second = z[:2] - z[:2].mean(0), z[2:] - z[2:].mean(0)
    expected = (w[:2] @ first + w[2:] @ second) / w.sum()
    torch.testing.assert_close(v.vector, expected, rtol=1e-4, atol=1e-5)


def test_entropy_of_actions(lm: LanguageModel) -> None:
    """The parsed actions are counted by hand; what does not parse does not count."""

    def first(text: str) -> str | None:
        words = text.split()
        return words[0][-1] if words and words[0][1:].isdecimal() and int(words[0][1:]) % 2 else None

    options: dict[str, Any] = {"samples": 40, "seed": 1, "max_new_tokens": 1, "temperature": 3.0}
    found, seen = action_entropy(lm, ["w5 w6", "w7"], first, **options)
    for entropy, actions in zip(found, seen):
        n = sum(actions.values())
        assert 0 < n < 40
        assert entropy == pytest.approx(-sum(c / n * math.log(c / n) for c in actions.values()))
    corrected, _ = action_entropy(lm, ["w5 w6"], first, corrected=True, **options)
    assert corrected[0] == pytest.approx(found[0] + (len(seen[0]) - 1) / (2 * sum(seen[0].values())))
    with pytest.raises(SteersmanError, match="none of 3 completions of prompt 0"):
        action_entropy(lm, ["w5"], lambda _: None, samples=3, max_new_tokens=1)


# ICV


def test_icv_is_mean_and_component_over_all_layers(lm: LanguageModel) -> None:
    """By hand, over the hook points side by side, whatever the batches."""
    v = contrast(lm, POSITIVE, NEGATIVE, hook=HOOKS, method="icv", batch_size=2)
    pairs = list(zip(POSITIVE, NEGATIVE))
    each = [torch.stack([last(lm, p, hook) - last(lm, n, hook) for p, n in pairs]) for hook in HOOKS]
    d = torch.cat(each, 1).double()
    mean = d.mean(0)
    u = torch.linalg.svd(d - mean, full_matrices=False).Vh[0]
    u = u if u @ mean > 0 else -u
    got = torch.cat([v.directions[h] for h in HOOKS]).double()
    torch.testing.assert_close(got, mean + u, rtol=1e-4, atol=1e-4)
    notes = v.metadata["found"][", ".join(HOOKS)]
    assert notes["cosine_to_mean_difference"] == pytest.approx(float(torch.cosine_similarity(mean + u, mean, dim=0)))
    assert set(v.metadata["diagnostics"]) == set(HOOKS)


def test_icv_of_a_constant_difference_is_parallel_to_it() -> None:
    g = generator(5)
    d = torch.randn(48, generator=g)
    found = MeanAndComponent(ContrastConfig(method="icv"))
    x = torch.randn(10, 48, generator=g).repeat_interleave(2, 0)
    x[0::2] += d
    found.update(x, torch.tensor([True, False] * 10))
    for layer in range(3):
        at = slice(16 * layer, 16 * layer + 16)
        assert torch.cosine_similarity(found.direction()[at], d[at].double(), dim=0) > 0.999
    assert found.notes()["cosine_to_mean_difference"] == pytest.approx(1, abs=1e-4)


def test_icv_of_one_pair_is_its_difference(lm: LanguageModel) -> None:
    """There is no component about the mean of one difference."""
    v = contrast(lm, POSITIVE[0], NEGATIVE[0], hook=HOOKS, method="icv")
    for hook in HOOKS:
        torch.testing.assert_close(v.directions[hook], last(lm, POSITIVE[0], hook) - last(lm, NEGATIVE[0], hook))


def test_layers_of_another_width_go_together(lm: LanguageModel) -> None:
    v = contrast(lm, POSITIVE, NEGATIVE, hook=[HOOK, "blocks.1.mlp.hook_post"], method="icv")
    assert [len(d) for d in v.directions.values()] == [D, 24]


# Style, and several classes


def test_styles_are_told_from_all_others(lm: LanguageModel) -> None:
    styles = {"a": POSITIVE[:3], "b": POSITIVE[3:], "c": NEGATIVE}
    found = style_vectors(lm, styles, hook=[HOOK, OTHER], batch_size=2)
    assert list(found) == ["a", "b", "c"]
    for hook in (HOOK, OTHER):
        z = {name: torch.stack([last(lm, t, hook) for t in texts]) for name, texts in styles.items()}
        others = torch.cat([z["b"], z["c"]]).mean(0)
        torch.testing.assert_close(found["a"].directions[hook], z["a"].mean(0) - others)
    one = contrast(lm, styles["a"], [*styles["b"], *styles["c"]], hook=HOOK, method="style").vector
    torch.testing.assert_close(found["a"].directions[HOOK], one)
    with pytest.raises(SteersmanError, match="two styles at least"):
        style_vectors(lm, {"a": POSITIVE}, hook=HOOK)


@pytest.mark.parametrize("hook", [HOOK, OTHER, "blocks.2.hook_resid_pre", "blocks.1.attn.hook_z"])
def test_the_hook_that_is_read_is_the_one_that_is_edited(lm: LanguageModel, hook: str) -> None:
    """Bitwise: what is captured in the steered pass is the captured state with the vector added to it."""
    ids = lm.encode([POSITIVE[0]]).input_ids
    v = contrast(lm, POSITIVE[0], NEGATIVE[0], hook=hook, method="style")
    clean = lm.capture(ids, hooks=[hook])[hook]
    with Steerer(lm).vector(v, scope="all"):
        steered = lm.capture(ids, hooks=[hook])[hook]
    assert steered[0, 1:].equal(clean[0, 1:] + v.vector)
    assert steered[0, 0].equal(clean[0, 0]), "the BOS"


def test_one_pairs_difference_undoes_the_pairs_edit(lm: LanguageModel) -> None:
    """h + v = h_right at the last token, to rounding."""
    right, wrong = "w5 w6 w7", "w5 w8 w7"
    v = contrast(lm, right, wrong, hook=HOOK, method="caa", positions="last")
    with Steerer(lm).vector(v, scope=(3, None)):
        patched = last(lm, wrong)
    torch.testing.assert_close(patched, last(lm, right), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(last(lm, wrong), last(lm, right), atol=0.1)


# Weights and centring


def test_weights_of_examples(lm: LanguageModel) -> None:
    weights = [1.0, 2.0, 0.5, 3.0, 1.5]
    positive = [{"text": t, "weight": w} for t, w in zip(POSITIVE, weights)]
    v = contrast(lm, positive, NEGATIVE, hook=HOOK, method="diffmean", positions="last").vector
    z, w = torch.stack([last(lm, t) for t in POSITIVE]), torch.tensor(weights)
    expected = w @ z / w.sum() - torch.stack([last(lm, t) for t in NEGATIVE]).mean(0)
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)
    twice = [*POSITIVE, POSITIVE[0]]
    weighed = [{"text": POSITIVE[0], "weight": 2}, *POSITIVE[1:]]
    torch.testing.assert_close(
        contrast(lm, twice, NEGATIVE, hook=HOOK, diagnostics=False).vector,
        contrast(lm, weighed, NEGATIVE, hook=HOOK, diagnostics=False).vector,
    )


def test_components_about_the_corpus(lm: LanguageModel) -> None:
    x = torch.stack([last(lm, t) for t in (*POSITIVE, *NEGATIVE)]).double()
    u = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[0].float()
    difference = (x[:5].mean(0) - x[5:].mean(0)).float()
    got = contrast(lm, POSITIVE, NEGATIVE, hook=HOOK, method="pca", centre="corpus").vector
    torch.testing.assert_close(got, (u @ difference) * u, rtol=1e-3, atol=1e-4)


# Groups


def programs(n: int = 40) -> Examples:
    texts = [f"w{4 + i % 50} w5" for i in range(n)]
    groups = [f"program {i // 8}" for i in range(n)]
    sides = [[Example(text=f"{t} w{w}", group=k) for t, k in zip(texts, groups)] for w in (6, 7)]
    return Examples(positive=sides[0], negative=sides[1])


def test_pairs_of_one_program_are_capped() -> None:
    kept = capped(programs(), per_group=3, total=10, seed=1)
    assert len(kept.positive) == len(kept.negative) == 10
    counts = [sum(e.group == f"program {k}" for e in kept.positive) for k in range(5)]
    assert max(counts) <= 3
    assert [e.group for e in kept.positive] == [e.group for e in kept.negative]
    assert kept == capped(programs(), per_group=3, total=10, seed=1)
    assert len(capped(programs(), per_group=None, total=None).positive) == 40


def test_a_test_set_shares_no_program() -> None:
    made, test = split_groups(programs(), test=0.4)
    assert len(made.positive) + len(test.positive) == 40
    check_apart(made, test)
    with pytest.raises(SteersmanError, match=r"shares 1 group\(s\) .*'program 2'.*split_groups"):
        check_apart(programs(24), Examples(positive=programs().positive[16:17], negative=programs().negative[16:17]))
    with pytest.raises(SteersmanError, match="need a group"):
        capped(Examples(positive=[Example(text="w5")], negative=[Example(text="w6")]))


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ([{"text": "w5 w6", "weight": 2}], {"method": "pca"}, "'pca' counts every example once; diffmean, .* take weights"),
    ([{"text": "w5", "weight": "2"}], {}, "the weight of positive example 0 must be a number"),
    (["w5 w6", "w7"], {"method": "east"}, "give every example a weight"),
    ([{"text": "w5 w6", "weight": 0.5}], {"method": "east"}, "give every example a group, or centre='corpus'"),
    (["w5 w6"], {"method": "pca", "centre": "episode"}, "takes no centre 'episode': pair or corpus"),
    (["w5 w6"], {"method": "caa", "centre": "pair", "positions": "last"}, "takes no centre 'pair': leave centre out"),
    ([("w5", " w6")], {"method": "pca", "table": 3}, "makes no table of steps; .*diffmean"),
    ([("w5", " w6")], {"table": 0}, "table must be at least 1"),
    ([("w5", " w6")], {"table": 2, "positions": "last"}, "reads every step of the answers"),
    (["w5 w6"], {"table": 2}, "reads the answer to a prompt"),
]


@pytest.mark.parametrize(("positive", "options", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_wrong_input(lm: LanguageModel, positive: Any, options: dict[str, Any], message: str) -> None:
    negative = () if options.get("method") == "east" else positive
    with pytest.raises(SteersmanError, match=message) as error:
        SteeringVector.contrast(lm, positive, negative, **{"hook": HOOK, **options})
    assert "\n" not in str(error.value)
