"""Gates and schedules: how much of an edit acts, per row, token and generated step; and edits in files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runtime_contract import PROMPTS, check_contract, check_off
from support.tiny_models import D, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.steer import Edit, EditSet, Gate, LogitsEdit, Schedule, Scope, Steerer, calibrate, steered
from steersman.steer.edits import AttentionBiasEdit, GatedEdit, PositionEdit, RowGate, VectorEdit, gated

HOOK = "blocks.1.hook_resid_post"
VECTOR = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return with_text(request.param)


class Positive(Gate):
    """1 where h points along v, else 0."""

    def value(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        return (h.float() @ VECTOR > 0).float()


class SeenEarlier(Gate):
    """1 where the state after block 0 has a positive first entry."""

    def readers(self, lm: LanguageModel, point: Any) -> dict[str, Any]:
        return {"blocks.0.hook_resid_post": self.look}

    def look(self, h: Tensor, fwd: ForwardPass) -> None:
        self.seen = (h[..., 0] > 0).float()

    def value(self, h: Tensor, fwd: ForwardPass) -> Tensor:
        return self.seen


@pytest.mark.parametrize(
    "gate", [Positive, SeenEarlier, lambda: [Positive(), Schedule([1.0, 0.5])]], ids=["token", "earlier", "several"]
)
def test_gates_keep_the_runtime_contract(lm: LanguageModel, gate: Any) -> None:
    check_contract(lm, lambda rows: Steerer(lm).vector(VECTOR, hook=HOOK, gate=gate()))


def test_schedules_keep_the_runtime_contract(lm: LanguageModel) -> None:
    table = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [0.5, -1.0, 0.0]])
    scope = "last_prompt+generation"
    check_contract(
        lm, lambda rows: Steerer(lm).vector(VECTOR, hook=HOOK, scope=scope, schedule=table[list(rows)]), acts=True
    )


def test_a_gate_of_zero_changes_no_bit_and_leaves_no_trace(lm: LanguageModel) -> None:
    for closed in (RowGate(0.0), Schedule([0.0]), [Positive(), RowGate(0.0)]):
        steering = Steerer(lm).vector(VECTOR, hook=HOOK, gate=closed)
        check_off(lm, steering)
        assert steering.trace.count == 0


def test_the_trace_is_of_the_tokens_whose_gate_is_open(lm: LanguageModel) -> None:
    batch = lm.encode(list(PROMPTS))
    states = lm.capture(batch.input_ids, batch.attention_mask, hooks=[HOOK])[HOOK]
    with Steerer(lm).vector(VECTOR, hook=HOOK, gate=Positive()) as steering:
        new = lm.capture(batch.input_ids, batch.attention_mask, hooks=[HOOK])[HOOK]
    open_ = (states @ VECTOR > 0) & batch.attention_mask.bool()
    open_[:, 0] = False  # the BOS
    assert steering.trace.pairs() == [(int(r), int(c)) for r, c in open_.nonzero()]
    changed = (new != states).any(-1)
    assert changed.equal(open_)
    assert bool(open_.any())
    torch.testing.assert_close(new[open_], states[open_] + VECTOR)


def test_a_schedule_counts_from_the_token_that_chooses_the_first_one(lm: LanguageModel) -> None:
    steps: list[list[int]] = []

    def look(h: Tensor, fwd: ForwardPass) -> Tensor:
        steps.append(fwd.steps[0].tolist())
        return h

    with lm.edit(HOOK, look):
        lm.generate(["w5 w6 w7"], max_new_tokens=3)
    assert steps == [[-3, -2, -1, 0], [1], [2]]  # with the BOS
    start, last = (
        Steerer(lm).vector(VECTOR, hook=HOOK, scope=scope, schedule=table)
        for scope, table in (("last_prompt+generation", "start"), ("last_prompt", None))
    )
    assert _texts(lm, start) == _texts(lm, last)
    assert start.trace.pairs() == last.trace.pairs()
    assert Schedule.of("diminishing:4").table.tolist() == [[1.0, 0.75, 0.5, 0.25, 0.0]]


def _texts(lm: LanguageModel, steering: Any) -> list[str]:
    with steering:
        return lm.generate(list(PROMPTS), max_new_tokens=6).texts


def test_unions_of_scopes(lm: LanguageModel) -> None:
    def pairs(scope: str) -> set[tuple[int, int]]:
        steering = Steerer(lm).vector(VECTOR, hook=HOOK, scope=scope)
        _texts(lm, steering)
        return set(steering.trace.pairs())

    with pytest.raises(SteersmanError, match="unknown scope 'nowhere'"):
        Scope.of("prompt+nowhere")
    both = Steerer(lm).vector(VECTOR, hook=HOOK, scope="prompt+generation")
    whole = Steerer(lm).vector(VECTOR, hook=HOOK)
    assert _texts(lm, both) == _texts(lm, whole)
    assert both.trace.pairs() == whole.trace.pairs()
    window = Steerer(lm).vector(VECTOR, hook=HOOK, scope="1:2+2:3")
    assert _texts(lm, window) == _texts(lm, Steerer(lm).vector(VECTOR, hook=HOOK, scope="1:3"))
    assert pairs("last_prompt") <= pairs("last_prompt+1:2")


@pytest.mark.parametrize(
    "edit",
    [
        VectorEdit(VECTOR, [1.0, 2.0, -1.0]),
        PositionEdit(torch.stack([VECTOR, -VECTOR])),
        gated(VectorEdit(VECTOR), [RowGate([1.0, 0.0, 0.5])], schedule=[1.0, 0.5]),
        VectorEdit(VECTOR).scaled(2.0),
        Edit.scaled(VectorEdit(VECTOR), 0.5),
    ],
    ids=["vector", "positions", "gated", "stronger", "scaled"],
)
def test_edits_come_back_from_files(lm: LanguageModel, edit: Edit, tmp_path: Path) -> None:
    kept = EditSet(edits={HOOK: edit}, scope="prompt", model_name=lm.name, method="mine", metadata={"source": "here"})
    kept.save(tmp_path / "e.safetensors")
    again = EditSet.load(tmp_path / "e.safetensors")
    assert (again.scope, again.model_name, again.method, again.metadata) == ("prompt", lm.name, "mine", kept.metadata)
    assert type(again[HOOK]) is type(edit)
    batch = lm.encode(list(PROMPTS))
    with steered(kept, lm):
        wanted = lm.logits(batch.input_ids, batch.attention_mask)
    with steered(again, lm):
        assert lm.logits(batch.input_ids, batch.attention_mask).equal(wanted)
    assert not wanted.equal(lm.logits(batch.input_ids, batch.attention_mask))


def test_edits_of_logits_and_attention_come_back_from_files(tmp_path: Path) -> None:
    edits = {
        "logits": LogitsEdit({15: 2.0, 27: -float("inf")}, 0.5),
        "blocks.0.hook_attn_mask": AttentionBiasEdit(-2.0, [(1, 3), (5, None)], heads=[1]),
        "blocks.1.hook_attn_mask": AttentionBiasEdit(-float("inf"), torch.tensor([0, 1, 1]) > 0),
    }
    EditSet(edits=edits).save(tmp_path / "e.safetensors")
    again = EditSet.load(tmp_path / "e.safetensors")
    for hook, edit in edits.items():
        a, b = edit.saved(), again[hook].saved()
        assert a.settings == b.settings
        assert a.tensors.keys() == b.tensors.keys()
        assert all(a.tensors[name].equal(b.tensors[name]) for name in a.tensors)


def test_edits_in_files_are_dosed_and_calibrated_like_vectors(lm: LanguageModel) -> None:
    kept = EditSet(edits={HOOK: gated(VectorEdit(VECTOR), Positive())}, metadata={"source": "here"})
    found = calibrate(kept, lm, texts=["w5 w6 w7 w8 w9 w10"], target_kl=0.01)
    assert found.search.converged
    assert isinstance(found.vector, EditSet)
    assert found.vector.metadata["calibration"]["budget"] == "kl"
    assert found.vector.metadata["source"] == "here"


def test_what_is_no_file_of_edits(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(SteersmanError, match="Positive says no way to keep it in a file"):
        EditSet(edits={HOOK: GatedEdit(VectorEdit(VECTOR), [Positive()])}).save(path)
    assert not path.exists()
    with pytest.raises(SteersmanError, match="no edit to save"):
        EditSet(edits={}).save(path)
    EditSet(edits={HOOK: VectorEdit(VECTOR)}, model_name="other/model").save(path)
    with pytest.raises(SteersmanError, match="this edit was made for 'other/model'"):
        steered(EditSet.load(path), lm)
    from steersman.steer import SteeringVector

    SteeringVector.of(VECTOR, hook_name=HOOK).save(path)
    with pytest.raises(SteersmanError, match="holds no edits: its header names 'steersman.vector'"):
        EditSet.load(path)


@pytest.mark.parametrize("given", ["later", "diminishing:0", [], [[1.0], [float("nan")]]])
def test_what_is_no_schedule(given: Any) -> None:
    with pytest.raises(SteersmanError, match="schedule"):
        Schedule.of(given)
