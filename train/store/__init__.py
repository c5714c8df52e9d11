"""Rows on disk: the format, its writer, and reading them in a shuffled order in bounded memory."""
