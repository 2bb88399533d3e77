"""Looks at everything in a checkpoint, and lists all problems: `asyncloader verify`."""
