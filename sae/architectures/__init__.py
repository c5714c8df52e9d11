"""One file for each architecture, found by its name."""
