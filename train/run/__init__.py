"""Rows to an SAE: the recipe, the trainer and its optimiser, and the run's folder with its log and checkpoints."""
