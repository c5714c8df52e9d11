"""Training on many ranks: latents and batches shared out, and streams that the ranks make for one another."""
