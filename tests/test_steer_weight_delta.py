"""Differences of weights: what is kept, what is added, and that every byte comes back."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from support.planted_heads import WIDTH, H, planted_heads
from support.runtime_contract import check_contract, check_off
from support.tiny_models import build, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import Reweighted, WeightDelta, calibrate, head_columns
from steersman.steer.weights.delta import _kth

IDS = torch.arange(4, 12)[None]


def tuned(lm: LanguageModel, amount: float = 0.05, seed: int = 1) -> LanguageModel:
    """A benign fine-tune: the same model, every weight a little elsewhere."""
    other = copy.deepcopy(lm)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.model.parameters():
            p += amount * torch.randn(p.shape, generator=g).to(p.dtype)
    return other


def state(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return with_text("llama")


@pytest.fixture(scope="module")
def other(lm: LanguageModel) -> LanguageModel:
    return tuned(lm)


def test_taking_the_whole_difference_off_gives_the_base_to_rounding(lm: LanguageModel, other: LanguageModel) -> None:
    delta = WeightDelta.between(other, lm)
    before, base = state(other), lm.logits(IDS)
    assert len(delta) == sum(p.numel() for p in lm.model.parameters())
    with delta.applied(other, -1.0):
        for name, p in other.model.named_parameters():
            torch.testing.assert_close(p, dict(lm.model.named_parameters())[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(other.logits(IDS), base, rtol=1e-4, atol=1e-4)
    assert same(state(other), before)
    with delta.applied(lm):
        torch.testing.assert_close(lm.logits(IDS), other.logits(IDS), rtol=1e-4, atol=1e-4)
    assert torch.equal(lm.logits(IDS), base)
    with delta.applied(lm, 0.0):
        assert torch.equal(lm.logits(IDS), base)


def test_the_largest_are_exactly_so_many_with_ties_by_place() -> None:
    shapes = {"a": (4, 5), "b": (30,)}
    values = torch.randint(-3, 4, (50,), generator=torch.Generator().manual_seed(0)).float() / 8
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    delta = WeightDelta.between({"a": values[:20].view(4, 5), "b": values[20:]}, zeros)
    order = sorted(range(50), key=lambda i: (-abs(float(values[i])), i))
    nonzero = int((values != 0).sum())
    for k in (1, 5, 11, 23, nonzero):
        kept = delta.largest(k)
        found = [*kept.entries["a"].indices.tolist(), *(20 + i for i in kept.entries["b"].indices.tolist())]
        assert found == sorted(order[:k])
        assert len(kept) == k
    assert len(delta.top(0.1)) == 5
    assert len(delta.top(1.0)) == nonzero
    g = torch.Generator().manual_seed(1)
    parts = [torch.randn(n, generator=g) * scale for n, scale in ((1000, 1e-6), (1, 3.0), (2000, 1.0))]
    every = torch.cat(parts).abs().sort(descending=True).values
    for k in (1, 2, 500, 2999):
        assert _kth(parts, k) == (float(every[k - 1]), 1)
    for wrong, said in ((0.0, "above 0"), (1.5, "at most 1")):
        with pytest.raises(SteersmanError, match=said):
            delta.top(wrong)


def test_only_the_columns_of_chosen_heads_change() -> None:
    base = planted_heads()
    delta = WeightDelta.between(tuned(base), base).only(head_columns(base, [(0, 3), (1, 1), (1, 2)]))
    W = {i: base.model.model.layers[i].self_attn.o_proj.weight for i in range(2)}
    before, kept = state(base), {i: w.detach().clone() for i, w in W.items()}
    assert len(delta) == 3 * WIDTH * W[0].shape[0]
    with delta.applied(base, -2.0):
        changed = {i: (w != kept[i]).any(0) for i, w in W.items()}
        now = state(base)
    assert changed[0].nonzero()[:, 0].tolist() == list(range(3 * WIDTH, 4 * WIDTH))
    assert changed[1].nonzero()[:, 0].tolist() == list(range(WIDTH, 3 * WIDTH))
    assert [name for name in before if not torch.equal(before[name], now[name])] == [
        f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)
    ]
    assert same(state(base), before)
    with pytest.raises(SteersmanError, match=f"no head {H} in layer 0"):
        head_columns(base, [(0, H)])
    with pytest.raises(SteersmanError, match="a norm or something else"):
        head_columns(build("gemma2"), [(0, 0)])
    gpt2 = build("gpt2")  # keeps its weight the other way round
    (mask,) = head_columns(gpt2, [(1, 1)]).values()
    assert mask.shape == (16, 1)
    assert mask.flatten().tolist() == [False] * 8 + [True] * 8


def test_several_at_once_and_nested_and_undone_by_an_exception(lm: LanguageModel, other: LanguageModel) -> None:
    a = WeightDelta.between(other, lm).top(0.1)
    b = WeightDelta.between(tuned(lm, seed=2), lm).top(0.2)
    before = state(lm)
    with Reweighted(lm, [(2.0, a), (-0.5, b)]):
        together = state(lm)
    with a.applied(lm, 2.0):
        inner = state(lm)
        with b.applied(lm, -0.5):
            for name, p in lm.model.named_parameters():
                torch.testing.assert_close(p, together[name])
        assert same(state(lm), inner)
        with pytest.raises(RuntimeError), b.applied(lm):
            raise RuntimeError
        assert same(state(lm), inner)
    assert same(state(lm), before)
    outer, inside = a.applied(lm), b.applied(lm)
    outer.__enter__()
    inside.__enter__()
    with pytest.raises(SteersmanError, match="before another that was opened inside it"):
        outer.close()
    assert not same(state(lm), before)
    inside.close()
    assert same(state(lm), before)


def test_a_weight_is_a_strength_that_a_budget_finds(lm: LanguageModel, other: LanguageModel) -> None:
    delta = WeightDelta.between(other, lm).top(0.1)
    before = state(lm)
    texts = ["w5 w6 w7 w8 w9", "w10 w11 w12 w13", "w14 w15 w16 w17 w18"]
    found = calibrate(lambda weight: delta.applied(lm, weight), lm, texts=texts, target_kl=0.05)
    assert found.search.converged
    assert found.search.value == pytest.approx(0.05, rel=0.06)
    assert same(state(lm), before)


def test_the_runtime_contract(lm: LanguageModel, other: LanguageModel) -> None:
    delta = WeightDelta.between(other, lm)
    check_contract(lm, lambda _: delta.applied(lm, 2.0))
    check_off(lm, delta.applied(lm, 0.0))


def test_another_thread_is_refused(lm: LanguageModel, other: LanguageModel) -> None:
    delta = WeightDelta.between(other, lm).largest(10)
    said: list[str] = []

    def elsewhere() -> None:
        try:
            with delta.applied(lm):
                said.append("opened")
        except SteersmanError as error:
            said.append(str(error))

    before = state(lm)
    with delta.applied(lm):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "another thread" in said[0]
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said[1] == "opened"
    assert same(state(lm), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_the_weights_own_dtype(dtype: torch.dtype) -> None:
    base = with_text("gpt2")
    base.model.to(dtype)
    delta = WeightDelta.between(tuned(base), base)
    before = state(base)
    with delta.applied(base, 3.0):
        for name, p in base.model.named_parameters():
            part = delta.entries[name]
            wide = before[name].flatten()[part.indices].to(torch.promote_types(dtype, torch.float32))
            wide += 3.0 * part.values.to(wide)
            assert torch.equal(p.flatten()[part.indices], wide.to(dtype))
    assert same(state(base), before)


def test_files_and_what_does_not_fit(lm: LanguageModel, other: LanguageModel, tmp_path: Path) -> None:
    delta = WeightDelta.between(other, lm).top(0.05)
    delta.save(tmp_path / "d.safetensors")
    again = WeightDelta.load(tmp_path / "d.safetensors")
    assert (again.model_name, dict(again.metadata), len(again)) == (lm.name, dict(delta.metadata), len(delta))
    with delta.applied(lm):
        expected = state(lm)
    with again.applied(lm):
        assert same(state(lm), expected)
    small = planted_heads()
    with pytest.raises(SteersmanError, match="not of one architecture|same parameters"):
        WeightDelta.between(lm, small)
    with pytest.raises(SteersmanError, match=r"same parameters: b is in one"):
        WeightDelta.between({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)})
    with pytest.raises(SteersmanError, match=r"a is \[2\] in one model and \[3\] in the other"):
        WeightDelta.between({"a": torch.ones(2)}, {"a": torch.ones(3)})
    with pytest.raises(SteersmanError, match="is for 'llama', the model is 'planted'"):
        delta.applied(small)
    loose = WeightDelta(entries=delta.entries)
    with pytest.raises(SteersmanError, match="in the difference and .* in planted|no parameter"):
        loose.applied(small)
    with pytest.raises(SteersmanError, match="no parameter 'x'"):
        delta.only({"x": torch.ones(1)})
    with pytest.raises(SteersmanError, match=r"mask of lm_head.weight is \[7\]"):
        delta.only({"lm_head.weight": torch.ones(7)})
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(SteersmanError, match="holds no difference of weights"):
        WeightDelta.load(tmp_path / "x.safetensors")
