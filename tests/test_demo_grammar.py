"""The story grammar: exact labels, exact probabilities, one derivation, restartable."""

import math
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from steersman.demo import CONCEPT_OF_WORD, CONCEPTS, GROUPS, concept_labels, is_sentence, parse, stories, story, texts
from steersman.demo import grammar as grammar_module
from steersman.demo.concepts import LIKELIER
from steersman.demo.frames import ENDINGS, INTRODUCTIONS, OPENINGS, PRONOUNS, RECALLS

MANY = [story(11, index) for index in range(400)]


def all_frames() -> list[str]:
    grouped = [*INTRODUCTIONS.values(), *RECALLS.values(), *(concept.frames for concept in CONCEPTS.values())]
    return [*OPENINGS, *ENDINGS, *(frame for frames in grouped for frame in frames)]


def test_at_least_forty_concepts_of_at_least_four_words():
    assert len(CONCEPTS) >= 40
    assert all(len(concept.words) >= 4 for concept in CONCEPTS.values())


def test_words_belong_to_one_concept_and_to_no_frame():
    words = Counter(word.lower() for concept in CONCEPTS.values() for word in concept.words)
    assert [word for word, times in words.items() if times > 1] == []
    filler = {
        word.lower() for frame in all_frames() for word in re.findall(r"[A-Za-z]+", re.sub(r"\{.*?\}", "", frame))
    }
    assert filler & set(words) == set()


def test_no_word_after_an_article_starts_with_a_vowel():
    assert [s for tale in MANY for s in tale.sentences if re.search(r"\b[Aa] [aeiou]", s)] == []


def test_every_sentence_has_one_frame():
    """Two frames that look alike once their words are hidden would give a text two derivations."""
    frames = [frame.replace("!", "") for frame in all_frames()]
    assert len(set(frames)) == len(frames)
    genders = sum(1 + any(f"{{{key}}}" in frame for key in PRONOUNS) for frame in frames)
    assert len(grammar_module.skeletons()) == genders


def test_named_likelier_concepts_exist():
    for group, (source, pairs) in LIKELIER.items():
        for cause, effect in pairs.items():
            assert CONCEPTS[cause].group == source
            assert CONCEPTS[effect].group == group


def test_stories_have_six_to_ten_sentences_and_use_every_concept():
    lengths = {len(tale.sentences) for tale in MANY}
    assert lengths == {6, 7, 8, 9, 10}
    assert {concept for tale in MANY for _, _, concept in tale.spans} == set(CONCEPTS)
    assert all(tale.text == " ".join(tale.sentences) for tale in MANY)


def test_spans_mark_exactly_the_concept_words():
    for tale in MANY:
        said = [(m.start(), m.end()) for m in re.finditer(r"[A-Za-z]+", tale.text) if m[0] in CONCEPT_OF_WORD]
        assert [(start, end) for start, end, _ in tale.spans] == said
        assert all(tale.text[start:end] in CONCEPTS[concept].words for start, end, concept in tale.spans)


def test_a_story_keeps_one_concept_per_group():
    for tale in MANY:
        concepts = {concept for _, _, concept in tale.spans}
        groups = Counter(CONCEPTS[concept].group for concept in concepts)
        assert set(groups.values()) == {1}


def test_same_seed_and_number_same_story_from_any_start():
    first = list(islice(stories(5), 30))
    assert list(islice(stories(5, start=20), 10)) == first[20:]
    assert texts(30, seed=5) == [tale.text for tale in first]
    assert len({tale.text for tale in first} & set(texts(30, seed=6))) == 0


def test_a_story_is_what_it_always_was():
    """The committed model was trained on these very stories: a change of the grammar must retrain it."""
    assert story(0, 0).text == GOLDEN


def test_recognizer_finds_the_same_words_and_probability():
    for tale in MANY:
        reading = parse(tale.text)
        assert reading.complete
        assert reading.rest == ""
        assert reading.spans == tale.spans
        assert reading.sentences == len(tale.sentences)
        assert reading.log_probability == pytest.approx(tale.log_probability, abs=1e-9)


def test_next_sentences_have_total_probability_one():
    state = grammar_module._State()
    for sentence in MANY[0].sentences:
        options = grammar_module._options(state)
        assert math.fsum(option.probability for option in options) == pytest.approx(1.0, abs=1e-12)
        fits = []
        for option in options:
            after = state.copy()
            if grammar_module._match(option.frame, sentence, 0, after, []) == pytest.approx((len(sentence), 0), abs=99):
                fits.append((option, after))
        assert len(fits) == 1, "one derivation"
        option, state = fits[0]
        state.plan = option.plan
    assert grammar_module._options(state) == []


def test_concepts_of_a_group_have_total_probability_one():
    for group in GROUPS:
        for place in ("woods", "home"):
            state = grammar_module._State()
            state.bind(CONCEPTS[place])
            if group != "place":
                assert math.fsum(p for _, p in state.choices(group)) == pytest.approx(1.0, abs=1e-12)


def test_stated_probability_is_the_frequency():
    """The sum of logs must be the chance with which the generator really says it."""
    tales = [story(3, index) for index in range(1500)]
    opening = sum(
        grammar_module.skeleton(tale.sentences[0]) == "At <time>, <name> <move> to the <place>." for tale in tales
    )
    assert opening / len(tales) == pytest.approx(1 / len(OPENINGS), abs=0.04)
    animals = Counter()
    for tale in tales:
        concepts = {concept for *_, concept in tale.spans}
        wanted = LIKELIER["animal"][1][next(c for c in concepts if CONCEPTS[c].group == "place")]
        animals.update(concept == wanted for concept in concepts if CONCEPTS[concept].group == "animal")
    expected = grammar_module.AFFINITY + (1 - grammar_module.AFFINITY) / len(GROUPS["animal"])
    assert animals[True] / animals.total() == pytest.approx(expected, abs=0.09)


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (lambda s: s.text + " The end.", 6),
        (lambda s: " ".join(s.sentences[1:]), 0),
        (lambda s: " ".join(s.sentences[:-1]) + " " + s.sentences[-1][:-1], 5),
        (lambda s: s.text.replace(". ", ".  ", 1), 1),
    ],
    ids=["goes on", "no opening", "cut off", "two spaces"],
)
def test_what_is_no_story_is_refused(change, sentences):
    short = next(tale for tale in MANY if len(tale.sentences) == 6)
    reading = parse(change(short))
    assert not reading.complete
    assert reading.log_probability == -math.inf
    assert reading.sentences == sentences
    assert reading.rest != ""


def test_a_word_of_another_concept_is_refused_after_the_first():
    tale = next(tale for tale in MANY if sum(concept == "snow" for *_, concept in tale.spans) > 1)
    start, end, _ = [span for span in tale.spans if span[2] == "snow"][1]
    assert parse(tale.text[:start] + "frost" + tale.text[end:]).complete
    assert not parse(tale.text[:start] + "drizzle" + tale.text[end:]).complete


def test_sentences_are_known_by_frame_wherever_they_stand():
    assert is_sentence("Suddenly the rain began.")
    assert not is_sentence("Suddenly the fox began.")
    assert not is_sentence("Suddenly the began.")


def test_a_beginning_reads_without_rest_but_is_incomplete():
    reading = parse(" ".join(MANY[0].sentences[:3]))
    assert (reading.sentences, reading.complete, reading.rest) == (3, False, "")


def test_labels_follow_character_overlap():
    spans = ((4, 8, "snow"), (9, 12, "rain"))
    offsets = [(0, 0), (0, 4), (3, 6), (6, 8), (8, 12), (12, 13), (5, 11)]
    labels = concept_labels(spans, offsets)
    assert labels.dtype == np.bool_
    assert labels.shape == (7, len(CONCEPTS))
    columns = list(CONCEPTS)
    found = [{columns[c] for c in np.flatnonzero(row)} for row in labels]
    assert found == [set(), set(), {"snow"}, {"snow"}, {"rain"}, set(), {"snow", "rain"}]


GOLDEN = (
    "There once was a boy named Leo, and he rushed to the glade every day. "
    "He ran until he was out of breath. "
    "His grandmother came along too. "
    "Leo sat on the lap of his granny. "
    "Suddenly the thunderstorm began. "
    "All of this made him terrified. "
    "Being afraid, Leo rushed behind a door. "
    "Now everyone was as nervous as Leo. "
    "And so Leo left the forest and slept well."
)
