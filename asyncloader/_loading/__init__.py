"""Loads: opens a checkpoint, plans what goes where, and streams it there."""
