"""Photos and captions -> cached latents and text embeddings -> batches."""
