"""Strength by need: planted divergences in closed form, streams against texts read anew, rows, padding."""

from typing import Any

import pytest
import torch
from support.tiny_models import V, count_hooks, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.steer import Edit, KLControl, Steerer, VectorEdit, nucleus_kl
from steersman.steer.edits.base import PerRow, per_row

PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12"]
TOKEN = 40


def rows_of(text: Any) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(text.new_tokens, text.new_mask)]


def pull(size: float) -> Tensor:
    """A vector at the logits, which are linear in it."""
    return size * torch.nn.functional.one_hot(torch.tensor(TOKEN), V).float()


class Wanted(Edit):
    """Raises the logits of TOKEN unless the token that was read last is it already."""

    def __init__(self, size: PerRow) -> None:
        self.size = per_row(size, "size", torch.device("cpu"))
        self.rows = len(self.size)
        self.active = self.size != 0

    def scaled(self, factor: PerRow) -> "Wanted":
        return Wanted(self.size * per_row(factor, "factor", self.size.device))

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        assert fwd.input_ids is not None
        lacking = (fwd.input_ids != TOKEN)[..., None] & torch.as_tensor(where).reshape(-1, fwd.length, 1)
        size = self.expand(self.size, fwd)[:, None, None]
        return torch.where(lacking, h + size * pull(1.0), h)


def test_the_divergence_of_two_nuclei() -> None:
    p = torch.tensor([[0.6, 0.3, 0.08, 0.02]]).log()
    q = torch.tensor([[0.1, 0.02, 0.8, 0.08]]).log()
    # the nuclei of 0.85 are {0, 1} and {2, 0}; their union leaves out token 3
    a, b = torch.tensor([0.6, 0.3, 0.08]) / 0.98, torch.tensor([0.1, 0.02, 0.8]) / 0.92
    kl = (a * (a / b).log()).sum()
    torch.testing.assert_close(nucleus_kl(p, q, 0.85)[0], kl)
    torch.testing.assert_close(nucleus_kl(p, q, 0.85, per_token=True)[0], kl / 3)
    torch.testing.assert_close(nucleus_kl(p, q, 1.0)[0], (p.exp() * (p - q)).sum())
    assert nucleus_kl(p, p, 0.5).tolist() == [0.0]
    holes = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert nucleus_kl(holes, holes, 1.0).tolist() == [0.0]


def test_a_nucleus_longer_than_what_is_looked_at_first() -> None:
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 8.0):
        p, q = (spread * torch.randn(2, 3, 2000, generator=generator)).unbind(0)
        kept = torch.zeros(3, 2000, dtype=torch.bool)
        for logits in (p, q):
            for row in range(3):
                total = 0.0
                for token in logits[row].argsort(descending=True).tolist():
                    if total < 0.7:
                        kept[row, token] = True
                    total += float(logits[row].softmax(-1)[token])
        a, b = (x.masked_fill(~kept, -torch.inf).log_softmax(-1) for x in (p, q))
        expected = torch.where(kept, a.exp() * (a - b), 0.0).sum(-1)
        torch.testing.assert_close(nucleus_kl(p, q, 0.7), expected, rtol=1e-3, atol=1e-5)


def test_the_strength_is_the_planted_divergence() -> None:
    lm = with_text("llama")
    size = 0.9
    control = KLControl(properties=[{"logits": VectorEdit(pull(size))}], top_p=1.0)
    got = control.generate(lm, PROMPTS, max_new_tokens=5)
    for i, row in enumerate(rows_of(got.generation)):
        ids, n = lm.token_ids(PROMPTS[i], bos=True), len(lm.token_ids(PROMPTS[i], bos=True))
        logits = lm.logits(torch.tensor([ids + row]))[0]
        for step in range(len(row)):
            plain = logits[n - 1 + step]
            p, q = plain.log_softmax(-1), (plain + pull(2 * size)).log_softmax(-1)
            kl = float((p.exp() * (p - q)).sum())
            assert float(got.kl[i, step, 0]) == pytest.approx(kl, rel=1e-3, abs=1e-5)
            a = float(got.strengths[i, step, 0])
            assert a == pytest.approx(min(kl, 2.0), rel=1e-3, abs=1e-5)
            assert row[step] == int((plain + a * pull(size)).argmax())
    assert count_hooks(lm.model) == 0


def test_nothing_to_steer_by_is_plain_generation() -> None:
    lm = with_text("llama")
    plain = lm.generate(PROMPTS, max_new_tokens=6)
    for zero in ({"logits": VectorEdit(pull(0.0))}, {"blocks.1.hook_resid_post": VectorEdit(torch.zeros(16))}):
        got = KLControl(properties=[zero]).generate(lm, PROMPTS, max_new_tokens=6)
        assert torch.equal(got.generation.tokens, plain.tokens)
        assert float(got.strengths.abs().max()) == 0


def test_the_strength_falls_once_the_property_is_in_the_text() -> None:
    lm = with_text("llama")
    got = KLControl(properties=[{"logits": Wanted(30.0)}]).generate(lm, PROMPTS, max_new_tokens=6)
    for i, row in enumerate(rows_of(got.generation)):
        assert row[0] == TOKEN
        for step in range(1, len(row)):
            lacking = row[step - 1] != TOKEN
            assert (float(got.strengths[i, step, 0]) == 2.0) == lacking
            assert (float(got.strengths[i, step, 0]) == 0.0) == (not lacking)


def reread(lm: LanguageModel, control: KLControl, vectors: list[Tensor], hook: str, i: int, row: list[int]) -> None:
    """Every strength of a row from whole texts read without a cache, each position under its own strengths."""
    st, prompt = Steerer(lm), lm.token_ids(PROMPTS[i], bos=True)
    n = len(prompt)
    used: list[Tensor] = []
    for step in range(len(row)):
        ids = torch.tensor([prompt + row[:step]])
        plain = lm.logits(ids)[:, -1]
        strengths = []
        for v in vectors:
            with st.vector(2.0 * v, hook=hook, scope=f"{n - 1}:"):
                strengths.append(control.strength(plain, lm.logits(ids)[:, -1])[0])
        used.append(torch.stack([a * v for a, v in zip(strengths, vectors)]).sum(0))
        each = torch.zeros(1, len(prompt) + step, lm.d_model)
        each[0, n - 1 :] = torch.stack(used)
        with lm.edit(hook, lambda h, fwd, each=each: h + each):
            real = lm.logits(ids)[0, -1]
        assert int(real.argmax()) == row[step], f"row {i}, step {step}"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_properties_through_caches_are_what_whole_texts_say(family: str) -> None:
    lm, hook = with_text(family), "blocks.1.hook_resid_post"
    generator = torch.Generator().manual_seed(5)
    vectors = [torch.randn(lm.d_model, generator=generator) * 2 for _ in range(2)]
    control = KLControl(properties=[{hook: VectorEdit(v)} for v in vectors], top_p=0.8)
    got = control.generate(lm, PROMPTS, max_new_tokens=6)
    assert got.strengths.shape == (3, got.generation.new_tokens.shape[1], 2)
    assert rows_of(got.generation) != rows_of(lm.generate(PROMPTS, max_new_tokens=6))
    for i, row in enumerate(rows_of(got.generation)):
        reread(lm, control, vectors, hook, i, row)
        alone = control.generate(lm, PROMPTS[i], max_new_tokens=6)
        assert rows_of(alone.generation) == [row]
        torch.testing.assert_close(alone.strengths[0, : len(row)], got.strengths[i, : len(row)], rtol=1e-3, atol=1e-4)
        assert float(got.strengths[i, len(row) :].abs().sum()) == 0
    assert got.mean_strength.shape == (2,)


def test_samples_are_seeded() -> None:
    lm = with_text("llama")
    control = KLControl(properties=[{"logits": VectorEdit(pull(1.0))}])
    a, b, c = (control.generate(lm, PROMPTS, max_new_tokens=6, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.generation.tokens, b.generation.tokens)
    assert not torch.equal(a.generation.tokens, c.generation.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"properties": []}, "at least one property"),
        ({"properties": [{}], "strongest": 0.0}, "strongest must be above 0"),
        ({"properties": [{}], "top_p": 1.5}, "top_p must lie in"),
    ],
)
def test_wrong_settings(settings: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        KLControl(**settings)
