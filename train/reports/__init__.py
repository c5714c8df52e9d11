"""What came out of a run: figures of the SAE and of its features, plots, and what a run will need."""
