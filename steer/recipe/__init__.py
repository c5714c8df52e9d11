"""Recipes, several edits in one file: `recipe` opens them, `entry` is one edit of the file, `kinds` those there are."""

from steersman.steer.recipe.entry import ENTRIES, Entry, Options, Place
from steersman.steer.recipe.kinds import DirectionEntry, FeaturesEntry, FileEntry, PresetEntry, VectorEntry
from steersman.steer.recipe.recipe import Recipe, RecipeSteering, template_of

__all__ = [
    "ENTRIES",
    "DirectionEntry",
    "Entry",
    "FeaturesEntry",
    "FileEntry",
    "Options",
    "Place",
    "PresetEntry",
    "Recipe",
    "RecipeSteering",
    "VectorEntry",
    "template_of",
]
