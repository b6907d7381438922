"""Where hash projections come from: untrained rotations, and trained weights on disk."""
