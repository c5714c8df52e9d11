"""Gates that look at the model: per token, and per row, decided while the prompt is read (CAST)."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runtime_contract import PROMPTS, check_contract, check_off, rows_of
from support.tiny_models import D, toy_sae, with_text
from torch import Tensor

from steersman.demo import CONCEPTS, MODEL_PATH, concept_labels, stories
from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.lm.session import Session
from steersman.sae import SAE
from steersman.steer import (
    AnyOf,
    Condition,
    DirectionEdit,
    EditSet,
    Feature,
    Gate,
    LogitsEdit,
    Probe,
    Projection,
    Steerer,
    TanhSimilarity,
    TokenGate,
    steered,
)
from steersman.steer.edits import FeatureEdit, Linear, gated
from steersman.steer.methods.logistic import fit_logistic

EARLY, HOOK, LATE = (f"blocks.{i}.hook_resid_post" for i in range(3))
G = torch.Generator().manual_seed(1)
VECTOR, C = torch.randn(D, generator=G) * 3, torch.randn(D, generator=G)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return with_text(request.param)


def readings(lm: LanguageModel, hook: str = EARLY) -> Tensor:
    """The mean of h . c / |c| over the tokens of each of PROMPTS."""
    batch = lm.encode(list(PROMPTS))
    h = lm.capture(batch.input_ids, batch.attention_mask, hooks=[hook])[hook]
    keep = batch.attention_mask.bool()
    keep[:, 0] = False
    rho = h @ C / C.norm()
    return torch.stack([row[mask].mean() for row, mask in zip(rho, keep)])


def condition(lm: LanguageModel, hook: str = EARLY, **settings: Any) -> tuple[Condition, list[float]]:
    """A condition that one of PROMPTS does not meet, and its gates."""
    rho = readings(lm, hook)
    low, middle, _ = rho.sort().values.tolist()
    threshold = (low + middle) / 2
    return Condition(hook, Projection(C), threshold, **settings), (rho > threshold).float().tolist()


PLACES = [("later_layers", EARLY), ("none", EARLY), ("none", LATE), ("second_pass", EARLY), ("second_pass", LATE)]


@pytest.mark.parametrize(("prompt", "place"), PLACES)
def test_conditions_keep_the_runtime_contract(lm: LanguageModel, prompt: Any, place: str) -> None:
    def steering(rows: Any) -> Any:
        return Steerer(lm).vector(VECTOR, hook=HOOK, gate=condition(lm, place, prompt=prompt)[0])

    check_contract(lm, steering)


@pytest.mark.parametrize(("prompt", "place"), PLACES)
@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 2}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["whole", "chunks", "beams"],
)
def test_a_condition_is_a_gate_per_row_that_is_found_out(
    lm: LanguageModel, prompt: Any, place: str, options: dict[str, Any]
) -> None:
    """What it decides, given by hand, steers the same tokens, with the prompt read in one pass or in chunks."""
    gate, gates = condition(lm, place, prompt=prompt)
    assert sorted(gates) == [0.0, 1.0, 1.0]
    scope = "generation" if prompt == "none" else "all"
    by_hand = Steerer(lm).vector(VECTOR, hook=HOOK, gate=gates, scope=scope)
    found = Steerer(lm).vector(VECTOR, hook=HOOK, gate=gate)
    alike = {} if "prefill_chunk_size" in options else options
    expected = rows_of(lm, PROMPTS, by_hand, **alike)
    assert rows_of(lm, PROMPTS, found, **options) == expected
    assert expected != rows_of(lm, PROMPTS, Steerer(lm).vector(VECTOR, hook=HOOK, scope=scope), **alike)
    assert found.trace.pairs() == by_hand.trace.pairs()
    each = len(found.trace.rows) // len(gates)
    assert [count > 0 for count in found.trace.rows[::each]] == [g > 0 for g in gates]


@pytest.mark.parametrize("prompt", ["later_layers", "second_pass"])
def test_one_condition_for_edits_at_several_layers(lm: LanguageModel, prompt: Any) -> None:
    gate, gates = condition(lm, prompt=prompt)
    both: dict[str | int, Any] = {HOOK: VECTOR, LATE: C}
    expected = rows_of(lm, PROMPTS, Steerer(lm).vector(both, gate=gates))
    assert rows_of(lm, PROMPTS, Steerer(lm).vector(both, gate=gate)) == expected
    batch = lm.encode(list(PROMPTS))
    with Steerer(lm).vector(both, gate=gates):
        wanted = lm.logits(batch.input_ids, batch.attention_mask)
    with Steerer(lm).vector(both, gate=gate):
        for _ in range(2):  # each pass is a text of its own
            assert lm.logits(batch.input_ids, batch.attention_mask).equal(wanted)


def test_a_condition_that_is_not_met_changes_no_bit(lm: LanguageModel) -> None:
    for prompt, place in PLACES:
        check_off(lm, Steerer(lm).vector(VECTOR, hook=HOOK, gate=Condition(place, C, 1e6, prompt=prompt)))  # pyright: ignore


@pytest.mark.parametrize("prompt", ["later_layers", "none", "second_pass"])
def test_teacher_forcing_decides_by_the_prompt_alone(lm: LanguageModel, prompt: Any) -> None:
    gate, gates = condition(lm, prompt=prompt)
    out = lm.generate(list(PROMPTS), max_new_tokens=4, eos_token_id=None)
    given = (out.tokens, out.attention_mask)
    scope = "generation" if prompt == "none" else "all"
    with Steerer(lm).vector(VECTOR, hook=HOOK, gate=gates, scope=scope):
        expected = lm.logits(*given, prompt_length=out.prompt_length)
    with Steerer(lm).vector(VECTOR, hook=HOOK, gate=gate):
        got = lm.logits(*given, prompt_length=out.prompt_length)
    real = out.attention_mask.bool()
    assert got[real].equal(expected[real])


def planted(rows: Tensor) -> Any:
    """What puts the same state at every token of a row."""

    def run(h: Tensor, fwd: ForwardPass) -> Tensor:
        return rows[:, None].expand(-1, h.shape[1], -1) if fwd.phase == "prompt" else h

    return run


def decided(lm: LanguageModel, gate: Condition, rows: Tensor) -> list[bool]:
    batch = lm.encode(["w5 w6 w7"] * len(rows))
    with (
        lm.edit("blocks.0.hook_resid_pre", planted(rows)),
        Steerer(lm).vector(VECTOR, hook=HOOK, gate=gate) as steering,
    ):
        lm.logits(batch.input_ids, batch.attention_mask)
    return [count > 0 for count in steering.trace.rows]


def test_which_side_a_state_is_on() -> None:
    """The similarity as published calls -c what it calls c; a projection or a probe does not."""
    lm = with_text("llama")
    across = torch.randn(D, generator=G)
    across = across - (across @ C) / (C @ C) * C
    rows, place = torch.stack([C, -C, across]), "blocks.0.hook_resid_pre"
    assert decided(lm, Condition(place, Projection(C), 0.5), rows) == [True, False, False]
    assert decided(lm, Condition(place, (C, -1.0)), rows) == [True, False, False]
    assert decided(lm, Condition(place, Projection(C), -0.5, above=False), rows) == [False, True, False]
    published = TanhSimilarity(C)
    assert decided(lm, Condition(place, published, 0.9), rows) == [True, True, False]
    similarity = published.values(rows)[:, 0]
    expected = torch.cosine_similarity(C, torch.tanh(C), dim=0)
    torch.testing.assert_close(similarity, torch.stack([expected, expected, similarity[2]]))
    assert abs(float(similarity[2])) < 1e-3
    assert decided(lm, Condition(place, published, 0.9, pool="last"), rows) == [True, True, False]


def test_pools() -> None:
    lm = with_text("llama")
    batch = lm.encode(["w5 w6 w7"])
    place = "blocks.0.hook_resid_pre"
    rho = (lm.capture(batch.input_ids, hooks=[place])[place] @ C / C.norm())[0, 1:]
    for pool, value in (("mean", rho.mean()), ("last", rho[-1]), ("max", rho.max())):
        for off in (-1e-4, 1e-4):
            with Steerer(lm).vector(VECTOR, hook=HOOK, gate=Condition(place, C, float(value) + off, pool=pool)) as ctx:  # pyright: ignore
                lm.logits(batch.input_ids)
            assert (ctx.trace.count > 0) == (off < 0)


def test_a_condition_holds_for_the_copies_of_a_session() -> None:
    """It is decided in the prompt's pass, when there is one row for each prompt."""
    lm = with_text("llama")
    gate, gates = condition(lm)
    steering = Steerer(lm).vector(VECTOR, hook=HOOK, gate=gate)
    session = Session(lm, list(PROMPTS), copies=2, context=lambda: steering)
    by_hand = Session(lm, list(PROMPTS), copies=2, context=lambda: Steerer(lm).vector(VECTOR, hook=HOOK, gate=gates))
    for _ in range(3):
        assert session.logits.equal(by_hand.logits)
        chosen = by_hand.logits.argmax(-1)
        session.feed(chosen)
        by_hand.feed(chosen)
    forked, chosen = session.fork(lambda: steering), by_hand.logits.argmax(-1)
    assert forked.feed(chosen).equal(by_hand.feed(chosen))


def test_token_gates_keep_the_runtime_contract(lm: LanguageModel) -> None:
    sae, j, _ = half_active(lm)
    here, early = middle(lm, HOOK), middle(lm, EARLY)
    for gate in (
        lambda: TokenGate(C, here),
        lambda: TokenGate((C / C.norm(), -early), hook=EARLY),
        lambda: TokenGate(Feature(sae, j)),
        lambda: AnyOf([TokenGate(C, here + 0.05), TokenGate(C, early - 0.05, above=False, hook=EARLY)]),
    ):
        check_contract(lm, lambda rows, gate=gate: Steerer(lm).vector(VECTOR, hook=HOOK, gate=gate()))


def middle(lm: LanguageModel, hook: str) -> float:
    """A number with half of the readings h . c / |c| of PROMPTS on either side."""
    batch = lm.encode(list(PROMPTS))
    h = lm.capture(batch.input_ids, batch.attention_mask, hooks=[hook])[hook]
    rho = (h @ C / C.norm())[:, 1:][batch.attention_mask[:, 1:].bool()].sort().values
    return float(rho[len(rho) // 2 - 1 : len(rho) // 2 + 1].mean())


def half_active(lm: LanguageModel) -> tuple[SAE, int, Tensor]:
    """An SAE, the feature that is on in about half of the tokens of PROMPTS, and the codes of all."""
    batch = lm.encode(list(PROMPTS))
    h = lm.capture(batch.input_ids, batch.attention_mask, hooks=[HOOK])[HOOK]
    sae = toy_sae()
    with torch.no_grad():
        sae.W_enc.mul_(2 / h.norm(dim=-1).median())  # GPT-2's states are small
    codes = sae.encode(h)
    text = batch.attention_mask.bool()
    text[:, 0] = False
    return sae, int((codes[text] > 0).float().mean(0).sub(0.5).abs().argmin()), codes


def test_a_token_gate_opens_where_its_reading_says(lm: LanguageModel) -> None:
    batch = lm.encode(list(PROMPTS))
    given = (batch.input_ids, batch.attention_mask)
    states = lm.capture(*given, hooks=[EARLY, HOOK])
    text = batch.attention_mask.bool()
    text[:, 0] = False
    sae, j, active = half_active(lm)
    here, early = middle(lm, HOOK), middle(lm, EARLY)
    limit = here + torch.tensor([0.0, 0.05, -0.05])
    cases: list[tuple[Gate, Tensor]] = [
        (TokenGate(C, here), states[HOOK] @ C / C.norm() > here),
        (TokenGate(C, early, above=False, hook=EARLY), states[EARLY] @ C / C.norm() < early),
        (TokenGate((C, -here * C.norm()), hook=HOOK), states[HOOK] @ C - here * C.norm() > 0),
        (TokenGate(Feature(sae, j)), active[..., j] > 0),
        (TokenGate(C, limit), states[HOOK] @ C / C.norm() > limit[:, None]),
        (TokenGate(torch.stack([C, -C, C]), hook=EARLY), states[EARLY] @ C * torch.tensor([1, -1, 1])[:, None] > 0),
    ]
    for gate, expected in cases:
        with Steerer(lm).vector(VECTOR, hook=HOOK, gate=gate) as steering:
            got = lm.capture(*given, hooks=[HOOK])[HOOK]
        open_ = expected & text
        assert (got != states[HOOK]).any(-1).equal(open_)
        assert 0 < int(open_.sum()) < int(text.sum())
        assert steering.trace.count == int(open_.sum())


def test_logits_may_be_gated_by_a_state(lm: LanguageModel) -> None:
    """Where the prompt's logits are computed for the last token alone, the gate is that token's."""
    gate = TokenGate(C, hook=EARLY)
    whole = lm.encode(list(PROMPTS))
    states = lm.capture(whole.input_ids, whole.attention_mask, hooks=[EARLY])[EARLY]
    last = [bool(states[i, n - 1] @ C > 0) for i, n in enumerate(whole.lengths.tolist())]
    with Steerer(lm).edit("logits", LogitsEdit({7: 1e4}), gate=gate):
        out = lm.generate(list(PROMPTS), max_new_tokens=1)
    assert [token == 7 for token in out.new_tokens[:, 0].tolist()] == last


@pytest.mark.parametrize("keep", [{"keep_norm": True}, {"rule": "rotate", "write": VECTOR, "value": 60.0}])
def test_gates_multiply_the_strength_where_the_norm_is_kept(lm: LanguageModel, keep: dict[str, Any]) -> None:
    st = Steerer(lm)
    batch = lm.encode(list(PROMPTS))
    given = (batch.input_ids, batch.attention_mask)
    h = lm.capture(*given, hooks=[HOOK])[HOOK]

    def states(**options: Any) -> Tensor:
        with st.direction(HOOK, read=C, **keep, **options):
            return lm.capture(*given, hooks=[HOOK])[HOOK]

    half = states(schedule=[0.5])
    torch.testing.assert_close(half.norm(dim=-1), h.norm(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(half, states(gate=0.5), rtol=1e-6, atol=1e-6)
    assert states(schedule=[0.0]).equal(h)
    check_contract(
        lm, lambda rows: st.direction(HOOK, read=C, gate=TokenGate(C, hook=EARLY), schedule=[1, 0.5], **keep)
    )


def test_a_gate_touches_the_tokens_of_a_concept_and_no_others() -> None:
    """On the bundled model every token is labelled: precision and recall of what a probe's gate lets an edit change."""
    lm, column = LanguageModel.load(str(MODEL_PATH)), list(CONCEPTS).index("snow")
    drawn = [s for s in islice(stories(8), 900) if any(concept == "snow" for *_, concept in s.spans)][:48]
    assert len(drawn) == 48
    hook, changed, states, labels = "blocks.2.hook_resid_post", [], [], []
    for story in drawn:
        encoded = lm.tokenizer(story.text, add_special_tokens=False, return_offsets_mapping=True)
        labels.append(torch.from_numpy(concept_labels(story.spans, encoded["offset_mapping"]))[:, column])
        ids = lm.encode([story.text]).input_ids
        states.append(lm.capture(ids, hooks=[hook])[hook][0, -len(labels[-1]) :])
    x, y = torch.cat(states[:24]), torch.cat(labels[:24])
    fitted = fit_logistic(lambda: [(x[:, None], y)], l2=1e-3)
    gate = TokenGate((fitted.weight[0].float(), float(fitted.bias[0])))
    with Steerer(lm).vector(torch.ones(lm.d_model), hook=hook, gate=gate):
        for story, before in zip(drawn[24:], states[24:]):
            after = lm.capture(lm.encode([story.text]).input_ids, hooks=[hook])[hook][0, -len(before) :]
            changed.append((after != before).any(-1))
    moved, wanted = torch.cat(changed), torch.cat(labels[24:])
    hits = int((moved & wanted).sum())
    assert hits > 0.95 * int(moved.sum())
    assert hits > 0.95 * int(wanted.sum()) > 30


def edits() -> dict[str, Any]:
    sae = toy_sae()
    span = Projection.span([C, VECTOR])
    return {
        "floor": DirectionEdit(C, rule="floor", value=[0.5, 1.0, -float("inf")]),
        "probe": DirectionEdit(Probe(C, 0.3, hook_name=HOOK), VECTOR, rule="probe", value=torch.arange(6.0).view(3, 2)),
        "mirror": DirectionEdit(C, rule="mirror", value=1.5, threshold=-float("inf")).scaled(0.5),
        "span": DirectionEdit(span, rule="cap", value=torch.tensor([[[0.2, 0.3]]])),
        "norm": DirectionEdit(C, value=0.4, keep_norm="opposed"),
        "rotate": DirectionEdit(C, VECTOR, rule="rotate", value=40.0),
        "reading": DirectionEdit(Feature(sae, 3), VECTOR, rule="set", value=2.0),
        "feature": FeatureEdit(sae, [{3: 2.0}, {5: 1.0}, {}], mode="clamp", gate=0.5),
        "projected": FeatureEdit(sae, {3: 1.0, 9: 0.5}, mode="project_out"),
        "below": FeatureEdit(sae, {3: 1.0}, mode="set_if_below", threshold=0.5),
        "condition": gated(DirectionEdit(C), Condition(EARLY, (C, 0.1), prompt="second_pass", pool="last")),
        "published": gated(DirectionEdit(C), Condition(EARLY, TanhSimilarity(C), 0.2)),
        "either": gated(DirectionEdit(C), AnyOf([TokenGate(C, 0.3), TokenGate(Linear(C[None, None]), hook=EARLY)])),
        "gated norm": gated(DirectionEdit(C, value=0.4, keep_norm=True), TokenGate(C, 0.3), schedule=[1.0, 0.5]),
    }


@pytest.mark.parametrize("name", list(edits()))
def test_edits_come_back_from_files(name: str, tmp_path: Path) -> None:
    lm = with_text("llama")
    EditSet(edits={HOOK: edits()[name]}).save(tmp_path / "e.safetensors")
    again = EditSet.load(tmp_path / "e.safetensors")
    batch = lm.encode(list(PROMPTS))
    with steered({HOOK: edits()[name]}, lm):
        wanted = lm.logits(batch.input_ids, batch.attention_mask)
    with steered(again, lm):
        assert lm.logits(batch.input_ids, batch.attention_mask).equal(wanted)
    assert type(again[HOOK]) is type(edits()[name])
    if name != "mirror":
        assert not wanted.equal(lm.logits(batch.input_ids, batch.attention_mask))


def test_a_pass_may_be_made_in_the_middle_of_another(lm: LanguageModel) -> None:
    """An edit that asks the unsteered model about another text leaves its own pass as it was."""
    other = lm.encode(["w20 w21", "w22"])

    def ask(h: Tensor, fwd: ForwardPass) -> Tensor:
        with lm.unedited():
            clean = lm.logits(other.input_ids, other.attention_mask)
            lm.generate(["w9"], max_new_tokens=2)
        found.append((fwd.phase, fwd.past, clean))
        return h

    found: list[Any] = []
    plain = lm.logits(other.input_ids, other.attention_mask)
    st = Steerer(lm)
    expected = rows_of(lm, PROMPTS, st.vector(VECTOR, hook=LATE, scope="generation"))
    with lm.edit(EARLY, ask):
        assert rows_of(lm, PROMPTS, st.vector(VECTOR, hook=LATE, scope="generation")) == expected
        with lm.edit(HOOK, ask):
            loop = lm.model(**other_cached(lm))
            lm.model(other.input_ids[:, :1], past_key_values=loop.past_key_values, use_cache=True)
    assert all(clean.equal(plain) for _, _, clean in found)
    assert [phase for phase, _, _ in found[:2]] == ["prompt", "generation"]
    assert found[-1][:2] == ("generation", 2)


def other_cached(lm: LanguageModel) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[0, 20], [0, 22]]), "use_cache": True}


def test_bad_gates(lm: LanguageModel) -> None:
    st = Steerer(lm)
    behind = "blocks.1.hook_resid_post has a gate that reads blocks.2.hook_resid_post, which the pass comes to after it"
    with pytest.raises(SteersmanError, match=behind):
        st.vector(VECTOR, hook=HOOK, gate=TokenGate(C, hook=LATE))
    with pytest.raises(SteersmanError, match="two gates that need each other's layers cannot both be decided"):
        st.vector(VECTOR, hook=HOOK, gate=Condition(LATE, C))
    with pytest.raises(SteersmanError, match="read it earlier, or choose prompt='none' or 'second_pass'"):
        st.vector(VECTOR, hook=HOOK, gate=Condition(HOOK, C))
    with pytest.raises(SteersmanError, match="a vector has width 5"):
        st.vector(VECTOR, hook=HOOK, gate=TokenGate(C[:5]))
    with pytest.raises(SteersmanError, match="a probe was made for 'other'"):
        st.vector(VECTOR, hook=HOOK, gate=Condition(EARLY, Probe(C, model_name="other")))
    with pytest.raises(SteersmanError, match=r"a probe was made at 'blocks\.2.*not at 'blocks\.0"):
        st.vector(VECTOR, hook=HOOK, gate=Condition(EARLY, Probe(C, hook_name=LATE)))
    with pytest.raises(SteersmanError, match="no layer 9"):
        st.vector(VECTOR, hook=HOOK, gate=Condition("layers.9", C))
    with pytest.raises(SteersmanError, match="does not say where it reads"):
        Condition(None, C)
    with pytest.raises(SteersmanError, match="unknown pool 'sum'"):
        Condition(EARLY, C, pool="sum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SteersmanError, match="unknown prompt 'all'"):
        Condition(EARLY, C, prompt="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SteersmanError, match="is compared with a mean state"):
        Condition(EARLY, TanhSimilarity(C), pool="max")
    with pytest.raises(SteersmanError, match="a gate reads one number, and this reading gives 2"):
        TokenGate(Projection.span([C, VECTOR]))
    with pytest.raises(SteersmanError, match="AnyOf takes one gate or more"):
        AnyOf([])
    late = Steerer(lm).vector(VECTOR, hook=HOOK, gate=Condition(EARLY, C))
    out = lm.model(torch.tensor([[0, 5, 6]]), use_cache=True)
    with late, pytest.raises(SteersmanError, match="the prompt was read before it was open"):
        lm.model(torch.tensor([[7]]), past_key_values=out.past_key_values, use_cache=True)
