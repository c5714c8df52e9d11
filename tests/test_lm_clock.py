"""The pass clock: absolute positions under caches, padding, chunks and teacher forcing."""

from typing import Any

import pytest
import torch
from support.tiny_models import V, build, count_hooks, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel

HOOK = "blocks.1.hook_resid_post"


class Spy:
    """Notes, for every pass, what the clock says."""

    def __init__(self) -> None:
        self.passes: list[dict[str, Any]] = []

    def __call__(self, h: Tensor, now: ForwardPass) -> Tensor:
        self.passes.append(
            {
                "positions": now.positions.tolist(),
                "prompt": now.prompt_length.tolist(),
                "in_prompt": now.in_prompt.tolist(),
                "generated": now.generated.tolist(),
                "real": now.real.tolist(),
                "bos": now.is_bos.tolist(),
                "phase": now.phase,
            }
        )
        return h

    def column(self, key: str, row: int = 0) -> list[Any]:
        """One row's values over all passes, joined."""
        return [value for note in self.passes for value in note[key][row]]


def cache_of(lm: LanguageModel, output: Any) -> dict[str, Any]:
    """The KV cache in an output, as an argument of the next pass. Releases of transformers name it differently."""
    return {lm._clock.cache_name: output[lm._clock.cache_name]}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2", "mistral", "opt", "falcon"])
def test_decoding_with_a_cache_counts_on(family: str) -> None:
    lm, spy = with_text(family), Spy()
    with lm.edit(HOOK, spy):
        lm.generate(["w5 w6 w7", "w8"], max_new_tokens=5, eos_token_id=None)
    assert [len(p["positions"][0]) for p in spy.passes] == [4, 1, 1, 1, 1]  # the prompt with BOS, then one by one
    assert spy.column("positions", 0) == list(range(8))
    assert spy.column("positions", 1) == [-1, -1, 0, 1, 2, 3, 4, 5]  # left padding is not counted
    assert [p["prompt"] for p in spy.passes] == [[4, 2]] * 5
    assert [p["phase"] for p in spy.passes] == ["prompt"] + ["generation"] * 4
    assert spy.column("bos", 1) == [False, False, True] + [False] * 5
    assert spy.column("generated", 1) == [False] * 4 + [True] * 4


def test_decoding_without_a_cache_knows_where_the_prompt_ends(lm: LanguageModel) -> None:
    spy = Spy()
    with lm.edit(HOOK, spy):
        lm.generate(["w5 w6 w7", "w8"], max_new_tokens=3, eos_token_id=None, use_cache=False)
    last = spy.passes[-1]
    assert last["positions"] == [[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3]]
    assert last["prompt"] == [4, 2]
    assert last["generated"] == [[False] * 4 + [True] * 2] * 2
    assert last["phase"] == "mixed"


def test_model_generate_itself_is_understood(lm: LanguageModel) -> None:
    ids = torch.tensor([[0, 5, 6, 7]])
    for use_cache in (True, False):
        spy = Spy()
        with lm.edit(HOOK, spy):
            lm.model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, use_cache=use_cache)
        assert spy.passes[-1]["prompt"] == [4]
        assert spy.passes[-1]["generated"][0][-1]
        assert spy.passes[-1]["positions"][0][-1] == 5


def test_right_padding_while_generating(lm: LanguageModel) -> None:
    ids = torch.tensor([[0, 5, 6, 7], [0, 8, 3, 3]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    spy = Spy()
    with lm.edit(HOOK, spy):
        lm.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert spy.column("positions", 1) == [0, 1, -1, -1, 2, 3]
    assert spy.column("in_prompt", 1) == [True, True, False, False, False, False]


def test_chunked_prefill(lm: LanguageModel) -> None:
    prompt = "w5 w6 w7 w8 w9 w10 w11 w12"  # nine tokens with BOS: chunks of 4, 4 and 1
    spy = Spy()
    with lm.edit(HOOK, spy):
        lm.generate([prompt, "w5 w6"], max_new_tokens=3, eos_token_id=None, prefill_chunk_size=4)
    assert [len(p["positions"][0]) for p in spy.passes] == [4, 4, 1, 1, 1]
    assert spy.column("positions", 0) == list(range(11))
    assert spy.column("in_prompt", 0) == [True] * 9 + [False] * 2
    assert spy.column("in_prompt", 1) == [False] * 6 + [True] * 3 + [False] * 2
    assert spy.passes[0]["prompt"] == [9, 3]  # known from the first chunk on


def test_static_cache(lm: LanguageModel) -> None:
    spy = Spy()
    with lm.edit(HOOK, spy):
        lm.generate(["w5 w6 w7", "w8"], max_new_tokens=3, eos_token_id=None, cache_implementation="static")
    assert spy.column("positions", 0) == list(range(6))
    assert spy.column("positions", 1) == [-1, -1, 0, 1, 2, 3]


def test_a_loop_of_ones_own(lm: LanguageModel) -> None:
    spy = Spy()
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    with lm.edit(HOOK, spy), torch.no_grad():
        out = lm.model(ids[:, :3], use_cache=True)
        out = lm.model(ids[:, 3:], **cache_of(lm, out), use_cache=True)  # the rest of the prompt
        for _ in range(2):
            out = lm.model(out.logits[:, -1:].argmax(-1), **cache_of(lm, out), use_cache=True)
    assert spy.column("positions") == list(range(7))
    assert spy.column("in_prompt") == [True] * 5 + [False] * 2


def test_teacher_forcing_and_plain_passes(lm: LanguageModel) -> None:
    batch = lm.encode(["w5 w6 w7 w8", "w9 w10"])
    spy = Spy()
    with lm.edit(HOOK, spy):
        lm.logits(batch.input_ids, batch.attention_mask)
        lm.logits(batch.input_ids, batch.attention_mask, prompt_length=[3, 2])
        with lm.prompt_length(1):
            lm.logits(batch.input_ids, batch.attention_mask)
    plain, forced, single = spy.passes
    assert plain["in_prompt"] == plain["real"] == [[True] * 5, [True] * 3 + [False] * 2]
    assert plain["phase"] == "prompt"
    assert forced["generated"] == [[False] * 3 + [True] * 2, [False] * 2 + [True] + [False] * 2]
    assert single["prompt"] == [1, 1]
    with pytest.raises(SteersmanError, match="3 entries and the batch has 2"), lm.edit(HOOK, spy):
        lm.logits(batch.input_ids, batch.attention_mask, prompt_length=[1, 2, 3])


def test_finished_rows_are_padding(lm: LanguageModel) -> None:
    prompts = [f"w{i}" for i in range(5, 60)]
    rows = lm.generate(prompts, max_new_tokens=4, eos_token_id=None).new_tokens.tolist()
    i, end = 0, rows[0][1]  # the second token of this row is declared an end token
    j = next(k for k, row in enumerate(rows) if end not in row)
    for use_cache in (True, False):
        spy = Spy()
        with lm.edit(HOOK, spy):
            lm.generate([prompts[i], prompts[j]], max_new_tokens=4, use_cache=use_cache, eos_token_id=end)
        last = spy.passes[-1]
        assert last["real"][0][-1] is False  # transformers' mask says 1 there
        assert last["real"][1][-1] is True


def test_beams_and_several_sequences_share_their_prompts_parameters(lm: LanguageModel) -> None:
    seen: list[Any] = []

    def look(h: Tensor, now: ForwardPass) -> Tensor:
        seen.append((now.batch, now.row_index(2)))
        return h

    with lm.edit(HOOK, look):
        lm.generate(["w5 w6", "w7"], max_new_tokens=2, num_beams=3, eos_token_id=None)
        lm.generate(["w5 w6", "w7"], max_new_tokens=2, num_return_sequences=2, do_sample=True, eos_token_id=None)
        lm.generate(["w5 w6", "w7"], max_new_tokens=2, eos_token_id=None)
    assert seen[0][0] == 6
    assert seen[1][1].tolist() == [0, 0, 0, 1, 1, 1]
    assert seen[2][1].tolist() == [0, 0, 1, 1]
    assert seen[-1] == (2, None)
    with pytest.raises(SteersmanError, match="has 2 rows and the batch has 3"), lm.edit(HOOK, look):
        lm.logits(torch.full((3, 2), 5))


def test_a_part_of_the_model_alone_is_an_error(lm: LanguageModel) -> None:
    with lm.edit(HOOK, Spy()), pytest.raises(SteersmanError, match="outside a pass of the whole model"):
        lm.model.model(torch.tensor([[0, 5]]))


def test_a_pass_that_raises_leaves_nothing() -> None:
    lm = build("gpt2")

    def fail(h: Tensor, now: ForwardPass) -> Tensor:
        raise RuntimeError("planned")

    clean, before = lm.logits(torch.tensor([[5, 6]])), count_hooks(lm.model)
    with pytest.raises(RuntimeError, match="planned"), lm.edit(HOOK, Spy()), lm.edit(HOOK, fail):
        lm.logits(torch.tensor([[5, 6]]))
    assert count_hooks(lm.model) == before
    assert "generate" not in lm.model.__dict__
    assert torch.equal(lm.logits(torch.tensor([[5, 6]])), clean)


def test_a_mask_shorter_than_the_text_is_an_error(lm: LanguageModel) -> None:
    ids = torch.randint(4, V, (1, 4))
    with lm.edit(HOOK, Spy()), torch.no_grad():
        cache = cache_of(lm, lm.model(ids, use_cache=True))
        with pytest.raises(SteersmanError, match="attention_mask covers 1 tokens, but 4 are cached"):
            lm.model(ids[:, :1], **cache, attention_mask=torch.ones(1, 1))


def test_the_last_tokens_of_a_pass_know_their_place(lm: LanguageModel) -> None:
    """What a pass says of its last tokens is what it says of all of them, cut: logits are computed for these alone."""
    checked: list[int] = []

    def compare(h: Tensor, fwd: ForwardPass) -> Tensor:
        for n in range(1, fwd.length + 1):
            part = fwd.last(n)
            assert (part.batch, part.length, part.past + part.length) == (fwd.batch, n, fwd.past + fwd.length)
            for name in ("positions", "present", "real", "in_prompt", "generated", "is_bos"):
                assert torch.equal(getattr(part, name), getattr(fwd, name)[:, -n:]), name
            assert torch.equal(part.prompt_length, fwd.prompt_length)
            assert torch.equal(part.key_positions[:, -n:], part.positions)
            assert fwd.last(n) is part
            checked.append(n)
        return h

    with lm.edit(HOOK, compare):
        for cached in (True, False):
            lm.generate(["w5 w6 w7", "w8"], max_new_tokens=3, eos_token_id=list(range(4, 30)), use_cache=cached)
        batch = lm.encode(["w5 w6 w7", "w8"])
        lm.logits(batch.input_ids, batch.attention_mask, prompt_length=2)
    assert max(checked) > 3


def test_the_old_name_of_a_pass_still_works() -> None:
    with pytest.warns(DeprecationWarning, match="steersman.lm.Pass is steersman.lm.passes.ForwardPass now"):
        from steersman.lm import Pass  # pyright: ignore[reportAttributeAccessIssue]
    assert Pass is ForwardPass
