"""Regular expressions over text: automata against Python's `re`, tokens that end inside a character, never broken."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import with_text

from steersman.demo import MODEL_PATH
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.decoding import RegexMask, particles
from steersman.steer.decoding.automaton import Automaton
from steersman.steer.decoding.masks import token_bytes

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return LanguageModel.load(str(MODEL_PATH))


@pytest.fixture(scope="module")
def stories() -> LanguageModel:
    if not STORIES.is_dir():
        pytest.skip("stories260k is not here")
    return LanguageModel.load(STORIES)


LETTERS = "abcdxy019 -_.!éàüßÉ\n\t中文😀😁helowrdg٣K"


@pytest.mark.parametrize(
    "pattern",
    [
        r"", r"-?[0-9]+", r"(a|bc)*d?", r"(?:|a|b+?)x{0,2}", r"[^a-c]{2,4}", r"\w+ \d{1,2}", r".*dog.*", r"(?s).{3}",
        r"(?i:hello|wörld)!*", r"é[à-ü]*", r"[\U0001F600-\U0001F64F]+x?", r"(\w+ ){1,3}\w+\.", r"^x+?y*$", r"\D\W\S",
        r"(?a:\w+)é?", r"[^\w\s]+", r"[\s\S]{2}", r"(?i)[a-c]+(?-i:D)?", r"a(?P<n>b|c(d|e))*",
    ],
)  # fmt: skip
def test_an_automaton_matches_what_python_matches(pattern: str) -> None:
    rng, automaton, python = random.Random(0), Automaton(pattern), re.compile(pattern)
    for _ in range(300):
        text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, 5)))
        assert automaton.fullmatch(text) == bool(python.fullmatch(text)), text


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(", "is no regular expression"),
        (r"(a)\1", "a reference to a group"),
        (r"(?=a)a", "looking ahead or behind"),
        (r"(?<!a)b", "looking ahead or behind"),
        (r"a\bb", "an anchor inside it"),
        (r"a$b", "an anchor inside it"),
        (r"(?>a+)b", "an atomic group"),
        (r"[^\s\S]", "no text matches"),
        (r"(a|b)*a(a|b){14}", "states"),
        (r"((a{99}){99}){99}", "states"),
    ],
)
def test_what_is_no_regular_language_is_refused_by_name(pattern: str, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        Automaton(pattern)


@pytest.mark.parametrize("which", ["demo", "stories"])
def test_tokens_are_the_bytes_that_they_write(which: str, request: pytest.FixtureRequest) -> None:
    lm = request.getfixturevalue(which)
    words = token_bytes(lm.tokenizer, lm.hook_width("logits"))
    assert len(words) == lm.hook_width("logits")
    assert not words[lm.eos_token_id]
    start, rng = lm.token_ids("One day", bos=True), random.Random(1)
    ids = [i for i, word in enumerate(words) if word.isascii() and word and not (len(word) == 1 and which == "stories")]
    for _ in range(100):
        chosen = [rng.choice(ids) for _ in range(6)]
        whole, before = (lm.tokenizer.decode(row, skip_special_tokens=True) for row in ([*start, *chosen], start))
        assert whole[len(before) :].encode() == b"".join(words[i] for i in chosen)
    assert set(range(256)) == {word[0] for word in words if len(word) == 1} or which == "demo"


def test_words_of_other_tokenizers_are_what_they_add_to_a_text() -> None:
    lm = with_text("llama")
    words = token_bytes(lm.tokenizer, lm.hook_width("logits"))
    assert words[4:7] == [b" w4", b" w5", b" w6"]
    assert words[:2] == [b"", b""]
    [found] = particles(lm, "w5", mask=r"( w[4-9])+", n=4, max_new_tokens=5)
    assert all(re.fullmatch(r"( w[4-9])+", text) for text in found.completions)


def test_a_mask_allows_just_the_tokens_after_which_the_text_can_still_match(demo: LanguageModel) -> None:
    pattern, end = r" the (cat|dog)s?\.", demo.eos_token_id
    assert end is not None
    mask, words = RegexMask(demo, pattern), token_bytes(demo.tokenizer, demo.hook_width("logits"))
    whole = (" the cat.", " the dog.", " the cats.", " the dogs.")
    prefix = tuple[int, ...]()
    allowed = mask.allowed(prefix, 30)
    for i, word in enumerate(words):
        assert bool(allowed[i]) == (word != b"" and any(text.encode().startswith(word) for text in whole))
    for token in demo.token_ids(" the dog."):
        assert bool(mask.allowed(prefix, 30)[token])
        assert not bool(mask.allowed(prefix, 30)[end])
        prefix = (*prefix, token)
    assert mask.allowed(prefix, 30).nonzero()[:, 0].tolist() == [end]
    assert mask.complete(prefix)
    assert mask.complete((*prefix, end))
    assert not mask.complete(prefix[:-1])
    assert not mask.closed(prefix)
    assert RegexMask(demo, pattern, needs_end=False).closed(prefix)
    assert not bool(mask.allowed((*prefix, prefix[0]), 30).any())


def test_a_token_that_leaves_too_few_to_finish_is_not_allowed(demo: LanguageModel) -> None:
    mask, word = RegexMask(demo, r"( dog)+!"), demo.token_ids(" dog")
    assert len(word) == 1
    full = mask.allowed((), 30)
    assert bool(full[word[0]])
    assert bool(mask.allowed((), 2)[word[0]])
    assert not bool(mask.allowed((), 1).any())
    space = demo.token_ids(" ")
    assert bool(full[space[0]])
    assert not bool(mask.allowed((), 2)[space[0]])
    for seed in range(3):  # all of three tokens: the limit is never what breaks it
        [found] = particles(demo, "A", mask=mask, n=4, max_new_tokens=3, seed=seed)
        assert all(re.fullmatch(r"( dog)+!", text) for text in found.completions)


PATTERNS = {
    "demo": r" there was an? [a-z ]+\.( [A-Z][a-z' ]+[.!]){1,2}",
    "stories": r" there was an? [a-z, ]+\.( [A-Z][a-z', ]+[.!]){0,2}",
}


@pytest.mark.parametrize("which", ["demo", "stories"])
@pytest.mark.parametrize("resampler", ["multinomial", "without_replacement"])
def test_a_regular_expression_is_never_broken(which: str, resampler: str, request: pytest.FixtureRequest) -> None:
    lm, pattern = request.getfixturevalue(which), PATTERNS[which]
    mask, settings = RegexMask(lm, pattern), {"n": 8, "max_new_tokens": 32, "resampler": resampler}
    for seed in range(3):
        for found in particles(lm, ["Once upon a time", "One day"], mask=mask, seed=2 * seed, **settings):
            for text, w in zip(found.completions, found.log_weights.tolist()):
                assert re.fullmatch(pattern, text)
                assert w > -torch.inf
            assert found.log_z is not None
            assert found.log_z < 0


def test_faces_are_written_byte_by_byte(stories: LanguageModel) -> None:
    """No token of the vocabulary holds one whole: the automaton follows their bytes."""
    pattern = r"( [😀😁]{2}){2}\."
    [found] = particles(stories, "Once", mask=pattern, n=8, max_new_tokens=40)
    assert all(re.fullmatch(pattern, text) for text in found.completions)
    assert all(len(text) >= 16 for text in found.tokens)


def rejected(lm: LanguageModel, prompt: str, pattern: str, rows: int, T: int, seed: int) -> list[float]:
    """Log-probabilities of the plain samples that keep the pattern, from at least `rows` rows of passes."""
    out: list[float] = []
    whole = RegexMask(lm, pattern, needs_end=False)
    while rows > 0:
        [found] = particles(lm, prompt, n=16, max_new_tokens=T, resampler="never", seed=seed)
        seed += 1
        for text in found.tokens:
            kept = next((i for i in range(1, len(text) + 1) if whole.complete(text[:i])), None)
            rows -= kept or len(text)
            if kept is not None:
                out.append(_log_p(lm, prompt, text[:kept]))
    return out


def _log_p(lm: LanguageModel, prompt: str, text: Any) -> float:
    start = lm.token_ids(prompt, bos=True)
    ids = torch.tensor([[*start, *text]])
    log_p = lm.logits(ids).double().log_softmax(-1)[0, len(start) - 1 : -1]
    return float(log_p.gather(1, ids[0, len(start) :, None]).sum())


def test_particles_find_likelier_texts_than_rejection_at_equal_passes(demo: LanguageModel) -> None:
    """A first sentence that ends with a pet: rejection keeps few of its texts, or none."""
    pattern, prompt = r" [a-zA-Z', ]* (dog|cat|kitten|puppy)\.", "Once upon a time"
    better, runs = 0, 3
    for seed in range(runs):
        [found] = particles(
            demo, prompt, mask=RegexMask(demo, pattern, needs_end=False), n=8, max_new_tokens=16, seed=seed
        )
        assert all(re.fullmatch(pattern, text) for text in found.completions)
        others = rejected(demo, prompt, pattern, found.cost.rows, 16, 100 + 10 * seed)
        better += not others or float(found.log_prior.max()) > max(others)
    assert better >= runs - 1
