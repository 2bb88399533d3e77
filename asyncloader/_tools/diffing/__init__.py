"""What `asyncloader diff` does: says how two checkpoints differ."""
