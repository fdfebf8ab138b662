"""Training a model: corpora, batches, the loop and its checkpoints."""
