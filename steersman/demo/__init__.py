"""The bundled model and the story grammar it was trained on."""

from importlib.resources import files
from pathlib import Path

from steersman.demo.concepts import CONCEPT_OF_WORD, CONCEPTS, GROUPS, Concept
from steersman.demo.grammar import Reading, Story, concept_labels, is_sentence, parse, stories, story, texts
from steersman.demo.targets import word_rate

MODEL_PATH = Path(str(files("steersman.demo") / "steersman-demo"))
"""The folder of the bundled model: give it to `LanguageModel.load` or to transformers."""

__all__ = [
    "CONCEPTS",
    "CONCEPT_OF_WORD",
    "GROUPS",
    "MODEL_PATH",
    "Concept",
    "Reading",
    "Story",
    "concept_labels",
    "is_sentence",
    "parse",
    "stories",
    "story",
    "texts",
    "word_rate",
]
