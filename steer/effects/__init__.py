"""What many steering vectors do to the features, the map fitted to it, and the vectors read off it (SAE-TS)."""
