"""The study: what Steersman does on a real instruct model with the papers' own data. See `__main__.py`."""
