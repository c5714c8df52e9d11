"""`psr`: a gated vector that is taught by a prompt, and by planted ways of steering."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runtime_contract import check_contract, check_off
from support.tiny_models import D, V, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import (
    DirectionEdit,
    EditSet,
    Imitated,
    Steerer,
    TrainEditConfig,
    prompted_answers,
    psr,
    steered,
)

HOOK = "blocks.1.hook_resid_post"
FULL = TrainEditConfig(lr=0.1, epochs=150, batch_size=32, full_batch=True, schedule="cosine", keep="best")
G = torch.Generator().manual_seed(2)


def words(n: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(4, V, (n,), generator=G).tolist())


ITEMS = [Imitated(prompt=p, teacher=p, answer=" " + words(6)) for p in (words(3) for _ in range(12))]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return with_text("llama")


def parts(edits: EditSet) -> tuple[Tensor, float, Tensor]:
    """w, b and z."""
    edit = edits[HOOK]
    assert isinstance(edit, DirectionEdit)
    return edit.read.weight[0, 0], float(edit.read.bias[0, 0]), edit.write[0, 0]  # pyright: ignore


def answers(lm: LanguageModel) -> Tensor:
    """States at the hook point on the answers, [tokens, D]."""
    found = []
    for item in ITEMS:
        ids = torch.tensor([lm.token_ids(item.prompt + item.answer, bos=True)])
        found.append(lm.capture(ids, hooks=[HOOK])[HOOK][0, -6:])
    return torch.cat(found)


def test_a_planted_gate_is_recovered(lm: LanguageModel) -> None:
    """The teacher is relu(h . w + b) z: the student has its w and z, and its loss goes to 0."""
    h = answers(lm)
    w = torch.randn(D, generator=G)
    w = w / (h @ w).std()
    z = torch.randn(D, generator=G)
    bias = float(-(h @ w).median())  # open at half of the tokens
    planted = DirectionEdit((w, bias), 0.3 * z, rule="probe")
    made = psr(lm, ITEMS, hook=HOOK, teaching=lambda: Steerer(lm).edit(HOOK, planted), config=FULL)
    found, _, written = parts(made)
    assert torch.cosine_similarity(found, w, dim=0) > 0.95
    assert torch.cosine_similarity(written, z, dim=0) > 0.95
    assert made.metadata["loss"] < 0.01 * made.metadata["loss_unsteered"]


def test_a_constant_teacher_opens_the_gate_everywhere(lm: LanguageModel) -> None:
    v = 0.5 * torch.randn(D, generator=G)
    made = psr(lm, ITEMS, hook=HOOK, teaching=lambda: Steerer(lm).vector({HOOK: v}), config=FULL)
    w, b, z = parts(made)
    gate = answers(lm) @ w + b
    assert bool((gate > 0).all())
    assert torch.cosine_similarity(z, v, dim=0) > 0.99
    assert made.metadata["loss"] < 0.01 * made.metadata["loss_unsteered"]


def test_where_the_prompt_does_nothing_nothing_is_learnt(lm: LanguageModel) -> None:
    made = psr(lm, ITEMS, hook=[HOOK, "blocks.2.hook_resid_post"], config=TrainEditConfig(epochs=2, batch_size=8))
    assert list(made) == [HOOK, "blocks.2.hook_resid_post"]
    assert parts(made)[2].equal(torch.zeros(D))
    assert made.metadata["loss"] == made.metadata["loss_unsteered"] == 0


@pytest.mark.parametrize("loss", ["imitation", "likelihood"])
def test_the_prompt_is_learnt(lm: LanguageModel, loss: Any, tmp_path: Path) -> None:
    """From answers of the prompted model; through files, scopes, scales and the runtime contract."""
    prompts = [words(3) for _ in range(12)]
    items = prompted_answers(lm, prompts, "w7 w7 w8 w9 ", max_new_tokens=5, do_sample=True, seed=0)
    assert all(item.teacher == "w7 w7 w8 w9 " + item.prompt and item.answer for item in items)
    config = TrainEditConfig(lr=0.02, epochs=20, batch_size=6)
    made = psr(lm, items, hook=HOOK, loss=loss, config=config)
    assert made.metadata["loss"] < made.metadata["loss_unsteered"] - 0.03
    made.save(tmp_path / "e.safetensors")
    again = EditSet.load(tmp_path / "e.safetensors")
    ids = lm.encode(prompts[:2]).input_ids
    outs = []
    for edits in (made, again):
        with steered(edits, lm, scale=[1.0, 2.0]):
            outs.append(lm.logits(ids))
    assert outs[0].equal(outs[1])
    check_contract(lm, lambda _rows: steered(again, lm, scale=2.0), acts=False)
    check_off(lm, steered(again, lm, scale=0.0))


def test_a_marked_answer_is_taught_at_its_strength(lm: LanguageModel) -> None:
    """Answers marked 0 are the unsteered model's, whatever the edit: their teacher has nothing to teach."""
    v = 0.5 * torch.randn(D, generator=G)
    half = [Imitated(prompt=i.prompt, teacher=i.prompt, answer=i.answer, strength=0.5) for i in ITEMS]
    made = psr(lm, half, hook=HOOK, teaching=lambda: Steerer(lm).vector({HOOK: v}), config=FULL)
    w, b, z = parts(made)
    push = (answers(lm) @ w + b).relu().mean() * z
    torch.testing.assert_close(push, 2 * v, rtol=0.1, atol=0.05)


def test_wrong_input(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match="unknown loss 'mse': use imitation or likelihood"):
        psr(lm, ITEMS, hook=HOOK, loss="mse")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SteersmanError, match="no answers to imitate"):
        psr(lm, [], hook=HOOK)
    with pytest.raises(SteersmanError, match="prompts that are texts or conversations, not token ids"):
        psr(lm, [Imitated(prompt=[0, 5], teacher=[0, 6, 5], answer=" w7")], hook=HOOK, loss="likelihood")
