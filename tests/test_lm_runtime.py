"""The same states and texts however a model is wrapped, compiled, copied or shared; and nothing steered in silence."""

import asyncio
import copy
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import LLAMA, D, V, build, count_hooks, toy_sae, with_text, word_tokenizer
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAEConfig
from steersman.steer import Steerer
from steersman.steer.edits import LogitsEdit

HOOK, IDS, PROMPTS = "blocks.1.hook_resid_post", torch.arange(4, 12)[None], ["w5 w6 w7", "w8"]


@pytest.fixture
def own() -> LanguageModel:
    """A model that a test may change."""
    return with_text("llama")


def vector(seed: int = 0) -> Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed)) * 4


def steered(lm: LanguageModel, seed: int = 0) -> tuple[Tensor, list[str], Tensor]:
    """Logits, texts and a captured state under a steering vector; the trace must have counted."""
    with Steerer(lm).vector(vector(seed), hook=HOOK) as context:
        logits, texts = lm.logits(IDS), lm.generate(PROMPTS, max_new_tokens=5).texts
        state = lm.capture(IDS, hooks=[HOOK])[HOOK]
    assert context.trace.count > 8
    return logits, texts, state


def same(a: tuple[Tensor, list[str], Tensor], b: tuple[Tensor, list[str], Tensor]) -> bool:
    return torch.allclose(a[0], b[0], atol=1e-4) and a[1] == b[1] and torch.allclose(a[2], b[2], atol=1e-4)


def wrapped(model: Any) -> LanguageModel:
    return LanguageModel(model, word_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>"))


def compile_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compile_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def in_training(model: Any) -> Any:
    return model.train()


def low_rank(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


WAYS = [compile_in_place, compile_forward, in_training]


@pytest.mark.parametrize("way", WAYS)
def test_one_state_however_the_model_is_wrapped(way: Callable[[Any], Any]) -> None:
    plain = with_text("llama")
    want, clean = steered(plain), plain.logits(IDS)
    lm = wrapped(way(with_text("llama").model))
    torch.testing.assert_close(lm.logits(IDS), clean)  # which is when Dynamo compiles
    assert same(steered(lm), want)
    torch.testing.assert_close(lm.logits(IDS), clean)
    assert count_hooks(lm.model) == 0


def test_the_model_inside_a_wrapper_is_used(own: LanguageModel) -> None:
    assert wrapped(torch.compile(own.model, backend="eager")).model is own.model


def test_a_model_compiled_inside_a_context(own: LanguageModel) -> None:
    """Steered there, or an error where Dynamo has code of such a model already; plain afterwards."""
    want, clean = steered(own)[0], own.logits(IDS)
    with Steerer(own).vector(vector(), hook=HOOK):
        compile_in_place(own.model)
        with suppress(SteersmanError):
            torch.testing.assert_close(own.logits(IDS), want)
    torch.testing.assert_close(own.logits(IDS), clean)


def test_adapters_equal_the_merged_model(own: LanguageModel) -> None:
    adapted = low_rank(own.model)
    lm = wrapped(adapted)
    assert lm.hook_names() == with_text("llama").hook_names()
    got = steered(lm)
    with Steerer(lm).vector(vector(), hook=HOOK) as context:
        torch.testing.assert_close(adapted(IDS).logits, got[0])  # as the wrapper itself is called
        adapted.generate(input_ids=IDS, max_new_tokens=2)
    assert context.trace.count == 8 + 9
    assert same(got, steered(wrapped(adapted.merge_and_unload())))


def test_virtual_tokens_are_refused(own: LanguageModel) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(own.model, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(SteersmanError, match="virtual tokens"):
        wrapped(model)


def test_a_hook_that_does_not_run_is_an_error(own: LanguageModel) -> None:
    """A pass that leaves a block out, made here or by others, for edits and captures."""
    own.model.model.layers = own.model.model.layers[:1]
    with Steerer(own).vector(vector(), hook=HOOK):
        for act in (lambda: own.logits(IDS), lambda: own.model(IDS), lambda: own.generate("w5", max_new_tokens=2)):
            with pytest.raises(SteersmanError, match=f"never reached {HOOK}"):
                act()
    with pytest.raises(SteersmanError, match=f"never reached {HOOK}"):
        own.capture(IDS, hooks=["blocks.0.hook_resid_post", HOOK])
    assert count_hooks(own.model) == 0


def test_checkpointing_with_gradients_is_refused(own: LanguageModel) -> None:
    own.model.gradient_checkpointing_enable()
    own.model.train()
    with Steerer(own).vector(vector(), hook=HOOK):
        with pytest.raises(SteersmanError, match="gradient checkpointing"):
            own.model(IDS)
        with torch.no_grad():
            own.model(IDS)  # nothing is computed again
    with Steerer(own).edit("logits", LogitsEdit({5: 1.0})):
        own.model(IDS).logits.sum().backward()


# Threads and tasks


def in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except SteersmanError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_an_edit_is_of_the_thread_that_opened_it(lm: LanguageModel) -> None:
    mine, theirs, clean = steered(lm, 0), steered(lm, 1), lm.logits(IDS)
    with Steerer(lm).vector(vector(0), hook=HOOK):
        assert same(in_thread(lambda: steered(lm, 1)), theirs)
        for act in (lambda: lm.logits(IDS), lambda: lm.generate("w5", max_new_tokens=2), lambda: lm.model(IDS)):
            assert "another thread or task is steering" in str(in_thread(act))

        def unedited() -> Tensor:
            with lm.unedited():
                return lm.logits(IDS)

        assert torch.equal(in_thread(unedited), clean)
        assert torch.equal(unedited(), clean)
        assert torch.equal(lm.logits(IDS), mine[0])
    with Steerer(lm, for_all_threads=True).vector(vector(0), hook=HOOK) as context:
        assert torch.equal(in_thread(lambda: lm.logits(IDS)), mine[0])
    assert context.trace.count == 8
    assert torch.equal(lm.logits(IDS), clean)


def test_threads_at_the_same_time(lm: LanguageModel) -> None:
    want = [steered(lm, seed) for seed in range(3)]
    found: list[Any] = [None] * 3

    def work(seed: int) -> None:
        try:
            found[seed] = all(same(steered(lm, seed), want[seed]) for _ in range(4))
        except Exception as error:
            found[seed] = error

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3
    assert count_hooks(lm.model) == 0


def test_asyncio_tasks_have_their_own_edits(lm: LanguageModel) -> None:
    want = [steered(lm, seed)[0] for seed in range(2)]

    async def task(seed: int) -> bool:
        with Steerer(lm).vector(vector(seed), hook=HOOK):
            await asyncio.sleep(0)
            first = torch.equal(lm.logits(IDS), want[seed])
            await asyncio.sleep(0)
            return first and torch.equal(await asyncio.to_thread(lm.logits, IDS), want[seed])

    async def both() -> list[bool]:
        return list(await asyncio.gather(task(0), task(1)))

    assert asyncio.run(both()) == [True, True]


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
def test_a_copy_is_plain_and_independent(own: LanguageModel, copied: Callable[[Any], Any]) -> None:
    clean, text = own.logits(IDS), own.generate("w5", max_new_tokens=3).texts
    with Steerer(own).vector(vector(), hook=HOOK), Steerer(own).vector(vector(), hook="blocks.1.hook_resid_mid"):
        steerer, raw = copied(Steerer(own)), copied(own.model)
    assert torch.equal(raw(IDS).logits, clean)
    lm = steerer.lm
    assert torch.equal(lm.logits(IDS), clean)
    assert lm.generate("w5", max_new_tokens=3).texts == text
    assert count_hooks(lm.model) == 0
    assert same(steered(lm), steered(own))
    with torch.no_grad():
        for p in lm.model.parameters():
            p.zero_()
    assert torch.equal(own.logits(IDS), clean)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
def test_a_copy_finds_its_final_norm(copied: Any) -> None:
    lm = with_text("llama")
    twin = copied(lm)  # before the norm was looked for
    assert twin.final_norm() is twin.model.model.norm
    assert lm.final_norm() is lm.model.model.norm


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda sae: pickle.loads(pickle.dumps(sae))])
def test_an_sae_can_be_copied(copied: Callable[[Any], Any]) -> None:
    sae, x = toy_sae(), torch.randn(3, D)
    other = copied(sae)
    assert type(other) is type(sae)
    assert torch.equal(other.encode(x), sae.encode(x))


# Interrupts


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_leaves_nothing(own: LanguageModel) -> None:
    """At a sample of the lines that a steered generation runs through."""
    st, sae = Steerer(own), toy_sae()

    def work() -> None:
        with st.vector(vector(), hook="blocks.1.hook_resid_mid"), st.features(sae, {3: 2.0}, measure=True):
            own.generate("w5", max_new_tokens=1, seed=1)
            own.capture(IDS, hooks=[HOOK], prompt_length=2)

    lines, at = 0, -1

    def each_line(_frame: Any, event: str, _arg: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return each_line

    def ours(frame: Any, _event: str, _arg: Any) -> Any:
        file = frame.f_code.co_filename
        return each_line if "/steersman/lm/" in file or file.endswith(("steerer.py", "steering.py")) else None

    def traced() -> None:
        nonlocal lines
        lines, before = 0, sys.gettrace()
        sys.settrace(ours)
        try:
            work()
        finally:
            sys.settrace(before)

    traced()
    clean, want, total = own.logits(IDS), steered(own), lines
    assert total > 500
    for at in range(1, total + 1, total // 24):
        with suppress(KeyboardInterrupt):
            traced()
        assert count_hooks(own.model) == 0, at
        assert not {"generate", "init_continuous_batching"} & own.model.__dict__.keys(), at
        assert not own._clock._edits, at
    assert torch.equal(own.logits(IDS), clean)
    assert same(steered(own), want)


# Generation


def test_continuous_batching_is_refused_and_usable_afterwards(own: LanguageModel) -> None:
    with Steerer(own).vector(vector(), hook=HOOK):
        for act in (
            own.model.init_continuous_batching,
            lambda: own.model.generate_batch([[0, 5, 6]], progress_bar=False),
            lambda: own.model.generate(IDS, cache_implementation="paged"),
        ):
            with pytest.raises(SteersmanError, match="continuous batching"):
                act()
    assert own.model.init_continuous_batching() is not None


MAMBA = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "state_size": 4, "bos_token_id": 0}
RECURRENT = {**LLAMA, "head_dim": 8, "lru_width": D, "attention_window_size": 8}


def recurrent(kind: str, arguments: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**arguments)).eval()
    model.generation_config.eos_token_id = None
    return wrapped(model)


@pytest.mark.parametrize(("kind", "arguments"), [("Mamba", MAMBA), ("RecurrentGemma", RECURRENT)])
def test_recurrent_models_know_their_positions(kind: str, arguments: dict[str, Any]) -> None:
    lm = recurrent(kind, arguments)
    for scope, count in (("generation", 3), ("prompt", 3), ("3:6", 3), ("all", 6)):
        with Steerer(lm).vector(vector(), hook=HOOK, scope=scope) as context:
            lm.generate("w5 w6 w7", max_new_tokens=4)
        assert context.trace.count == count, scope


def test_a_recurrent_model_that_reads_padding_is_refused_it() -> None:
    lm = recurrent("RecurrentGemma", RECURRENT)
    with pytest.raises(SteersmanError, match="one length"):
        lm.generate(PROMPTS, max_new_tokens=2)
    assert len(lm.generate(["w5 w6", "w7 w8"], max_new_tokens=2).texts) == 2
    with pytest.raises(SteersmanError, match="one length"):
        lm.capture(torch.tensor([[3, 5], [5, 6]]), torch.tensor([[0, 1], [1, 1]]), hooks=[HOOK])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 6}, "max_new_tokens"),
        ({"return_dict_in_generate": True}, "only tokens and text"),
        ({"input_ids": IDS}, "prompts are texts"),
        ({"generation_config": transformers.GenerationConfig()}, "one by one"),
        ({"stop_strings": ["w9"]}, "one prompt at a time"),
        ({"max_tokens": 5, "max_new_tokens": 2}, "transformers cannot generate with max_tokens"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"temperature": "0.5"}, "temperature must be a number"),
    ],
)
def test_options_are_honoured_or_refused(lm: LanguageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        lm.generate(PROMPTS, **options)


# Doors


@pytest.mark.parametrize(
    "act",
    [
        lambda lm: Steerer(lm).features(toy_sae(), {"3": 1.0}),  # pyright: ignore[reportArgumentType]
        lambda lm: Steerer(lm).features(toy_sae(), {3: "1.0"}),  # pyright: ignore[reportArgumentType]
        lambda lm: Steerer(lm).features(toy_sae(), {2.5: 1.0}),  # pyright: ignore[reportArgumentType]
        lambda lm: Steerer(lm).vector(vector(), hook=HOOK, scale="2"),  # pyright: ignore[reportArgumentType]
        lambda lm: Steerer(lm).vector(vector(), hook=HOOK, scope={"15"}),  # pyright: ignore[reportArgumentType]
        lambda lm: Steerer(lm).vector(vector(), hook=HOOK, scope=(1.5, 3)),  # pyright: ignore[reportArgumentType]
        lambda lm: LogitsEdit({"5": 1.0}),  # pyright: ignore[reportArgumentType]
        lambda lm: SAEConfig(d_in=8, d_sae=16, k=2.5),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_is_no_number_is_refused(lm: LanguageModel, act: Callable[[LanguageModel], Any]) -> None:
    with pytest.raises(SteersmanError, match=r"number|whole"):
        act(lm)


def test_plain_passes_under_scope_generation_are_warned_of(lm: LanguageModel) -> None:
    """As an evaluation harness scores multiple choice: one pass over prompt and answer."""
    clean = lm.model(IDS).logits
    with pytest.warns(UserWarning, match="prompt_length"), Steerer(lm).vector(vector(), hook=HOOK, scope="generation"):
        assert torch.equal(lm.model(IDS).logits, clean)
    with Steerer(lm).vector(vector(), hook=HOOK, scope="generation"), lm.prompt_length(5):
        assert not torch.equal(lm.model(IDS).logits, clean)


def test_a_meter_that_sees_no_row(lm: LanguageModel) -> None:
    with Steerer(lm).features(toy_sae(), {3: 2.0}, mode="clamp", scope="2:10", measure=True) as context:
        lm.generate("w5", max_new_tokens=3, eos_token_id=None)
    assert context.report().n_tokens == context.trace.count == 2


def test_modes_are_kept(own: LanguageModel) -> None:
    own.model.train()
    own.model.model.norm.eval()
    own.capture(IDS, hooks=[HOOK])
    assert own.model.training
    assert not own.model.model.norm.training
    assert isinstance(build("gpt2").model, nn.Module)
