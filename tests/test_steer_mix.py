"""Mixtures of next-token distributions: closed forms, plain generation to the last bit, rows, padding, streams."""

from typing import Any

import pytest
import torch
from support.tiny_models import build, count_hooks, with_text, word_tokenizer
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.lens import check_lens, lens_logits
from steersman.steer import LogitsEdit, Mix, MixSource, Steerer, VectorEdit

PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12"]
OTHERS = ["w20 w21", "w22 w23 w24", "w25"]
P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
Q = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
R = torch.tensor([[0.25, 0.25, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1]])


def rows_of(text: Any) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(text.new_tokens, text.new_mask)]


def probabilities(mix: Mix, *given: Tensor) -> Tensor:
    return mix.mixed([p.log() + torch.randn(len(p), 1) for p in given]).softmax(-1)  # a constant is no matter


def by_hand(*terms: tuple[float, Tensor]) -> Tensor:
    product = torch.ones_like(P)
    for w, p in terms:
        product = product * p**w
    return product / product.sum(-1, keepdim=True)


def test_three_distributions_in_closed_form() -> None:
    a, b = MixSource(prompts="a"), MixSource(prompts="b")
    none = {"plausible": None}
    torch.testing.assert_close(
        probabilities(Mix.steer(a, "b", g=0.2, eta=0.3, **none), P, Q, R), by_hand((1.2, P), (-0.2, Q), (-0.3, R))
    )
    torch.testing.assert_close(
        probabilities(Mix.experts(a, b, g=2.0), P, Q, R), by_hand((1, P), (2, Q), (-2, R)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(probabilities(Mix.guidance("u", g=1.5), P, Q), by_hand((1.5, P), (-0.5, Q)))
    torch.testing.assert_close(probabilities(Mix.lens([0, 1], g=0.3), P, Q, R), by_hand((0.7, P), (0.15, Q), (0.15, R)))
    # base = fine-tuned takes g out; negative = the same prompt leaves p^(1 - eta)
    torch.testing.assert_close(probabilities(Mix.steer(a, "b", g=0.7, eta=0.0, **none), P, P, R), P)
    torch.testing.assert_close(probabilities(Mix.steer(a, "b", g=0, eta=0.4, **none), P, Q, P), by_hand((0.6, P)))
    torch.testing.assert_close(probabilities(Mix.lens([0], g=0.3), P, P), P)  # equal sources: the identity
    torch.testing.assert_close(probabilities(Mix.lens([0], g=1.0), P, Q), Q)
    rows = Mix([([1.5, 1.0], MixSource()), ([-0.5, 0.0], a)], None)
    mixed = probabilities(rows, P, Q)
    torch.testing.assert_close(mixed, torch.stack([by_hand((1.5, P), (-0.5, Q))[0], P[1]]))


def test_the_mask_keeps_what_the_main_source_finds_plausible() -> None:
    tiny = torch.tensor([[0.5, 0.3, 0.2 - 1e-9, 1e-9]])
    unlikely = torch.tensor([[0.4, 0.3, 0.3 - 1e-30, 1e-30]])
    logits = [tiny.log(), unlikely.log()]
    free = Mix.contrastive(MixSource(prompts="a"), plausible=None).mixed(logits)
    assert int(free.argmax()) == 3  # gains without bound
    held = Mix.contrastive(MixSource(prompts="a"), plausible=0.1).mixed(logits)
    assert held[0, 3] == -torch.inf
    torch.testing.assert_close(held[:, :3].softmax(-1), (tiny / unlikely)[:, :3] / (tiny / unlikely)[:, :3].sum())
    impossible = torch.tensor([[0.0, -torch.inf, 0.0, 0.0]])
    mixed = Mix.contrastive(MixSource(prompts="a"), plausible=None).mixed([impossible, impossible])
    assert mixed[0, 1] == -torch.inf
    assert not mixed.isnan().any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_without_weights_it_is_plain_generation(family: str) -> None:
    lm = with_text(family)
    st = Steerer(lm)
    plain = lm.generate(PROMPTS, max_new_tokens=8)
    other = MixSource(prompts=OTHERS)
    for mix in (
        Mix([(1.0, MixSource())]),
        Mix.steer(other, "w30", g=0.0, eta=0.0),
        Mix.guidance(OTHERS, g=1.0),
        Mix.lens([0, 1], g=0.0),
        Mix.contrastive(other, g=[0.0, 0.0, 0.0]),
    ):
        text = mix.generate(lm, PROMPTS, max_new_tokens=8)
        assert torch.equal(text.tokens, plain.tokens)
        assert torch.equal(text.attention_mask, plain.attention_mask)
        assert (text.texts, text.completions, text.prompts) == (plain.texts, plain.completions, plain.prompts)
    with st.vector(torch.ones(lm.d_model), hook=1):
        steered = lm.generate(PROMPTS, max_new_tokens=8)
        assert torch.equal(Mix([(1.0, MixSource())]).generate(lm, PROMPTS, max_new_tokens=8).tokens, steered.tokens)
    lens = Mix([(0.0, MixSource()), (1.0, MixSource(layer=-1))], None)
    assert torch.equal(lens.generate(lm, PROMPTS, max_new_tokens=8).tokens, plain.tokens)
    one = Mix([([1.0, 1.5, 1.0], MixSource()), ([0.0, -0.5, 0.0], other)]).generate(lm, PROMPTS, max_new_tokens=8)
    assert [rows_of(one)[i] for i in (0, 2)] == [rows_of(plain)[i] for i in (0, 2)]


def reference(lm: LanguageModel, mix: Mix, prompts: list[str], contexts: list[Any], steps: int) -> list[int]:
    """Greedy tokens of one row, every source read again from its start for each of them."""
    written: list[int] = []
    while len(written) < steps and written[-1:] != [1]:
        logits = []
        for prompt, context, (_, source) in zip(prompts, contexts, mix.sources):
            ids = torch.tensor([lm.token_ids(prompt, bos=True) + written])
            with context:
                hook = "logits" if source.layer is None else lm.resolve_hook(source.layer)
                h = lm.capture(ids, hooks=hook, prompt_length=len(lm.token_ids(prompt, bos=True)))[hook][:, -1]
            logits.append(h if source.layer is None else lens_logits(lm, h))
        written.append(int(mix.mixed(logits).argmax()))
    return written


def test_streams_are_what_their_texts_say_read_anew() -> None:
    """A prompt of its own, an edit in a scope of its own, and a lens layer under that edit: with padding and rows."""
    lm = with_text("llama")
    st = Steerer(lm)
    v = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(3)) * 3

    def steering() -> Any:
        return st.vector(v, hook=1, scope="generation")

    under = steering()
    mix = Mix(
        [
            (1.0, MixSource()),
            (0.8, MixSource(steering=under)),
            (-0.7, MixSource(prompts=OTHERS)),
            (0.5, MixSource(layer=1)),
            (0.4, MixSource(steering=under, layer="blocks.1.hook_resid_post")),
        ],
        plausible=0.01,
    )
    text = mix.generate(lm, PROMPTS, max_new_tokens=7)
    assert under.trace.count > 0
    plain = Mix([(1.0, MixSource())]).generate(lm, PROMPTS, max_new_tokens=7)
    assert rows_of(text) != rows_of(plain)
    for i, row in enumerate(rows_of(text)):
        prompts = [PROMPTS[i], PROMPTS[i], OTHERS[i], PROMPTS[i], PROMPTS[i]]
        contexts = [lm.unedited(), steering(), lm.unedited(), lm.unedited(), steering()]
        assert reference(lm, mix, prompts, contexts, 7) == row
        alone = Mix(
            [(w, MixSource(**{**vars(s), "prompts": s.prompts and OTHERS[i]})) for w, s in mix.sources], mix.plausible
        )
        assert rows_of(alone.generate(lm, PROMPTS[i], max_new_tokens=7)) == [row]
    assert count_hooks(lm.model) == 0


def test_another_model_with_the_same_tokenizer() -> None:
    lm = with_text("llama")
    amateur = with_text("gpt2")
    mix = Mix.contrastive(MixSource(lm=amateur), g=0.5)
    text = rows_of(mix.generate(lm, PROMPTS, max_new_tokens=6))
    ids = torch.tensor([lm.token_ids(PROMPTS[0], bos=True)])
    first = mix.mixed([lm.logits(ids)[:, -1], amateur.logits(ids)[:, -1]])
    assert text[0][0] == int(first.argmax())
    assert text != rows_of(lm.generate(PROMPTS, max_new_tokens=6))
    other = word_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    other.add_tokens(["another"])
    foreign = LanguageModel(build("gpt2").model, other, name="foreign")
    with pytest.raises(SteersmanError, match=r"foreign has another tokenizer than llama \(1 tokens differ\)"):
        Mix.contrastive(MixSource(lm=foreign)).generate(lm, PROMPTS)


def test_sampling_is_seeded_and_a_batch_has_its_rows() -> None:
    lm = with_text("llama")
    mix = Mix.guidance(OTHERS, g=1.3)
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 20}
    a = mix.generate(lm, PROMPTS, seed=1, num_return_sequences=2, **options)
    assert torch.equal(a.tokens, mix.generate(lm, PROMPTS, seed=1, num_return_sequences=2, **options).tokens)
    assert not torch.equal(a.tokens, mix.generate(lm, PROMPTS, seed=2, num_return_sequences=2, **options).tokens)
    assert a.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    row = Mix.guidance(OTHERS[:1], g=1.3).generate(lm, PROMPTS[0], seed=1, num_return_sequences=2, **options)
    assert rows_of(row) == rows_of(a)[:2]
    state = torch.random.get_rng_state()
    mix.generate(lm, PROMPTS, seed=1, **options)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rows_end_where_they_end() -> None:
    lm = with_text("llama")
    with Steerer(lm).edit("logits", LogitsEdit([{1: 0.0}, {1: 1e4}, {1: 0.0}]), include_bos=True):
        text = Mix.guidance(OTHERS, g=1.5).generate(lm, PROMPTS, max_new_tokens=5)
    assert text.new_mask.sum(1).tolist()[1] == 1
    assert text.new_tokens[1].tolist() == [1, 3, 3, 3, 3]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gptj", "cohere"])
def test_the_lens_of_the_last_layer_is_the_output(family: str) -> None:
    lm = build(family)
    check_lens(lm)
    last, ids = f"blocks.{lm.n_layers - 1}.hook_resid_post", torch.tensor([[5, 6, 7]])
    found = lm.capture(ids, hooks=[last, "logits"])
    torch.testing.assert_close(lens_logits(lm, found[last]), found["logits"])


def test_a_model_without_a_lens_is_refused() -> None:
    lm = with_text("llama")
    lm.model.lm_head.register_forward_hook(lambda module, args, out: None)
    lm.model.config.logit_scale = 3.0  # says that the logits are scaled, which this family does not do
    with pytest.raises(SteersmanError, match="it has no logit lens"):
        Mix.lens([1]).generate(lm, PROMPTS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mix([]), "at least one source"),
        (lambda: Mix([(1.0, MixSource())], plausible=0.0), r"must lie in \(0, 1\]"),
        (lambda: Mix([(1.0, MixSource()), (0.5, MixSource(prompts=OTHERS[:2]))]), "2 prompts and there are 3"),
        (lambda: Mix([([1.0, 2.0], MixSource())]), "a weight has 2 rows and there are 3 prompts"),
        (lambda: Mix([([1.0, 2.0], MixSource()), ([1.0] * 3, MixSource(layer=0))]), "rows disagree"),
        (lambda: Mix([(1.0, MixSource()), (1.0, MixSource(layer=9))]), "layer"),
    ],
)
def test_wrong_mixtures(lm: LanguageModel, make: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        make().generate(lm, PROMPTS, max_new_tokens=2)


def test_generates_own_guidance_names_what_to_use(lm: LanguageModel) -> None:
    with (
        Steerer(lm).edit(1, VectorEdit(torch.ones(lm.d_model))),
        pytest.raises(SteersmanError, match=r"steersman.steer.Mix.guidance"),
    ):
        lm.generate(PROMPTS, max_new_tokens=2, guidance_scale=1.5)
