"""Choosing what to highlight: the sentence a model quotes, the tokens that two passes attend to, and the heads."""

import pytest
import torch
from support.tiny_models import with_text
from torch import Tensor

from steersman.lm import LanguageModel
from steersman.steer import Steerer, coarse_to_fine, heavy_columns, heavy_edits, heavy_tokens, key_sentences
from steersman.steer.analysis.spans import column_weights, match_sentence, sentences

CONTEXT = "The ship left at dawn. Mia found a key under the old bridge! Nobody saw the fox."


def test_sentences_are_cut_at_marks_and_lines() -> None:
    assert [CONTEXT[a:b] for a, b in sentences(CONTEXT)] == CONTEXT.replace("! ", "!\n").replace(". ", ".\n").split(
        "\n"
    )
    assert [CONTEXT[a:b] for a, b in sentences("")] == []
    text = 'He said "Go." Then:\n  a list\n\nof lines'
    assert [text[a:b] for a, b in sentences(text)] == ['He said "Go."', "Then:", "a list", "of lines"]


def test_an_exact_quotation_selects_its_own_sentence() -> None:
    for start, stop in sentences(CONTEXT):
        found = match_sentence(CONTEXT, f'"{CONTEXT[start:stop]}" That is why.')
        assert (found.span, found.matched, found.spans) == ((start, stop), True, [CONTEXT[start:stop]])
        assert found.score == 1.0


def test_a_wrong_quotation_highlights_nothing() -> None:
    for wrong in ("Elephants sing opera.", "", "???"):
        found = match_sentence(CONTEXT, wrong)
        assert not found.matched
        assert found.spans == []
    half = match_sentence(CONTEXT, "Mia found something near a bridge.", threshold=0.4)
    assert half.matched
    assert half.sentence.startswith("Mia")
    assert 0.4 < half.score < 1


def test_sentences_compared_by_embeddings() -> None:
    def embed(texts: list[str]) -> Tensor:
        return torch.stack(
            [torch.tensor([float("fox" in t or "animal" in t), 1.0 * ("ship" in t), 0.1]) for t in texts]
        )

    found = match_sentence(CONTEXT, "It was an animal.", embed)  # pyright: ignore[reportArgumentType]
    assert found.sentence == "Nobody saw the fox."
    assert found.score > 0.99


def test_the_model_is_asked(lm: LanguageModel) -> None:
    seen: list[tuple[str, str]] = []

    def ask(context: str, question: str) -> str:
        seen.append((context, question))
        return "w5 w6"

    text = lm.generate("w5 w6", max_new_tokens=4).completions[0].strip()
    found = key_sentences(lm, [f"w7. {text}.", "w8 w9."], ["w4", "w5"], ask=ask, max_new_tokens=4)
    assert seen == [(f"w7. {text}.", "w4"), ("w8 w9.", "w5")]
    assert [one.matched for one in found] == [True, False]
    assert found[0].sentence == f"{text}."
    with Steerer(lm).highlight([f"w7. {text}.", "w8 w9."], [one.spans for one in found], alpha=0.1) as context:
        lm.generate([f"w7. {text}.", "w8 w9."], max_new_tokens=2)
    assert context.trace.rows[0] > 0
    assert context.trace.rows[1:] in ([], [0])


def test_weights_are_means_over_the_rows_that_see_a_column() -> None:
    """Not sums, which put the first tokens before one that is planted."""
    n = 6
    uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    weights = column_weights(uniform[None, None], 0)[0, 0]
    sums = uniform.sum(0)
    assert sums.argmax() == 0
    assert float(weights[3]) == pytest.approx(sum(1 / (i + 1) for i in range(3, n)) / 3)
    heavy = uniform.clone()
    heavy[4:, 4] += 0.5
    assert column_weights(heavy[None, None], 0)[0, 0].argmax() == 4
    assert heavy.sum(0).argmax() == 0


def test_heavy_columns_of_two_passes() -> None:
    n, k, trials = 40, 8, 400
    draws = torch.rand(2, trials, n, generator=torch.Generator().manual_seed(0))
    both = heavy_columns(draws[0], draws[1], k=k)
    mean, sd = k * k / n, (k * k / n * (1 - k / n) * (n - k) / (n - 1)) ** 0.5
    assert abs(float(both.sum(-1).double().mean()) - mean) < 4 * sd / trials**0.5
    draws[:, :, 17] += 2
    assert heavy_columns(draws[0], draws[1], k=k)[:, 17].all()
    assert torch.equal(heavy_columns(draws[0], draws[0], k=k).sum(-1), torch.full((trials,), k))


def test_heavy_tokens_of_a_model_are_heavier_under_their_edit() -> None:
    lm = with_text("llama")
    context = "w10 w11 w12 w13 w14 w15 w16 w17"
    heavy = heavy_tokens(lm, context, k=3, prefixes=("w5 w6 ", "w7 w8 w9 "))
    assert heavy.chosen.shape == (3, 2, 8)
    assert heavy.by_chance == 9 / 8
    assert [context[a:b] for a, b in heavy.characters] == context.split()
    assert int(heavy.overlap.max()) <= 3
    assert int(heavy.overlap.sum()) > 0
    prompt = f"w4 {context} w20"
    edits = heavy_edits(lm, [prompt], [heavy], factor=8.0)
    layer, head = (int(i) for i in (heavy.overlap == heavy.overlap.max()).nonzero()[0])
    hook = f"blocks.{layer}.hook_attn_mask"
    batch = lm.encode([prompt])
    with Steerer(lm).edit(hook, edits[hook]):
        mask = lm.capture(batch.input_ids, hooks=hook)[hook][0, head, -1]
    assert [i - 2 for i in mask.nonzero()[:, 0].tolist()] == heavy.chosen[layer, head].nonzero()[:, 0].tolist()
    assert lm.config._attn_implementation == "sdpa"


def test_from_layers_to_heads() -> None:
    """A score that only head 1 of layer 2 moves, in a search that looks at two layers of three."""
    lm = with_text("llama")
    st, prompts = Steerer(lm), ["w5 w6 w7", "w8 w9 w10", "w11 w12 w13", "w14 w15 w16"]
    batch, hook = lm.encode(prompts), "blocks.2.attn.hook_z"
    plain = lm.capture(batch.input_ids, hooks=hook)[hook][:, -1, 8:]
    runs = []

    def score() -> Tensor:
        runs.append(1)
        z = lm.capture(batch.input_ids, hooks=hook)[hook][:, -1, 8:]
        mask = lm.capture(batch.input_ids, hooks="blocks.2.hook_attn_mask")["blocks.2.hook_attn_mask"]
        return (z - plain).norm(dim=-1) * (mask[:, 1, -1].abs().sum(-1) > 0)

    found = coarse_to_fine(
        lm,
        lambda heads: st.highlight(prompts, [prompt.split()[1] for prompt in prompts], heads=heads, alpha=0.01),
        score,
        layers=2,
    )
    assert found.layers.top(1) == [(2, 0)]
    assert 2 in found.heads.layers
    assert len(found.heads.layers) == 2
    assert found.pooled(1) == [(2, 1)]
    assert (2, 1) in found.per_layer(1)
    assert len(found.per_layer(1)) == 2
    assert len(runs) == (1 + 3) + (1 + 2 * 2)
