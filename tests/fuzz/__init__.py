"""Hostile checkpoints, made from bytes: what hypothesis and atheris both feed to the same targets.

The invariant: either the load equals what the strict reader says, or an `AsyncLoaderError` is
raised, nothing was written, and memory stayed within bounds.
"""
