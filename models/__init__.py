"""Model definitions in Flax nnx, and the readers of checkpoints. Knows arrays, not requests."""
