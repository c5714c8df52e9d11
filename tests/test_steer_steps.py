"""Vectors with a row for each generated step: read from answers, added where each token is generated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runtime_contract import check_contract, check_off
from support.tiny_models import D, with_text
from torch import Tensor

from steersman import SteeringVector
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import Steerer, contrast
from steersman.steer.edits import PositionEdit, StepEdit
from steersman.steer.edits.file import EditSet

HOOK, HEADS = "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"
PROMPTS = ["w5 w6", "w7 w8 w9", "w10 w11"]
POSITIVE = [("w50 " + p, a) for p, a in zip(PROMPTS, (" w30 w31 w32", " w32", " w33 w34"))]
NEGATIVE = [("w51 " + p, a) for p, a in zip(PROMPTS, (" w40", " w41 w42", " w43 w44 w45 w46"))]
G = torch.Generator().manual_seed(0)


def steps(lm: LanguageModel, prompt: str, answer: str, hook: str) -> Tensor:
    """[steps, D]: from the last token of the prompt on."""
    ids = torch.tensor([lm.token_ids(prompt + answer, bos=True)])
    start = len(lm.token_ids(prompt, bos=True)) - 1
    return lm.capture(ids, hooks=[hook])[hook][0, start:]


@pytest.mark.parametrize("method", ["diffmean", "caa", "style"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_table_by_hand(lm: LanguageModel, method: str, batch_size: int) -> None:
    """Row i is the difference of the means at step i, over the answers that reach it, at several hook points."""
    v = contrast(lm, POSITIVE, NEGATIVE, hook=[HOOK, HEADS], method=method, table=10, batch_size=batch_size)
    assert v.per == "step"
    for hook in (HOOK, HEADS):
        sides = [[steps(lm, *e, hook) for e in side] for side in (POSITIVE, NEGATIVE)]
        expected = []
        for i in range(4):  # no positive answer has a step 4
            means = [torch.stack([s[i] for s in side if len(s) > i]).mean(0) for side in sides]
            expected.append(means[0] - means[1])
        torch.testing.assert_close(v.directions[hook], torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert v.metadata["found"][hook]["samples_per_step"] == [[3, 3], [3, 3], [2, 2], [1, 1]]
        assert v.metadata["diagnostics"][hook]["steps"] == 4
    short = contrast(lm, POSITIVE, NEGATIVE, hook=HOOK, method=method, table=2)
    torch.testing.assert_close(short.directions[HOOK], v.directions[HOOK][:2])


def test_a_step_at_which_the_sides_are_alike_is_not_steered(lm: LanguageModel) -> None:
    """Two answers to one prompt: nothing differs before the first token of the answer."""
    same = [(p, " w30 w31") for p in PROMPTS], [(p, " w40 w41") for p in PROMPTS]
    v = contrast(lm, *same, hook=HOOK, table=3)
    assert v.directions[HOOK][0].equal(torch.zeros(D))
    assert v.directions[HOOK][1].norm() > 0
    with Steerer(lm).vector(v) as steering:
        lm.generate(["w5 w6"], max_new_tokens=5)
    assert steering.trace.pairs() == [(0, 3), (0, 4)], "steps 1 and 2 of a prompt of three tokens"


def test_rows_are_added_step_by_step(lm: LanguageModel) -> None:
    table = torch.randn(3, D, generator=G)
    v = SteeringVector.of(table, hook_name=HOOK, per="step")
    ids = torch.tensor([[0, 5, 6, 7, 8, 9, 10], [0, 15, 16, 17, 18, 19, 20]])
    clean = lm.capture(ids, hooks=[HOOK])[HOOK]
    with Steerer(lm).vector(v, scale=[1.0, -2.0]):
        steered = lm.capture(ids, hooks=[HOOK], prompt_length=[3, 4])[HOOK]
    expected = clean.clone()
    expected[0, 2:5] += table
    expected[1, 3:6] -= 2 * table
    torch.testing.assert_close(steered, expected)
    untouched = torch.ones(2, 7, dtype=torch.bool)
    untouched[0, 2:5] = untouched[1, 3:6] = False
    assert steered[untouched].equal(clean[untouched])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_runtime_contract(family: str) -> None:
    lm = with_text(family)
    v = SteeringVector.of(3 * torch.randn(4, D, generator=G), hook_name=HOOK, per="step")
    check_contract(lm, lambda rows: Steerer(lm).vector(v, scale=[(1.0, -2.0, 0.5)[i] for i in rows]))
    check_off(lm, Steerer(lm).vector(v, scale=0.0))


def test_arithmetic_and_files(tmp_path: Path) -> None:
    table, positions = torch.randn(3, D, generator=G), torch.randn(2, D, generator=G)
    v = SteeringVector.of(table, hook_name=HOOK, per="step")
    assert (2 * v).per == (v + v).per == (-v).per == v.random_like().per == v.at(HOOK).per == "step"
    v.save(tmp_path / "v.safetensors")
    again = SteeringVector.load(tmp_path / "v.safetensors")
    assert (again.per, again.positions) == ("step", 3)
    assert again.directions[HOOK].equal(table)
    assert b'"version":"2"' in (tmp_path / "v.safetensors").read_bytes()
    by_position = SteeringVector.of(positions, hook_name=HOOK)
    by_position.save(tmp_path / "p.safetensors")
    assert b'"version":"1"' in (tmp_path / "p.safetensors").read_bytes()
    assert SteeringVector.load(tmp_path / "p.safetensors").per == "position"
    for combine in (lambda: v + by_position, lambda: v.dot(by_position), lambda: v.cosine(by_position)):
        with pytest.raises(SteersmanError, match="per position and the other per generated step"):
            combine()
    assert v.mean_over_positions().vector.equal(table.mean(0))
    elsewhere = SteeringVector.of(torch.ones(D), hook_name="blocks.0.hook_resid_post")
    assert (elsewhere + v).per == "step"
    with pytest.raises(SteersmanError, match="3 steps"):
        _ = v.vector
    with pytest.raises(SteersmanError, match="per position or per step, got 'token'"):
        SteeringVector.of(table, hook_name=HOOK, per="token")
    with pytest.raises(SteersmanError, match="mean_over_positions"):
        v.save(tmp_path / "v.gguf")


@pytest.mark.parametrize("kind", [PositionEdit, StepEdit])
def test_edits_in_files(lm: LanguageModel, tmp_path: Path, kind: Any) -> None:
    edit = kind(torch.randn(3, D, generator=G), [0.5, 2.0])
    EditSet(edits={HOOK: edit}).save(tmp_path / "e.safetensors")
    again = EditSet.load(tmp_path / "e.safetensors")[HOOK]
    assert type(again) is kind
    ids = torch.tensor([[0, 5, 6, 7], [0, 15, 16, 17]])
    outs = []
    for each in (edit, again):
        with Steerer(lm).edit(HOOK, each):
            outs.append(lm.logits(ids, prompt_length=2))
    assert outs[0].equal(outs[1])
    assert not outs[0].equal(lm.logits(ids))
