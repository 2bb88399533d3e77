"""Carries plans out: byte budget, readers, sinks."""
