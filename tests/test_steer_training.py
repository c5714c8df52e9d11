"""The training loop and its losses: values by hand, an edit that changes nothing, constraints, resuming."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.concept_lm import LAST, concept_lm
from support.tiny_models import D, count_hooks, toy_sae, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import Steerer, VectorEdit
from steersman.steer.edits import Edit
from steersman.steer.scope import Scope
from steersman.steer.training import (
    Imitated,
    Imitation,
    Likelihood,
    Loss,
    Preference,
    ProbeLoss,
    Separation,
    TrainedEdit,
    TrainEditConfig,
    train_edit,
)
from steersman.steer.training.losses import Trial

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["w5 w6", "w7 w8 w9", "w10"]
POSITIVE = [(p, a) for p, a in zip(PROMPTS, (" w30 w31", " w32", " w33 w34 w35"))]
NEGATIVE = [(p, a) for p, a in zip(PROMPTS, (" w40", " w41 w42", " w43"))]
G = torch.Generator().manual_seed(0)


def one(p: Mapping[str, Tensor]) -> dict[str, Edit]:
    return {HOOK: VectorEdit(p["v"])} if "v" in p and len(p["v"]) == D else {}


def logp(lm: LanguageModel, prompt: str, answer: str) -> Tensor:
    """log p of each token of the answer, of one text alone."""
    ids = torch.tensor([lm.token_ids(prompt + answer, bos=True)])
    n = len(lm.token_ids(answer))
    return lm.logits(ids)[0, -n - 1 : -1].log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0]


def states(lm: LanguageModel, prompt: str, answer: str, hook: str) -> Tensor:
    ids = torch.tensor([lm.token_ids(prompt + answer, bos=True)])
    return lm.capture(ids, hooks=[hook])[hook][0, -len(lm.token_ids(answer)) :]


def losses(lm: LanguageModel) -> dict[str, tuple[Loss, dict[str, Tensor], float]]:
    """Each loss, parameters of an edit that changes nothing, and the unsteered model's value by hand."""
    zero = {"v": torch.zeros(D)}
    likelihood = -sum(float(logp(lm, *e).mean()) for e in POSITIVE) / 3
    suppressed = -sum(float((1 - logp(lm, *e).exp()).log().mean()) for e in NEGATIVE) / 3
    items = [Imitated(prompt=p, teacher="w20 w21 " + p, answer=a) for p, a in POSITIVE]
    points = [HOOK, "blocks.2.hook_resid_post"]
    distance = 0.0
    for item in items:
        for hook in points:
            mine, theirs = (states(lm, prompt, item.answer, hook) for prompt in (item.prompt, item.teacher))
            distance += float((mine - theirs).square().sum(-1).mean()) / 3
    sae, chosen = toy_sae(HOOK), [1, 3, 5, 8]
    with torch.no_grad():
        sae.b_enc += 0.5
    texts = [["".join(e) for e in side] for side in (POSITIVE, NEGATIVE)]
    ids = [[torch.tensor([lm.token_ids(t, bos=True)]) for t in side] for side in texts]
    z = [
        torch.stack([sae.encode(lm.capture(i, hooks=[HOOK])[HOOK][0, 1:])[:, chosen].mean(0) for i in side]).detach()
        for side in ids
    ]
    plus, minus = z[0].mean(0), z[1].mean(0)
    margin = ((z[1] - minus).square().sum(1) - (z[1] - plus).square().sum(1)) / (plus - minus).square().sum()
    separation = float((1 + (-4 * margin).exp()).log().mean()) + 0.5 * likelihood
    separate = Separation(POSITIVE, NEGATIVE, sae=sae, hook=HOOK, features=chosen)
    x, y = torch.randn(9, D, generator=G), torch.arange(9) % 2
    return {
        "likelihood": (Likelihood(POSITIVE, NEGATIVE, suppress=2.0), zero, likelihood + 2 * suppressed),
        "imitation": (Imitation(items, points), zero, distance),
        "separation": (separate, {"v": torch.zeros(4)}, separation),
        "probe": (ProbeLoss(x, y), {"read": torch.zeros(D), "bias": torch.zeros(1)}, math.log(2)),
        "preference": (Preference(POSITIVE, NEGATIVE), zero, math.log(2)),
    }


@pytest.mark.parametrize("name", ["likelihood", "imitation", "separation", "probe", "preference"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_an_edit_that_changes_nothing_has_the_models_own_loss(lm: LanguageModel, name: str, batch_size: int) -> None:
    loss, parameters, expected = losses(lm)[name]
    found = train_edit(lm, parameters, one, loss, epochs=1, batch_size=batch_size, full_batch=True, lr=1e-9)
    assert found.losses[0] == pytest.approx(expected, rel=2e-5)
    assert found.unsteered == pytest.approx(expected, rel=2e-5)
    assert count_hooks(lm.model) == 0
    assert all(p.requires_grad for p in lm.model.parameters())
    assert all(p.grad is None for p in lm.model.parameters())


@pytest.mark.parametrize("name", ["likelihood", "imitation", "separation", "probe", "preference"])
def test_every_loss_falls(lm: LanguageModel, name: str) -> None:
    loss, parameters, _ = losses(lm)[name]
    found: TrainedEdit = train_edit(lm, parameters, one, loss, epochs=10, batch_size=2, lr=0.02, keep="best")
    assert found.loss < found.unsteered - 1e-3
    assert set(found.parameters) == set(parameters)


def test_a_minibatch_estimates_the_whole(lm: LanguageModel) -> None:
    """Sides of different size, in batches that mix them: the mean over all items is the objective, whatever the cut."""
    loss = Likelihood(POSITIVE, [*NEGATIVE, ("w11 w12", " w44")], suppress=0.5)
    count = loss.prepare(lm)
    v = 0.1 * torch.randn(D, generator=G)
    trial = Trial(lm, {"v": v}, one, Scope.of("all"))
    whole = loss.of(trial, range(count)).mean()
    parts = torch.cat([loss.of(trial, [i]) for i in range(count)]).mean()
    torch.testing.assert_close(parts, whole)


def test_gradients_are_those_of_the_likelihood(lm: LanguageModel) -> None:
    """Against finite differences, in float64."""
    wide = with_text("llama")
    wide.model.double()
    loss = Likelihood(POSITIVE)
    count = loss.prepare(wide)
    v = (0.1 * torch.randn(D, generator=G)).requires_grad_()
    trial = Trial(wide, {"v": v}, one, Scope.of("all"))
    loss.of(trial, range(count)).mean().backward()
    assert v.grad is not None
    for i in (0, 5, 11):
        values = []
        for sign in (1, -1):
            moved = v.detach().clone()
            moved[i] += sign * 1e-3
            values.append(float(loss.of(Trial(wide, {"v": moved}, one, Scope.of("all")), range(count)).mean().detach()))
        assert float(v.grad[i]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2, abs=1e-4)


def test_preference_points_where_the_answers_part(lm: LanguageModel) -> None:
    """At zero: log 2, and the gradient is -beta/2 times that of log p(a+) - log p(a-)."""
    loss = Preference(POSITIVE, NEGATIVE, beta=0.3)
    loss.prepare(lm)
    v = torch.zeros(D, requires_grad=True)
    value = loss.of(Trial(lm, {"v": v}, one, Scope.of("all")), [0, 1, 2])
    torch.testing.assert_close(value, torch.full((3,), math.log(2)))
    value.mean().backward()
    u = torch.zeros(D, requires_grad=True)
    gap: Any = 0.0
    for sign, side in ((1, POSITIVE), (-1, NEGATIVE)):
        for prompt, answer in side:
            ids = torch.tensor([lm.token_ids(prompt + answer, bos=True)])
            n = len(lm.token_ids(answer))
            with Steerer(lm).vector({HOOK: u}):
                p = lm.logits(ids, grad=True)[0, -n - 1 : -1].log_softmax(-1)
            gap = gap + sign * p.gather(1, ids[0, -n:, None]).sum() / 3
    gap.backward()
    assert u.grad is not None
    torch.testing.assert_close(v.grad, -0.15 * u.grad, rtol=1e-4, atol=1e-6)


def test_scopes_see_where_each_prompt_ends(lm: LanguageModel) -> None:
    """In training as in generation: a vector in scope generation cannot move the first token of an answer."""
    single = [(p, " w30") for p in PROMPTS]
    found = train_edit(lm, {"v": torch.zeros(D)}, one, Likelihood(single), scope="generation", epochs=3, lr=0.1)
    assert found.parameters["v"].equal(torch.zeros(D))
    there = train_edit(lm, {"v": torch.zeros(D)}, one, Likelihood(single), scope="last_prompt", epochs=3, lr=0.1)
    assert there.parameters["v"].norm() > 0.1


def test_a_unit_parameter_stays_one(lm: LanguageModel) -> None:
    start = torch.randn(D, generator=G)
    found = train_edit(lm, {"v": 5 * start}, one, Likelihood(POSITIVE), unit=["v"], epochs=3, lr=0.05, clip=1.0)
    assert float(found.parameters["v"].norm()) == pytest.approx(1, abs=1e-6)
    assert float(torch.cosine_similarity(found.parameters["v"], start, dim=0)) < 0.999
    again = train_edit(lm, {"v": 10 * start}, one, Likelihood(POSITIVE), unit=["v"], epochs=3, lr=0.05, clip=1.0)
    torch.testing.assert_close(again.parameters["v"], found.parameters["v"], rtol=1e-4, atol=1e-5)
    with pytest.raises(SteersmanError, match="is zero and should have norm 1"):
        train_edit(lm, {"v": torch.zeros(D)}, one, Likelihood(POSITIVE), unit=["v"])


def test_a_bound_holds_and_the_best_is_kept(lm: LanguageModel) -> None:
    options: dict[str, Any] = {"epochs": 12, "lr": 0.3, "full_batch": True, "keep": "best"}
    found = train_edit(lm, {"v": torch.zeros(D)}, one, Likelihood(POSITIVE), max_norm={"v": 0.5}, **options)
    assert float(found.parameters["v"].norm()) <= 0.5 + 1e-6
    assert found.loss == min(found.losses)
    assert len(found.losses) == 13, "the last step's parameters are looked at too"
    with Steerer(lm).vector({HOOK: found.parameters["v"]}):
        value = -sum(float(logp(lm, *e).mean()) for e in POSITIVE) / 3
    assert value == pytest.approx(found.loss, rel=1e-5), "the loss that is reported is that of what was kept"


def test_the_learning_rate_over_a_run() -> None:
    constant, linear, cosine = (TrainEditConfig(schedule=s) for s in ("constant", "linear", "cosine"))  # pyright: ignore[reportArgumentType]
    assert [linear.rate(s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [constant.rate(s, 4) for s in (0, 3)] == [1.0, 1.0]
    assert cosine.rate(2, 4) == pytest.approx(0.5)
    warm = TrainEditConfig(schedule="cosine", warmup=100)
    assert [warm.rate(s, 40) for s in range(4)] == [0.25, 0.5, 0.75, 1.0], "at most a tenth of the run"


def test_a_run_that_was_cut_off_goes_on(lm: LanguageModel, tmp_path: Path) -> None:
    """Bitwise as if it had run through."""
    path = str(tmp_path / "run" / "edit.safetensors")
    settings: dict[str, Any] = {"lr": 0.05, "batch_size": 2, "seed": 3, "keep": "best", "schedule": "linear"}
    whole = train_edit(lm, {"v": torch.zeros(D)}, one, Likelihood(POSITIVE), epochs=6, **settings)

    class CutOff(Likelihood):
        def of(self, trial: Trial, items: Any) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > 12:
                raise KeyboardInterrupt
            return super().of(trial, items)

    with pytest.raises(KeyboardInterrupt):
        train_edit(lm, {"v": torch.zeros(D)}, one, CutOff(POSITIVE), epochs=6, checkpoint=path, **settings)
    assert count_hooks(lm.model) == 0
    again = train_edit(lm, {"v": torch.zeros(D)}, one, Likelihood(POSITIVE), epochs=6, checkpoint=path, **settings)
    assert again.parameters["v"].equal(whole.parameters["v"])
    assert again.losses == whole.losses
    changed = {**settings, "lr": 0.1}
    with pytest.raises(SteersmanError, match=r"is of another run \(lr was 0.05, now 0.1\)"):
        train_edit(lm, {"v": torch.zeros(D)}, one, Likelihood(POSITIVE), epochs=6, checkpoint=path, **changed)


def test_the_seed_orders_the_items(lm: LanguageModel) -> None:
    def run(seed: int) -> Tensor:
        options: dict[str, Any] = {"epochs": 2, "batch_size": 1, "lr": 0.05, "seed": seed}
        return train_edit(lm, {"v": torch.zeros(D)}, one, Likelihood(POSITIVE), **options).parameters["v"]

    assert run(1).equal(run(1))
    assert not run(1).equal(run(2))


def test_softmax_regression_has_one_minimum() -> None:
    """At the last hook point of a model without a final norm the likelihood is convex in v: two starts end alike."""
    planted = concept_lm()
    with torch.no_grad():
        planted.lm.model.lm_head.weight *= 3  # as much curvature as makes the minimum quick to find
    g = torch.Generator().manual_seed(1)
    texts = [planted.text(g, 8, [*planted.words, *planted.others]) for _ in range(12)]

    def run(start: Tensor) -> Tensor:
        found = train_edit(
            planted.lm, {"v": start}, lambda p: {LAST: VectorEdit(p["v"])}, Likelihood(texts), full_batch=True,
            epochs=150, batch_size=16, lr=0.5, schedule="cosine", include_bos=True,
        )  # fmt: skip
        return found.parameters["v"]

    a, b = (run(s * torch.randn(D, generator=g)) for s in (0.0, 2.0))
    assert a.norm() > 1
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_one_way_of_steering_taught_to_another(lm: LanguageModel) -> None:
    """A teacher steered by a vector: the student finds it."""
    v = 0.5 * torch.randn(D, generator=G)
    items = [Imitated(prompt=p, teacher=p, answer=a) for p, a in (*POSITIVE, *NEGATIVE)]
    loss = Imitation(items, [HOOK, "blocks.2.hook_resid_post"], teaching=lambda: Steerer(lm).vector({HOOK: v}))
    found = train_edit(lm, {"v": torch.zeros(D)}, one, loss, full_batch=True, epochs=150, lr=0.05, schedule="cosine")
    torch.testing.assert_close(found.parameters["v"], v, rtol=0.02, atol=0.02)
    assert found.loss < 1e-3 * found.unsteered


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (Likelihood([]), {}, "no positive examples"),
    (Likelihood(["w5"]), {"lr": 0.0}, "lr must be a number above 0"),
    (Likelihood(["w5"]), {"epochs": 0}, "epochs and batch_size must be at least 1"),
    (Likelihood(["w5"]), {"clip": 0.0}, "clip must be above 0"),
    (Likelihood(["w5"]), {"schedule": "steps"}, "schedule is 'steps'"),
    (Likelihood(["w5"]), {"unit": ["w"]}, "no parameter 'w' to hold: have v"),
    (Likelihood(["w5 " * 40]), {}, "positive example 0 has 41 tokens and the context of llama is 32"),
    (Preference(["w5"], ["w6"]), {}, "reads the answer to a prompt"),
    (Preference([("w5", " w6")], []), {}, "compares pairs"),
    (Imitation([], [HOOK]), {}, "no answers to imitate"),
    (Imitation([Imitated(prompt="w5", teacher="w6 w5", answer="")], [HOOK]), {}, "answer 0 has no token"),
]


@pytest.mark.parametrize(("loss", "options", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_wrong_input(lm: LanguageModel, loss: Loss, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message) as error:
        train_edit(lm, {"v": torch.zeros(D)}, one, loss, **options)
    assert "\n" not in str(error.value)
