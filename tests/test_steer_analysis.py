"""Analyses whose answers are known: concept shifts, promotion, divergence of layers."""

import math

import numpy as np
import pytest
import torch
from support.tiny_models import D, with_text

from steersman import LanguageModel, SteeringVector
from steersman.errors import SteersmanError
from steersman.lm.clock import ForwardPass
from steersman.steer import ConceptShift, FunctionEdit, LayerDivergence, PromoteReport, Steerer
from steersman.steer.analysis.clusters import k_means, matching, semi_nmf
from steersman.steer.analysis.concept_shift import concept_shift, shifts_of
from steersman.steer.analysis.layers import js_divergence, layer_divergences
from steersman.steer.analysis.promote import promote_report
from steersman.steer.evaluation.forced import Continuations, likelihoods
from steersman.steer.evaluation.rollouts import unsteered

ITEMS = [("w5 w6", " w7 w8", " w9"), ("w10", " w11", " w12 w13"), ("w20 w21", " w22", " w23"), ("w5", " w30", " w31")]


def planted_states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(base, tuned, labels, shifts): four groups far apart, each moved by a shift of its own."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(30)
    base = 10 * torch.randn(4, 12, generator=g)[labels] + torch.randn(120, 12, generator=g)
    shifts = 2 * torch.randn(4, 12, generator=g)
    return base, base + shifts[labels], labels, shifts


@pytest.mark.parametrize("method", ["kmeans", "semi_nmf"])
def test_planted_shifts_are_found(method: str) -> None:
    base, tuned, labels, shifts = planted_states()
    found = shifts_of(base, tuned, 4, method=method, hook_name="blocks.1.hook_resid_post")  # pyright: ignore
    for k in range(4):
        members = labels[found.labels == k]
        assert len(members.unique()) == 1, "a concept holds one planted group"
        torch.testing.assert_close(found.shifts[k].float(), shifts[members[0]], atol=1e-4, rtol=1e-4)
        figures = found.figures[k]
        assert figures.n == 30
        assert figures.pairwise_cosine == pytest.approx(1.0)
        assert figures.cosine_to_mean == pytest.approx(1.0)
        assert figures.spread == pytest.approx(0.0, abs=1e-4)
        assert figures.recovery > (1 - 1e-6 if method == "kmeans" else 0.95)
        assert figures.recovery > figures.unmoved
    assert sorted(f.matched for f in found.figures) == [0, 1, 2, 3]
    assert found.vector(2).norm() == pytest.approx(found.figures[2].norm, rel=1e-5)
    apart = found.difference(0, 1).vector
    torch.testing.assert_close(apart, (found.concepts[0] - found.concepts[1]).float())
    assert "recovery" in found.to_text()


def test_a_random_grouping_has_one_shift() -> None:
    base, tuned, _, _ = planted_states()
    found = shifts_of(base, tuned, 4)
    overall = float(found.overall.norm())
    for figures in found.figures:
        assert abs(figures.random_norm - overall) < abs(figures.norm - overall) + 1.0
    same = shifts_of(base, base, 4)
    assert all(f.norm == 0 and f.pairwise_cosine is None and f.recovery > 1 - 1e-9 for f in same.figures)


def test_matching_is_the_best_of_all() -> None:
    from itertools import permutations

    g = torch.Generator().manual_seed(3)
    for _ in range(30):
        score = torch.rand(4, 5, generator=g)
        best = max(permutations(range(5), 4), key=lambda p: sum(float(score[i, j]) for i, j in enumerate(p)))
        assert matching(score) == list(best)
    with pytest.raises(SteersmanError, match="to itself"):
        matching(torch.rand(3, 2))


def test_groups_are_never_empty_and_mistakes_are_said() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    centres, labels = k_means(x, 20)
    assert torch.bincount(labels, minlength=20).min() > 0
    torch.testing.assert_close(centres[labels[0]], x[labels == labels[0]].double().mean(0))
    u, _ = semi_nmf(x, 3)
    assert u.shape == (3, 3)
    with pytest.raises(SteersmanError, match="only 1 different"):
        k_means(torch.ones(5, 2), 2)
    with pytest.raises(SteersmanError, match="cannot make 9"):
        k_means(torch.ones(5, 2), 9)
    with pytest.raises(SteersmanError, match="row for row"):
        shifts_of(x, x[:3], 2)


def test_shift_between_two_models(lm: LanguageModel) -> None:
    """The tuned model adds one vector in block 1: every concept there has moved by it."""
    tuned = with_text("llama")
    moved = torch.linspace(-1, 1, D)
    bias = torch.nn.Parameter(moved.clone())
    block = tuned.model.model.layers[1].mlp.down_proj
    block.bias = bias
    texts = [f"w{i} w{i + 1} w{j}" for i in range(5, 25) for j in (30, 40)]
    found = concept_shift(lm, tuned, texts, hook="blocks.1.hook_resid_post", k=3)
    assert isinstance(found, ConceptShift)
    for k in range(3):
        torch.testing.assert_close(found.shifts[k].float(), moved, atol=1e-5, rtol=1e-4)
    assert found.vector(0).hook_name == "blocks.1.hook_resid_post"
    with pytest.raises(SteersmanError, match="no texts"):
        concept_shift(lm, tuned, [], hook="blocks.1.hook_resid_post", k=3)


def test_likelihoods_by_hand(lm: LanguageModel) -> None:
    logp, counts = likelihoods(lm, [Continuations(prompt=p, positive=a, negative=b) for p, a, b in ITEMS], unsteered, 3)
    assert counts.tolist() == [[2, 1], [1, 2], [1, 1], [1, 1]]
    ids = torch.tensor([lm.token_ids("w5 w6 w7 w8", bos=True)])
    p = lm.logits(ids)[0].log_softmax(-1)
    assert logp[0, 0] == pytest.approx(float(p[-3, ids[0, -2]] + p[-2, ids[0, -1]]), rel=1e-4)


def test_promotion_and_suppression_are_apart(lm: LanguageModel) -> None:
    """Lowering the logits of the negatives' tokens by hand, and giving what they lose to one token that is on no side,
    leaves every positive as it was."""
    negative = [9, 12, 13, 23, 31]

    def only_negatives(logits: torch.Tensor, fwd: ForwardPass) -> torch.Tensor:
        p = logits.softmax(-1)
        new = p.clone()
        new[..., negative] = p[..., negative] / 2
        new[..., 50] = p[..., 50] + p[..., negative].sum(-1) / 2
        return new.log()

    edit = {"logits": FunctionEdit(only_negatives)}
    v = SteeringVector.of(
        torch.randn(D, generator=torch.Generator().manual_seed(0)), hook_name="blocks.1.hook_resid_post"
    )
    found = promote_report(lm, {"nothing": v * 0.0, "negatives": edit, "vector": v}, ITEMS)
    for share in (0.25, 0.5, 0.75):
        assert found.arms["nothing"].promote[share].mean == found.arms["nothing"].suppress[share].mean == 0.0
        assert found.arms["negatives"].promote[share].mean == pytest.approx(0.0, abs=1e-5)
        assert found.arms["negatives"].suppress[share].mean == pytest.approx(-math.log(2), abs=1e-4)
    base = likelihoods(lm, [Continuations(prompt=p, positive=a, negative=b) for p, a, b in ITEMS], unsteered, 8)
    per_token = base[0] / base[1]
    assert found.reference == pytest.approx((per_token[:, 1].max() + per_token[:, 0].min()) / 2, rel=1e-4)
    with Steerer(lm).vector(v):
        new, n = likelihoods(lm, [Continuations(prompt=p, positive=a, negative=b) for p, a, b in ITEMS], unsteered, 8)
    change = new / n - per_token
    weakest = np.argsort(per_token[:, 0])[:2]
    assert found.arms["vector"].promote[0.5].mean == pytest.approx(change[weakest, 0].mean(), rel=1e-3)
    strongest = np.argsort(-per_token[:, 1])[:2]
    assert found.arms["vector"].suppress[0.5].mean == pytest.approx(change[strongest, 1].mean(), rel=1e-3)
    assert isinstance(found, PromoteReport)
    assert "weakest 25 %" in found.to_text()
    with pytest.raises(SteersmanError, match="at least one item"):
        promote_report(lm, {"vector": v}, [])


def test_js_divergence_has_its_bounds() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, 9, generator=g).log_softmax(-1) for _ in range(2))
    js = js_divergence(p, q)
    assert (js >= 0).all()
    assert (js <= math.log(2)).all()
    torch.testing.assert_close(js, js_divergence(q, p))
    assert js_divergence(p, p).abs().max() < 1e-12
    a, b, m = p.double().exp(), q.double().exp(), (p.double().exp() + q.double().exp()) / 2
    by_hand = ((a * (a / m).log()).sum(-1) + (b * (b / m).log()).sum(-1)) / 2
    torch.testing.assert_close(js, by_hand)


def test_the_layer_of_a_planted_contrast_wins(lm: LanguageModel) -> None:
    """A direction that is added at block 1 where the text ends in w40, and taken off again at block 2."""
    v = 6 * torch.randn(D, generator=torch.Generator().manual_seed(5))

    def plant(sign: float) -> FunctionEdit:
        return FunctionEdit(lambda h, fwd: h + sign * v * (fwd.input_ids == 40)[..., None])

    texts = [f"w{i} w{i + 3} w{i + 1}" for i in range(5, 15)]
    # both sides end in the same kind of token but for the planted one
    positive, negative = [f"{t} w40" for t in texts], [f"{t} w41" for t in texts]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[41] = lm.model.get_input_embeddings().weight[40]
    st = Steerer(lm)
    with st.edit("blocks.1.hook_resid_post", plant(1.0)), st.edit("blocks.2.hook_resid_pre", plant(-1.0)):
        found = layer_divergences(lm, positive, negative)
    best = max(found, key=lambda layer: layer.excess)
    assert isinstance(best, LayerDivergence)
    assert best.hook_name == "blocks.1.hook_resid_post"
    assert best.divergence.high <= math.log(2)
    assert found[0].divergence.mean < 1e-9, "before the planted layer the sides are the same"
    with pytest.raises(SteersmanError, match="two pairs"):
        layer_divergences(lm, positive[:1], negative[:1])
