"""Decoding streams: a session is what `generate` does, token by token, also where several take turns."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.tiny_models import D, build, toy_sae, with_text

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel, Session
from steersman.steer import Steerer

PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12"]
HOOK = "blocks.1.hook_resid_post"
VECTOR = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "opt"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return with_text(request.param)


def greedy(session: Session, n: int = 8) -> torch.Tensor:
    for _ in range(n):
        session.feed(session.logits.argmax(-1))
    return session.new_tokens


def written(session: Session) -> list[list[int]]:
    stop = session.stop_ids
    rows = []
    for row in session.new_tokens.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
        rows.append(row[:end])
    return rows


def generated(lm: LanguageModel, steering: Any) -> list[list[int]]:
    with steering:
        out = lm.generate(PROMPTS, max_new_tokens=8)
    return [row[keep.bool()].tolist() for row, keep in zip(out.new_tokens, out.new_mask)]


OPEN: dict[str, Callable[[Steerer], Any]] = {
    "nothing": lambda st: nullcontext(),
    "all": lambda st: st.vector(VECTOR, hook=HOOK, scale=[1.0, -1.0, 2.0]),
    "generation": lambda st: st.features(toy_sae(), {3: 6.0}, mode="clamp", scope="generation"),
    "last": lambda st: st.vector(VECTOR, hook=HOOK, scope="last_prompt+generation", schedule=[2.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("name", OPEN)
def test_a_session_writes_what_generate_writes(lm: LanguageModel, name: str) -> None:
    st = Steerer(lm)
    session = Session(lm, PROMPTS, context=lambda: OPEN[name](st))
    greedy(session)
    assert written(session) == generated(lm, OPEN[name](st))
    if name != "nothing":
        assert written(session) != generated(lm, nullcontext())


def test_sessions_that_take_turns_do_not_disturb_each_other(lm: LanguageModel) -> None:
    st = Steerer(lm)
    sessions = {name: Session(lm, PROMPTS, context=lambda name=name: OPEN[name](st)) for name in OPEN}
    for _ in range(8):
        for session in sessions.values():
            session.feed(session.logits.argmax(-1))
    for name, session in sessions.items():
        assert written(session) == generated(lm, OPEN[name](st)), name


def test_copies_share_their_prompts_parameters_and_can_be_reordered(lm: LanguageModel) -> None:
    st = Steerer(lm)
    session = Session(lm, PROMPTS, copies=2, context=lambda: OPEN["all"](st))
    assert session.rows == 6
    session.feed(torch.tensor([20, 21, 22, 23, 24, 25]))
    session.reorder(torch.tensor([1, 1, 2, 3, 5, 4]))
    session.feed(torch.tensor([30, 31, 32, 33, 34, 35]))
    assert session.new_tokens.tolist() == [[21, 30], [21, 31], [22, 32], [23, 33], [25, 34], [24, 35]]
    texts = [[*lm.token_ids(PROMPTS[i // 2], bos=True), *row] for i, row in enumerate(session.new_tokens.tolist())]
    for i, text in enumerate(texts):
        scale = [1.0, -1.0, 2.0][i // 2]
        with st.vector(VECTOR, hook=HOOK, scale=scale):
            whole = lm.logits(torch.tensor([text]))[0, -1]
        torch.testing.assert_close(session.logits[i], whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(SteersmanError, match="same prompt"):
        session.reorder(torch.tensor([2, 1, 2, 3, 4, 5]))


def test_a_fork_goes_its_own_way(lm: LanguageModel) -> None:
    session = Session(lm, PROMPTS)
    session.feed(torch.tensor([20, 21, 22]))
    other = session.fork(lambda: OPEN["all"](Steerer(lm)))
    other.feed(torch.tensor([30, 31, 32]))
    session.feed(torch.tensor([40, 41, 42]))
    assert session.new_tokens[0].tolist() == [20, 40]
    assert other.new_tokens[0].tolist() == [20, 30]
    alone = Session(lm, PROMPTS)
    alone.feed(torch.tensor([[20, 40], [21, 41], [22, 42]]))
    torch.testing.assert_close(session.logits, alone.logits, rtol=1e-4, atol=1e-4)


def test_a_fork_copies_what_was_read_once(lm: LanguageModel) -> None:
    read = Session(lm, PROMPTS)
    other = read.fork(copies=2)
    alone = Session(lm, PROMPTS, copies=2)
    fed = torch.arange(20, 26)
    torch.testing.assert_close(other.feed(fed), alone.feed(fed), rtol=1e-4, atol=1e-4)
    assert read.rows == 3
    with pytest.raises(SteersmanError, match="at least 1"):
        read.fork(copies=0)


def test_what_cannot_be_a_session(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match="padded on the left"):
        Session(lm, lm.encode(PROMPTS))
    session = Session(lm, PROMPTS)
    with pytest.raises(SteersmanError, match="token for each of 3 rows"):
        session.feed(torch.tensor([1, 2]))
    with pytest.raises(SteersmanError, match="not a decoder"):
        Session(build("esm"), PROMPTS)
