"""The bundled model: loads with transformers, knows the grammar, speaks it, and stays small."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.demo import CONCEPT_OF_WORD, CONCEPTS, MODEL_PATH, concept_labels, story
from steersman.demo.measure import sample_report, story_loss
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()


def test_at_most_three_megabytes():
    assert sum(file.stat().st_size for file in MODEL_PATH.iterdir()) <= 3_000_000


def test_a_small_llama_in_bf16(model):
    assert model.config.model_type == "llama"
    assert 800_000 < model.num_parameters() < 1_300_000
    assert (
        model.config.dtype == torch.bfloat16
        or json.loads((MODEL_PATH / "config.json").read_text())["dtype"] == "bfloat16"
    )


def test_special_tokens(tokenizer, model):
    ids = tokenizer("One day.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer("One day.", add_special_tokens=False)["input_ids"] == ids[1:]


@pytest.mark.parametrize(
    "text", ["Any text: 12 % of naïve 🦊 bytes,\n\ttabs too.", " leading and trailing ", "", "don't , stop"]
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_concept_words_are_one_token(tokenizer):
    assert [word for word in CONCEPT_OF_WORD if len(tokenizer.tokenize(" " + word)) != 1] == []


def test_token_labels_are_exact(tokenizer):
    """A token carries a concept exactly when it is one of the concept's words, and pieces of other words carry none."""
    columns = list(CONCEPTS)
    for index in range(50):
        tale = story(9, index)
        encoded = tokenizer(tale.text, return_offsets_mapping=True)
        labels = concept_labels(tale.spans, encoded["offset_mapping"])
        found = [
            (tokenizer.decode([encoded["input_ids"][t]]), columns[c]) for t, c in zip(*labels.nonzero(), strict=True)
        ]
        assert found == [(" " + tale.text[start:end], concept) for start, end, concept in tale.spans]


def test_loss_is_near_the_entropy_of_fresh_stories(model, tokenizer):
    report = story_loss(model, tokenizer, [story(1234, index) for index in range(200)])
    assert report.loss - report.entropy < 0.025
    # No model is below the entropy on average; a negative gap beyond noise would mean a wrong entropy.
    assert report.loss - report.entropy > -0.01


def test_loss_does_not_depend_on_the_batch(model, tokenizer):
    tales = [story(1234, index) for index in range(6)]
    one, many = story_loss(model, tokenizer, tales, batch_size=1), story_loss(model, tokenizer, tales, batch_size=6)
    assert one.loss == pytest.approx(many.loss, abs=1e-4)
    assert one.tokens == many.tokens


def test_samples_are_stories_of_the_grammar(model, tokenizer):
    before = torch.random.get_rng_state()
    report = sample_report(model, tokenizer, n=64, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert report.sentences > 0.95
    assert report.sentences_in_place > 0.6
    assert report.stories > 0.3
    assert len(set(report.texts)) == 64
    assert sample_report(model, tokenizer, n=4, seed=3).texts == sample_report(model, tokenizer, n=4, seed=3).texts


def test_an_untrained_model_fails_both_checks(model, tokenizer):
    torch.manual_seed(0)
    fresh = type(model)(model.config).float().eval()
    assert story_loss(fresh, tokenizer, [story(1, 0)]).loss > 5
    report = sample_report(fresh, tokenizer, n=4, max_new_tokens=30)
    assert report.stories == 0
    assert report.sentences < 0.2


def test_earlier_concept_decides_later_words(model, tokenizer):
    """What the demo steers: after snow the model expects any snow word, and no other weather."""
    prefix = (
        "At dawn, Anna walked to the beach. Suddenly the snow began. It was time for plums and pears."
        " There she met a big seal. By then the"
    )
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer(prefix)["input_ids"]])).logits[0, -1]
    p = logits.softmax(-1)

    def mass(concept: str) -> float:
        return sum(p[tokenizer.encode(" " + w, add_special_tokens=False)[0]].item() for w in CONCEPTS[concept].words)

    assert mass("snow") > 0.9
    assert max(mass(c) for c in ("rain", "sunshine", "wind", "storm", "fog")) < 0.02


def test_its_name_loads_it_unless_a_folder_here_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named, placed = LanguageModel.load("steersman-demo"), LanguageModel.load(str(MODEL_PATH))
    assert (named.name, named.digest()) == (placed.name, placed.digest())
    (tmp_path / "steersman-demo").mkdir()
    with pytest.raises(SteersmanError, match=r"holds no config\.json"):
        LanguageModel.load("steersman-demo")
