"""Analyses: where steering works, what it raises and lowers, how a fine-tuned model's concepts moved."""
