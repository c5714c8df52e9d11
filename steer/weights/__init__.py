"""The weights themselves: differences between two models, and edits written into a copy."""
