"""Text to rows: contexts of tokens, the model run over them, and where the rows go: a store, or a trainer."""
