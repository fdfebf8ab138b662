"""Text for training: where it comes from, what its tokens are, and which of them a step reads."""
